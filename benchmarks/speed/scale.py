# SPDX-License-Identifier: Apache-2.0
"""How cost grows: what one layer's recording and one layer's solution cost against the number of LoRAs, their rank, the
tokens and the layers, with the exponent that fits best.

    python benchmarks/speed/scale.py [--width 1024] [--device cuda --dtype bfloat16]

One quantity varies at a time from 2 LoRAs of rank 32, 1,024 tokens and 4 layers. An exponent is the slope of a straight
line through the logarithms: 1 is in proportion. The cost of recording is the time of forward passes through linear
layers with the hooks on, less that without, in turn.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

import machine
from solve import calibration
from solve import solve as solved
from ssr_core import Lora, LowRankUpdate, Site, StatisticsCollector
from timing import CLOCKS, Way, interleaved

SIZES: dict[str, Sequence[int]] = {
    "loras": (2, 4, 8),
    "rank": (16, 32, 64, 128),
    "tokens": (512, 1024, 2048, 4096),
    "layers": (2, 4, 8, 16),
}


@dataclass(frozen=True)
class Case:
    loras: int = 2
    rank: int = 32
    tokens: int = 1024
    layers: int = 4


class Run:
    """Forward passes through square layers, all with LoRAs, without hooks and with them."""

    def __init__(self, case: Case, width: int, device: str, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(*(nn.Linear(width, width, device=device, dtype=dtype) for _ in range(case.layers)))
        self.x = torch.randn(case.tokens, width, device=device, dtype=dtype)
        collector = StatisticsCollector([self._lora(case.rank, width, str(task)) for task in range(case.loras)])
        self.recording = collector.recording(0)

    def _lora(self, rank: int, width: int, name: str) -> Lora:
        factors = ((torch.randn(rank, width) / width**0.5, torch.randn(width, rank) * 0.02) for _ in self.model)
        return Lora(name, {Site.whole(str(i), width): LowRankUpdate(down, up) for i, (down, up) in enumerate(factors)})

    def __call__(self) -> Tensor:
        return self.model(self.x)

    @contextmanager
    def watched(self, recording: object) -> Iterator[None]:
        recording.attach(self.model)  # type: ignore[attr-defined]
        yield
        recording.detach()  # type: ignore[attr-defined]


def overhead(case: Case, options: argparse.Namespace) -> float:
    """Seconds of hooks in one pass."""
    run = Run(case, options.width, options.device, getattr(torch, options.dtype))
    with torch.inference_mode(), run.recording as recording:
        ways = {"plain": Way(run), "ours": Way(run, lambda: run.watched(recording))}
        times = interleaved(ways, options.repeats, options.device, options.clock)
    return statistics.median(b - a for a, b in zip(times.seconds["plain"], times.seconds["ours"], strict=True))


def solution(case: Case, options: argparse.Namespace) -> float:
    """Seconds to merge to the rank of one LoRA."""
    found = calibration(case.loras, case.rank, 0, options.width, case.layers)
    return interleaved({"ours": Way(lambda: solved(found, case.rank))}, options.repeats, clock=options.clock).median(
        "ours"
    )


def exponent(costs: Mapping[int, float]) -> float:
    """Least squares in logarithms."""
    points = [(math.log(size), math.log(max(cost, 1e-9))) for size, cost in costs.items()]
    return statistics.linear_regression(*zip(*points, strict=True)).slope


def main() -> None:
    options = arguments()
    print(machine.describe(options.device, options.dtype))
    print(f"width {options.width}, {options.clock} clock, medians of {options.repeats}; seconds")
    for name, cost, quantities in (
        ("recording", overhead, SIZES),
        ("solving", solution, {key: SIZES[key] for key in ("loras", "rank", "layers")}),
    ):
        for quantity, sizes in quantities.items():
            costs = {size: cost(replace(Case(), **{quantity: size}), options) for size in sizes}
            cells = "".join(f"{f'{size}: {seconds:.4f}':>16}" for size, seconds in costs.items())
            print(f"{name:<10} by {quantity:<7}{cells:<64}   exponent {exponent(costs):5.2f}", flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    return parser.parse_args()


if __name__ == "__main__":
    main()
