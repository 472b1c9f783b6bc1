# SPDX-License-Identifier: Apache-2.0
"""Times of several ways to do the same, in turn, so that what else the machine does hits all of them alike."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import machine

Clock = Callable[[], float]
CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True)
class Way:
    """What is measured. What `around` does on entering and leaving is not."""

    run: Callable[[], object]
    around: Callable[[], AbstractContextManager[object]] = nullcontext


@dataclass(frozen=True)
class Times:
    """Seconds of each way, one per repetition; the first way is what the others are compared with."""

    seconds: Mapping[str, Sequence[float]]

    def median(self, way: str) -> float:
        return statistics.median(self.seconds[way])

    def ratio(self, way: str) -> float:
        """Median of the ratios within each repetition."""
        baseline = next(iter(self.seconds.values()))
        return statistics.median(t / b for t, b in zip(self.seconds[way], baseline, strict=True))

    def cell(self, way: str) -> str:
        return f"{self.median(way):8.3f} s {self.ratio(way):6.3f}x"


def interleaved(ways: Mapping[str, Way], repeats: int, device: str = "cpu", clock: str = "wall") -> Times:
    """Each way once to warm up, then `repeats` times: in this order and backwards, alternately."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        _seconds(way, device, CLOCKS[clock])
    for repeat in range(repeats):
        for name in list(ways)[:: -1 if repeat % 2 else 1]:
            found[name].append(_seconds(ways[name], device, CLOCKS[clock]))
    return Times(found)


def _seconds(way: Way, device: str, clock: Clock) -> float:
    with way.around():
        gc.collect()
        machine.synchronize(device)
        started = clock()
        way.run()
        machine.synchronize(device)
        return clock() - started
