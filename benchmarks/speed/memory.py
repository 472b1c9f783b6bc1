# SPDX-License-Identifier: Apache-2.0
"""The memory that collecting takes beside the model: measured, told before, and told at the real size of Flux.

    COMFYUI_PATH=... python benchmarks/speed/memory.py [--width 1024] [--device cuda --dtype bfloat16]

Measured is the peak of each kind of run on a model's blocks, above the peak of the same run without hooks. On the CPU
the bytes of all tensors that come into being are counted, statistics that are kept included; on a GPU what CUDA
allocated. LoRAs are in bfloat16, as in most files. The unit is what has to be there in any case: the joint down
matrices and the running LoRA's up in the precision that layers compute in, and one Gram matrix per layer in float64.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

import machine
from allocations import allocations
from flux import flux, inputs, loras
from flux_sizes import flux as real_flux
from ssr_core import Lora, LowRankUpdate, Requirement, StatisticsCollector, merge

CONTEXT = 128
SIZES = ((2, 16), (2, 32), (4, 32), (8, 128))  # LoRAs, rank of each
CARD, MODEL, ACTIVATIONS = 24, 12, 3  # GiB of a card, of Flux in fp8, of activations and what ComfyUI keeps free


def main() -> None:
    options = arguments()
    machine.start_comfyui(options.device)
    dtype = getattr(torch, options.dtype)
    print(machine.describe(options.device, options.dtype))
    print(f"one double and one single block, width {options.width}, {options.tokens} tokens")
    heads = f"{'measured, MiB':>14}{'told, MiB':>11}{'unit, MiB':>11}{'measured / unit':>17}"
    print(f"{'LoRAs x rank':>13}  {'run':<28}{heads}")
    with torch.inference_mode():
        model, args = flux(options.width, options.device, dtype), inputs(options.tokens, options.device, dtype)
        for count, rank in SIZES[: options.sizes]:
            for name, taken, told, unit in measured(model, args, in_half(loras(model, count, rank)), options.device):
                sizes = "".join(f"{size / 2**20:>{width}.1f}" for size, width in ((taken, 14), (told, 11), (unit, 11)))
                print(f"{f'{count} x {rank}':>13}  {name:<28}{sizes}{taken / unit:>16.2f}x", flush=True)
    print_predictions()


def measured(
    model: nn.Module, args: Sequence[Tensor], tasks: Sequence[Lora], device: str
) -> Iterator[tuple[str, int, int, int]]:
    """(kind of run, bytes at the peak, bytes told before, the unit)"""
    itemsize = args[0].element_size()

    def run() -> object:
        return model(*args)

    run()
    base = peak(run, device)

    def extra(around: Callable[[], AbstractContextManager[Any]], run: Callable[[Any], object]) -> int:
        def inside() -> None:
            with around() as run_of:
                run(run_of)

        return peak(inside, device) - base

    def told(collector: StatisticsCollector, context: int, refine: bool) -> int:
        need = collector.requirement(context, refine, args[0].dtype)
        return need.device if device.startswith("cuda") else need.device + need.host // len(tasks)

    def kinds(collector: StatisticsCollector, context: int) -> Iterator[tuple[str, int, int, int]]:
        if context:
            expected = told(collector, context, False)
            taken = extra(lambda: collector.surveying(model, 0, context), lambda _: run())
            yield "survey", taken, expected, unit_of(collector, itemsize, context)
            collector.see(context)
        expected = told(collector, 0, False)
        taken = extra(lambda: collector.watching(model, 0), lambda _: run())
        yield f"measuring, context {context}", taken, expected, unit_of(collector, itemsize)
        updates = merge(collector.calibration()).updates
        expected = told(collector, 0, True)
        taken = extra(lambda: collector.refining(model, 0, updates), lambda found: both(found, run))
        yield f"refining, context {context}", taken, expected, unit_of(collector, itemsize)

    for context in (0, CONTEXT):
        yield from kinds(StatisticsCollector(tasks), context)


def both(found: Any, run: Callable[[], object]) -> None:
    with found.alone():
        run()
    with found.merged():
        run()


def peak(run: Callable[[], object], device: str) -> int:
    """Bytes above what was there before."""
    gc.collect()
    if not device.startswith("cuda"):
        return allocations(run).peak
    machine.synchronize(device)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    machine.synchronize(device)
    return torch.cuda.max_memory_allocated() - before


def unit_of(collector: StatisticsCollector, itemsize: int, context: int = 0) -> int:
    """Joint down, running up and one Gram; `context` rows more than the subspaces have yet."""
    total = 0
    for space in collector.subspaces.values():
        rows = len(space.down) + context
        total += itemsize * (rows * space.down[0].numel() + space.task(0).up.numel()) + 8 * rows**2
    return total


def in_half(tasks: Sequence[Lora]) -> list[Lora]:
    return [
        Lora(lora.name, {s: LowRankUpdate(u.down.bfloat16(), u.up.bfloat16()) for s, u in lora.updates.items()})
        for lora in tasks
    ]


def print_predictions() -> None:
    room = CARD - MODEL - ACTIVATIONS
    print()
    print(
        f"Told at the real size of Flux, bfloat16, all layers of the blocks; {room} GiB left of {CARD} beside the model"
    )
    print(f"{'LoRAs x rank':>13}{'context':>9}{'refined':>9}{'device, GiB':>13}{'fits':>6}{'host, GiB':>11}")
    for count, rank in SIZES:
        for context in (0, CONTEXT):
            for refine in (False, True):
                need = Requirement.of(real_flux(count, rank), context, refine, torch.bfloat16)
                device, host = need.device / 2**30, need.host / 2**30
                fits = "yes" if device <= room else "no"
                cells = f"{context:>9}{'yes' if refine else 'no':>9}{device:>13.2f}{fits:>6}{host:>11.2f}"
                print(f"{f'{count} x {rank}':>13}{cells}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--sizes", type=int, default=3, help=f"how many of {SIZES} to measure")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    return parser.parse_args()


if __name__ == "__main__":
    main()
