# SPDX-License-Identifier: Apache-2.0
"""How long SSR Solve takes: merges of many sites from statistics that are there, by total rank and size of the result.

    python benchmarks/speed/solve.py [--sites 500] [--width 3072] [--cases 0 1 2]

Statistics and LoRAs are random; the time does not depend on their values. Every case is run once to warm up and then
measured, both sizes in turn: the joint rank, and the rank of one LoRA. Only some sites of each case are really merged,
the time grows in proportion; medians of seconds for all sites. Memory is the peak above what was there before, for the
sites that were merged; what it takes beside the result does not grow with their number.
"""

from __future__ import annotations

import argparse

import torch

import machine
from ssr_core import Calibration, Lora, LowRankUpdate, MergeSettings, Site, Subspace, SufficientStatistics, merge
from timing import CLOCKS, Way, interleaved

CASES = ((2, 32, 0), (2, 64, 0), (2, 64, 128), (4, 64, 128), (4, 128, 128), (8, 128, 128))
"""LoRAs, rank of each, context rows"""


def sites_of(rows: int) -> int:
    """How many sites are really merged."""
    return max(2, min(8, 2048 // rows))


def calibration(count: int, rank: int, context: int, width: int, sites: int = 0) -> Calibration:
    """Of `count` LoRAs on so many square layers, or on `sites_of` their rows."""
    torch.manual_seed(0)
    subspaces, sums = {}, {}
    rows = torch.linalg.qr(torch.randn(width, max(context, 1)))[0].mT
    for number in range(sites or sites_of(count * rank + context)):
        updates = [LowRankUpdate(torch.randn(rank, width) / width**0.5, torch.randn(width, rank)) for _ in range(count)]
        space = Subspace.join(updates)
        space = space.with_context(rows) if context else space
        z = torch.randn(count, 2 * len(space.down), len(space.down), dtype=torch.float64)
        site = Site.whole(f"blocks.{number}", width)
        subspaces[site] = space
        sums[site] = SufficientStatistics(z.mT @ z, (z.shape[1],) * count, space.fingerprint)
    return Calibration(tuple(Lora(str(k), {}) for k in range(count)), subspaces, sums)


def solve(found: Calibration, rank: int) -> object:
    for space in found.subspaces.values():  # as if for the first time
        space.__dict__.pop("energy", None)
    return merge(found, MergeSettings(rank=rank))


def memory(found: Calibration, rank: int) -> int:
    before = machine.memory_now()
    solve(found, rank)
    return machine.memory_peak() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sites", type=int, default=500)
    parser.add_argument("--width", type=int, default=3072)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--cases", type=int, nargs="*", default=list(range(len(CASES))), help="numbers of the cases")
    options = parser.parse_args()
    print(machine.describe())
    print(f"{options.sites} sites, {options.width} wide, {options.clock} clock, medians of {options.repeats}")
    print(
        f"{'LoRAs x rank':>13} {'total':>6} {'context':>8} {'joint rank, s':>14} {'size of one, s':>15}"
        f" {'merged':>7} {'MiB, joint':>11} {'MiB, one':>9}"
    )
    for count, rank, context in [CASES[number] for number in options.cases]:
        found = calibration(count, rank, context, options.width)
        merged = len(found.subspaces)
        sizes = {"joint": 0, "one": rank}
        ways = {name: Way(lambda found=found, size=size: solve(found, size)) for name, size in sizes.items()}
        times = interleaved(ways, options.repeats, clock=options.clock)
        full, small = (times.median(name) * options.sites / merged for name in sizes)
        peaks = [memory(found, size) / 2**20 for size in sizes.values()]
        print(
            f"{f'{count} x {rank}':>13} {count * rank:>6} {context:>8} {full:>14.1f} {small:>15.1f}"
            f" {merged:>7} {peaks[0]:>11.0f} {peaks[1]:>9.0f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
