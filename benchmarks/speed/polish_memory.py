# SPDX-License-Identifier: Apache-2.0
"""The memory that SSR Polish takes beside a model, by model and rank, as it is told before polishing starts.

    COMFYUI_PATH=... python benchmarks/speed/polish_memory.py

ComfyUI's own classes at their real sizes answer at one picture of 1024 x 1024 on the meta device, which computes shapes
only; what autograd would keep is counted by `ssr_core.footprint`, as SSR Polish does it. Weights and activations are in
bfloat16, attention keeps what FlashAttention keeps, and every linear and convolutional layer of the blocks has a LoRA.
Tests hold the counting against the peaks of small models. Not counted: what CUDA and its kernels take for themselves.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from real_models import META, Named, empty, models, shapes
from torch import Tensor, nn

import machine
from ssr_core import DistillationRequirement, LowRankUpdate, Point, Site, footprint

RANKS = (16, 32, 64)
CARDS = (12, 16, 24)  # GiB
RESERVED = 1.0  # GiB of each for the desktop, CUDA and what ComfyUI keeps free


def main() -> None:
    machine.start_comfyui()
    importlib.import_module("comfy.model_management").in_training = True  # other kernels, as while polishing
    heads = "".join(f"{f'fits {card}':>9}" for card in CARDS)
    print(f"{'model':<14}{'weights fp8':>13}{'rank':>6}{'only_up':>9}{'device':>9}{'results':>9}{heads}   (GiB)")
    for name, model in models().items():
        network = model.built()
        weights = sum(one.numel() for one in network.parameters()) / 2**30
        for rank in RANKS:
            for only_up in (False, True):
                need = told(network, model, rank, only_up)
                device, results = need.device / 2**30, need.results / 2**30
                fits = "".join(f"{'yes' if weights + device + RESERVED <= card else 'no':>9}" for card in CARDS)
                cells = f"{'yes' if only_up else 'no':>9}{device:>9.1f}{results:>9.1f}"
                print(f"{name:<14}{weights:>13.1f}{rank:>6}{cells}{fits}", flush=True)


def told(network: nn.Module, model: Named, rank: int, only_up: bool) -> DistillationRequirement:
    """Of one rank in all layers of the blocks."""
    options = {"optimized_attention_override": flash}
    point = Point(0, model.args, {**model.kwargs, "transformer_options": options}, ())
    updates = on_all_layers(network, rank)
    return DistillationRequirement.of(updates, footprint(network, network, point, updates, META, only_up), (), only_up)


def on_all_layers(network: nn.Module, rank: int) -> dict[Site, LowRankUpdate]:
    return {
        Site.whole(name, shape[0]): LowRankUpdate(empty(rank, *shape[1:]), empty(shape[0], rank))
        for name, shape in shapes(network).items()
    }


class _Flash(torch.autograd.Function):
    """What FlashAttention keeps for the backward pass: its inputs, its output, and a number a row and head."""

    @staticmethod
    def forward(context: Any, q: Tensor, k: Tensor, v: Tensor, heads: int, rows: int) -> Tensor:
        output = torch.empty_like(q)
        sums = torch.empty(q.shape[0], heads, rows, dtype=torch.float32, device=q.device)
        context.save_for_backward(q, k, v, output, sums)
        return output


def flash(function: Any, q: Tensor, k: Tensor, v: Tensor, heads: int, *args: Any, **more: Any) -> Tensor:
    """In the place of ComfyUI's attention: (batch, tokens, width), or (batch, heads, tokens, width of one)."""
    split = more.get("skip_reshape", False)
    output: Tensor = _Flash.apply(q, k, v, heads, q.shape[2 if split else 1])
    if split and not more.get("skip_output_reshape", False):
        output = output.transpose(1, 2).flatten(2)
    return output


if __name__ == "__main__":
    main()
