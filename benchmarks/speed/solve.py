"""How long SSR Solve takes: merges of many sites from statistics that are there, by total rank and size of the result.

    python benchmarks/speed/solve.py [--sites 500] [--width 3072]

Statistics and LoRAs are random; the time does not depend on their values. Every case is run once to warm up and three
times to measure, interleaved; the table has medians of seconds for all sites.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from ssr_core import Calibration, Lora, LowRankUpdate, MergeSettings, Site, Subspace, SufficientStatistics, merge

MEASURED = 20  # sites of each case that are really merged; the time grows in proportion
CASES = ((2, 32, 0), (2, 64, 0), (2, 64, 128), (4, 32, 128), (8, 32, 128))  # LoRAs, rank of each, context rows


def calibration(count: int, rank: int, context: int, width: int) -> Calibration:
    """Of `count` LoRAs on MEASURED square layers."""
    torch.manual_seed(0)
    subspaces, sums = {}, {}
    rows = torch.linalg.qr(torch.randn(width, max(context, 1)))[0].mT
    for number in range(MEASURED):
        updates = [LowRankUpdate(torch.randn(rank, width) / width**0.5, torch.randn(width, rank)) for _ in range(count)]
        space = Subspace.join(updates)
        space = space.with_context(rows) if context else space
        z = torch.randn(count, 2 * len(space.down), len(space.down), dtype=torch.float64)
        site = Site.whole(f"blocks.{number}", width)
        subspaces[site] = space
        sums[site] = SufficientStatistics(z.mT @ z, (z.shape[1],) * count, space.fingerprint)
    return Calibration(tuple(Lora(str(k), {}) for k in range(count)), subspaces, sums)


def seconds(found: Calibration, rank: int) -> float:
    for space in found.subspaces.values():  # as if for the first time
        space.__dict__.pop("energy", None)
    started = time.perf_counter()
    merge(found, MergeSettings(rank=rank))
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sites", type=int, default=500)
    parser.add_argument("--width", type=int, default=3072)
    options = parser.parse_args()
    threads = f"{torch.get_num_threads()} threads"
    print(
        f"{platform.machine()}, {threads}, torch {torch.__version__}, CPU; {options.sites} sites, {options.width} wide"
    )
    print(f"{'LoRAs x rank':>14} {'context':>8} {'full rank, s':>13} {'size of one, s':>15}")
    for count, rank, context in CASES:
        found = calibration(count, rank, context, options.width)
        times: dict[int, list[float]] = {0: [], rank: []}
        for _ in range(4):
            for result in times:
                times[result].append(seconds(found, result))
        full, small = (statistics.median(times[r][1:]) * options.sites / MEASURED for r in (0, rank))
        print(f"{f'{count} x {rank}':>14} {context:>8} {full:>13.1f} {small:>15.1f}")


if __name__ == "__main__":
    main()
