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
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import machine
from ssr_core import DistillationRequirement, LowRankUpdate, Point, Site, footprint
from ssr_core.distillation.frozen import blocks_of

RANKS = (16, 32, 64)
CARDS = (12, 16, 24)  # GiB
RESERVED = 1.0  # GiB of each for the desktop, CUDA and what ComfyUI keeps free
META = torch.device("meta")
HALF = torch.bfloat16


class Named(NamedTuple):
    """A model, and what it is called with."""

    make: Callable[[dict[str, Any]], nn.Module]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def main() -> None:
    machine.start_comfyui()
    importlib.import_module("comfy.model_management").in_training = True  # other kernels, as while polishing
    heads = "".join(f"{f'fits {card}':>9}" for card in CARDS)
    print(f"{'model':<14}{'weights fp8':>13}{'rank':>6}{'only_up':>9}{'device':>9}{'results':>9}{heads}   (GiB)")
    for name, model in models().items():
        network = model.make({"device": META, "dtype": HALF, "operations": operations()})
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
    """An update of each linear and convolutional layer of the blocks."""
    inside = {id(module) for block in blocks_of(network) for module in block.modules()}
    shapes = {
        name: module.weight.shape
        for name, module in network.named_modules()
        if id(module) in inside and isinstance(module, nn.Linear | nn.Conv2d)
    }
    return {
        Site.whole(name, shape[0]): LowRankUpdate(empty(rank, *shape[1:]), empty(shape[0], rank))
        for name, shape in shapes.items()
    }


def empty(*shape: int, dtype: torch.dtype = HALF) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


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


def operations() -> Any:
    return importlib.import_module("comfy.ops").disable_weight_init


def models() -> dict[str, Named]:
    """At one picture of 1024 x 1024 and the usual number of text tokens."""
    time = empty(1, dtype=torch.float32)
    return {
        "SDXL": Named(sdxl, (empty(1, 4, 128, 128), time, empty(1, 77, 2048)), {"y": empty(1, 2816)}),
        "Flux": Named(flux, (empty(1, 16, 128, 128), time, empty(1, 256, 4096), empty(1, 768)), {"guidance": empty(1)}),
        "Qwen-Image": Named(qwen_image, (empty(1, 16, 1, 128, 128), time, empty(1, 128, 3584)), {}),
        "Wan 2.2 14B": Named(wan, (empty(1, 16, 1, 128, 128), time, empty(1, 512, 4096)), {}),
        "Z-Image": Named(z_image, (empty(1, 16, 128, 128), time, empty(1, 128, 2560), 128), {}),
    }


def sdxl(common: dict[str, Any]) -> nn.Module:
    return importlib.import_module("comfy.ldm.modules.diffusionmodules.openaimodel").UNetModel(
        **{"image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320, "channel_mult": [1, 2, 4]},
        **{"num_res_blocks": [2, 2, 2], "use_spatial_transformer": True, "use_linear_in_transformer": True},
        **{"transformer_depth": [0, 0, 2, 2, 10, 10], "transformer_depth_middle": 10, "context_dim": 2048},
        **{"transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10], "num_head_channels": 64, "legacy": False},
        **{"num_classes": "sequential", "adm_in_channels": 2816, **common},
    )


def flux(common: dict[str, Any]) -> nn.Module:
    return importlib.import_module("comfy.ldm.flux.model").Flux(
        **{"in_channels": 16, "out_channels": 16, "vec_in_dim": 768, "context_in_dim": 4096, "hidden_size": 3072},
        **{"mlp_ratio": 4.0, "num_heads": 24, "depth": 19, "depth_single_blocks": 38, "axes_dim": [16, 56, 56]},
        **{"theta": 10000, "patch_size": 2, "qkv_bias": True, "guidance_embed": True, "txt_ids_dims": [], **common},
    )


def qwen_image(common: dict[str, Any]) -> nn.Module:
    return importlib.import_module("comfy.ldm.qwen_image.model").QwenImageTransformer2DModel(**common)


def wan(common: dict[str, Any]) -> nn.Module:
    """One of the two experts."""
    return importlib.import_module("comfy.ldm.wan.model").WanModel(
        **{"dim": 5120, "ffn_dim": 13824, "num_heads": 40, "num_layers": 40, **common}
    )


def z_image(common: dict[str, Any]) -> nn.Module:
    return importlib.import_module("comfy.ldm.lumina.model").NextDiT(
        **{"in_channels": 16, "dim": 3840, "n_layers": 30, "n_heads": 30, "n_kv_heads": 30, "qk_norm": True},
        **{"axes_dims": [32, 48, 48], "axes_lens": [1536, 512, 512], "rope_theta": 256.0, "cap_feat_dim": 2560},
        **{"ffn_dim_multiplier": 8.0 / 3.0, "z_image_modulation": True, "time_scale": 1000.0, **common},
    )


if __name__ == "__main__":
    main()
