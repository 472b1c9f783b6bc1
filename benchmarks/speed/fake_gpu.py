# SPDX-License-Identifier: Apache-2.0
"""What collecting does on a GPU, counted without one: kernels, waits of the host, copies and memory at real sizes.

    COMFYUI_PATH=... python benchmarks/speed/fake_gpu.py --model SDXL [--loras 2 --rank 16] [--file-dtype float16]

A model class of ComfyUI at its real size, on tensors of a device "cuda" that is not there (torch's FakeTensorMode),
with LoRAs on all linear layers and convolutions of its blocks. Only what this package adds is counted. "Told" is what
`Requirement` says before.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable, Mapping
from typing import Any

import real_models  # makes fake_cuda and ssr_core importable
import torch
from fake_cuda import FakeCuda, fake_cuda
from torch import Tensor

import machine
from ssr_core import Lora, LowRankUpdate, Site, StatisticsCollector, Subspace

CONTEXT, COUNTED = 128, 1024


def lora(number: int, shapes: Mapping[str, torch.Size], rank: int, dtype: torch.dtype) -> Lora:
    def factor(*shape: int) -> Tensor:
        return torch.full(shape, 1 / 3).to(dtype) + number

    updates = {
        Site.whole(name, out): LowRankUpdate(factor(rank, *inputs), factor(out, rank))
        for name, (out, *inputs) in shapes.items()
    }
    return Lora(str(number), updates)


def with_context(spaces: dict[Site, Subspace]) -> dict[Site, Subspace]:
    return {s: space.with_context(torch.ones(CONTEXT, space.down.shape[1])) for s, space in spaces.items()}


def main() -> None:
    options = arguments()
    dtype, file_dtype = getattr(torch, options.dtype), getattr(torch, options.file_dtype)
    machine.start_comfyui()
    # the other ways of attention ask the device for what is free
    importlib.import_module("comfy.cli_args").args.use_pytorch_cross_attention = True
    named = real_models.models()[options.model]
    shapes = real_models.shapes(named.built())
    print(f"{options.model}, {len(shapes)} layers, {options.loras} x {options.rank} in {options.file_dtype}", end=" ")
    print(f"on {options.dtype}, context {CONTEXT}")
    print(f"{'':22}{'kernels':>9}{'waits':>7}{'sent MB':>9}{'live GB':>9}{'peak GB':>9}{'told GB':>9}")
    with fake_cuda() as seen, torch.no_grad():
        model = named.built("cuda", dtype)
        args, kwargs = named.given("cuda", dtype)
        loras = [lora(number, shapes, options.rank, file_dtype) for number in range(options.loras)]
        show = Table(seen, lambda: model(*args, **kwargs))
        collector = StatisticsCollector(loras)
        told = collector.requirement(CONTEXT, dtype=dtype).device
        with collector.recording(0, CONTEXT, COUNTED) as run:
            run.attach(model)
            show("survey", told)
        collector = StatisticsCollector(loras, with_context(collector.subspaces))
        with collector.recording(0, 0, COUNTED) as run:
            run.attach(model)
            show("measuring", collector.requirement(dtype=dtype).device)
        stack = {site: space.plain_stack() for site, space in collector.subspaces.items()}
        with collector.refinement(0, stack) as run:
            run.attach(model)
            show("refining", collector.requirement(refine=True, dtype=dtype).device, run.alone, run.merged)


class Table:
    """A row for each forward pass, of what is beside the model's own."""

    def __init__(self, seen: FakeCuda, forward: Callable[[], None]) -> None:
        self._seen, self._forward = seen, forward
        seen.reset()
        base = seen.live
        forward()
        self._kernels, self._model, self._activations = seen.launches, base, seen.peak - base

    def __call__(self, name: str, told: int, *branches: Any) -> None:
        for number in (1, 2):
            for branch in branches or (None,):
                self._seen.reset()
                if branch is None:
                    self._forward()
                else:
                    with branch():
                        self._forward()
                label = f"{name}{f', {branch.__name__}' if branch else ''}, {number}."
                seen, own = self._seen, self._seen.live - self._model
                waits = sum(count for line, count in seen.waits.items() if line != "elsewhere")  # not the model's own
                peak = max(own, seen.peak - self._model - self._activations)
                print(
                    f"{label:22}{seen.launches - self._kernels:>9}{waits:>7}{seen.sent / 1e6:>9.0f}"
                    f"{own / 1e9:>9.2f}{peak / 1e9:>9.2f}{told / 1e9:>9.2f}",
                    flush=True,
                )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="Flux", help="as real_models.py calls it")
    parser.add_argument("--loras", type=int, default=2)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--file-dtype", default="bfloat16")
    return parser.parse_args()


if __name__ == "__main__":
    main()
