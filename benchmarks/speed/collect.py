# SPDX-License-Identifier: Apache-2.0
"""What measuring costs next to plain sampling: forward passes of ComfyUI's own Flux at its real width.

    COMFYUI_PATH=... python benchmarks/speed/collect.py [--paper SSR-Merge] [--device cuda --dtype bfloat16 [--fp8]]

Five ways to run the same blocks on the same tokens: the plain model; the model patched with one LoRA by ComfyUI; this
package's recording, in which that LoRA is active and the statistics of all LoRAs are summed; the same of a combination,
in which two LoRAs are active; the paper's collector
(`--paper`, a checkout of github.com/nagara214/SSR-Merge) on the model patched with that LoRA. Putting on and taking off
is not measured. The table has medians of seconds and of the ratios to the plain model within each repetition. Where
other work shares the CPU, `--clock cpu` counts the seconds of this process alone.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import machine
from flux import flux, inputs, loras
from ssr_core import Lora, StatisticsCollector
from timing import CLOCKS, Times, Way, interleaved

CASES = ((2, 16, 0), (2, 32, 0), (2, 32, 64), (2, 32, 128), (4, 16, 64), (8, 16, 64), (2, 128, 64))
"""LoRAs, rank of each, context rows. The third is the one that has a goal: 1.05 of plain sampling at most."""


@contextmanager
def patched(model: nn.Module, lora: Lora, device: str) -> Iterator[None]:
    """The LoRA in the weights, put there by ComfyUI's ModelPatcher."""
    from comfy.model_patcher import ModelPatcher
    from comfy.weight_adapter.lora import LoRAAdapter

    patcher = ModelPatcher(model, torch.device(device), torch.device(device))
    patches = {
        f"{site.module}.weight": LoRAAdapter(set(), (update.up, update.down, None, None, None, None))
        for site, update in lora.updates.items()
    }
    if len(patcher.add_patches(patches)) != len(patches):
        raise RuntimeError("ComfyUI did not take all layers of the LoRA")
    patcher.patch_model(torch.device(device))
    try:
        yield
    finally:
        patcher.unpatch_model(torch.device(device))


@contextmanager
def attached(recording: Any, model: nn.Module) -> Iterator[None]:
    recording.attach(model)
    try:
        yield
    finally:
        recording.detach()


def papers(paper: Any, tasks: Sequence[Lora]) -> Any:
    """The paper's collector, for the first task."""
    merger = paper.SSRMerger([{s.module: (u.down, u.up) for s, u in lora.updates.items()} for lora in tasks])
    merger.set_active_task(0)
    return merger


@contextmanager
def papers_attached(merger: Any, model: nn.Module, lora: Lora, device: str) -> Iterator[None]:
    with patched(model, lora, device):
        merger.attach({name: module for name, module in model.named_modules() if name in merger.layer_stats})
        try:
            yield
        finally:
            merger.detach()


def measure(model: nn.Module, args: Sequence[Tensor], tasks: Sequence[Lora], context: int, options: Any) -> Times:
    device = options.device
    collector = StatisticsCollector(tasks)
    if context:
        with collector.surveying(model, 0, context):
            model(*args)
        collector.see(context)
    with collector.recording(0) as recording, collector.recording((0, 1)) as both:
        around = {
            "plain": None,
            "loader": lambda: patched(model, tasks[0], device),
            "ours": lambda: attached(recording, model),
            "combination": lambda: attached(both, model),
        }
        if options.paper:
            merger = papers(options.collector, tasks)
            around["paper"] = lambda: papers_attached(merger, model, tasks[0], device)
        ways = {
            name: Way(lambda: model(*args), how) if how else Way(lambda: model(*args)) for name, how in around.items()
        }
        return interleaved(ways, options.repeats, device, options.clock)


def main() -> None:
    options = arguments()
    machine.start_comfyui(options.device)
    dtype = getattr(torch, options.dtype)
    if options.paper:
        sys.path.append(str(options.paper))
        from ssr_merge import core

        options.collector = core
    print(f"{machine.describe(options.device, options.dtype)}{' from fp8' if options.fp8 else ''}")
    print(
        f"width {options.width}, {options.blocks[0]} double and {options.blocks[1]} single blocks, "
        f"{options.clock} clock, medians of {options.repeats}"
    )
    ways = ["plain", "loader", "ours", "combination", *(["paper"] if options.paper else [])]
    print(f"{'tokens':>7} {'LoRAs x rank':>13} {'context':>8} " + "".join(f"{way:>20}" for way in ways))
    with torch.inference_mode():
        model = flux(options.width, options.device, dtype, options.fp8, *options.blocks)
        for tokens in options.tokens:
            args = inputs(tokens, options.device, dtype)
            for count, rank, context in [CASES[number] for number in options.cases]:
                found = measure(model, args, loras(model, count, rank), context, options)
                cells = "".join(f"{found.cell(way):>20}" for way in ways)
                print(f"{tokens:>7} {f'{count} x {rank}':>13} {context:>8} {cells}", flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--width", type=int, default=3072)
    parser.add_argument("--blocks", type=int, nargs=2, default=[0, 1], help="of each kind: double and single")
    parser.add_argument("--tokens", type=int, nargs="*", default=[1024])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--fp8", action="store_true", help="weights in 8 bits, cast for each product")
    parser.add_argument("--paper", type=Path)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--cases", type=int, nargs="*", default=[2, 4, 5], help="numbers of the cases")
    return parser.parse_args()


if __name__ == "__main__":
    main()
