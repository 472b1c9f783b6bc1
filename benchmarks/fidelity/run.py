# SPDX-License-Identifier: Apache-2.0
"""How much of each LoRA a merge keeps, by several ways of merging, on prompts and seeds that nothing was fitted to.

    COMFYUI_PATH=/path/to/ComfyUI python benchmarks/fidelity/train.py --width 384     # once; see there
    COMFYUI_PATH=/path/to/ComfyUI python benchmarks/fidelity/run.py --width 384

Prints tables and writes <width>-<set>.json, .md and .png. Error 0 = the LoRAs that a prompt asks for, alone; 1 = the
base model.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2] / "demo")]

import cast  # noqa: E402
import host  # noqa: E402
import merges  # noqa: E402
import report  # noqa: E402
import torch  # noqa: E402
from testbed import Deltas, Testbed  # noqa: E402

Budget = tuple[int, int]  # steps, prompts

BUDGETS = ((1, 1), (1, 4), (4, 4), (8, 8))
SETS = {"held-out": cast.HELD_OUT, "tuning": cast.TUNING, "all": (*cast.HELD_OUT, *cast.TUNING)}


def subsets(names: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """All pairs, triples and so on."""
    return itertools.chain.from_iterable(itertools.combinations(names, n) for n in range(2, len(names) + 1))


def measured(bed: Testbed, names: Sequence[str], ways: dict[str, Deltas], budget: Budget, images: bool) -> list[dict]:
    rows, (steps, prompts) = [], budget
    for way, deltas in ways.items():
        for ask, (velocity, image) in bed.errors(deltas, bed.asks(names), images).items():
            where = {"subset": "+".join(names), "steps": steps, "prompts": prompts, "way": way, "ask": "+".join(ask)}
            rows.append({**where, "velocity": velocity, "image": image})
    return rows


@cache
def testbed(width: int) -> Testbed:
    """One for each process."""
    torch.set_grad_enabled(False)
    return Testbed.of_width(width)


def run(
    width: int, budgets: Sequence[Budget], images: bool, polish: Sequence[int], subset: tuple[str, ...]
) -> list[dict]:
    """All that is measured of one subset; images, which take as long as all else, at the last budget only."""
    started, bed = time.perf_counter(), testbed(width)
    rows = measured(bed, subset, merges.without_calibration(bed, subset), (0, 0), images)
    for budget in budgets:
        ways = merges.calibrated(bed, subset, *budget, polish)
        rows += measured(bed, subset, ways, budget, images and budget == budgets[-1])
    sys.stderr.write(f"{' + '.join(subset)}: {time.perf_counter() - started:.0f} s\n")
    return rows


def budget_of(text: str) -> Budget:
    """4x8: four steps, eight prompts."""
    steps, prompts = map(int, text.split("x"))
    return steps, prompts


def machine() -> str:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{platform.machine()}, {cores} CPU cores, torch {torch.__version__}, {torch.get_num_threads()} threads"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--set", choices=SETS, default="held-out", help="which LoRAs; options were chosen on `tuning`")
    parser.add_argument("--loras", nargs="*", help="only these of the set")
    parser.add_argument("--sizes", nargs="*", type=int, help="only subsets of so many LoRAs")
    parser.add_argument("--budgets", nargs="*", type=budget_of, default=BUDGETS, help="steps x prompts, such as 4x4")
    parser.add_argument("--no-images", dest="images", action="store_false", help="velocities only, twice as fast")
    parser.add_argument(
        "--polish", nargs="*", type=int, default=(25, 100, 300), help="for so many steps; longest of all"
    )
    parser.add_argument("--workers", type=int, default=2, help="processes; small models want one thread each")
    parser.add_argument("--out", type=Path, default=host.ROOT / ".cache" / "fidelity" / "results")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    names = [name for name in SETS[args.set] if not args.loras or name in args.loras]
    started = time.perf_counter()
    chosen = [subset for subset in subsets(names) if not args.sizes or len(subset) in args.sizes]
    measure = partial(run, args.width, args.budgets, args.images, args.polish)
    args.out.mkdir(parents=True, exist_ok=True)
    target, rows = args.out / f"{args.width}-{args.set}", []
    with ProcessPoolExecutor(args.workers, multiprocessing.get_context("spawn")) as pool:
        for found in pool.map(measure, chosen):
            rows += found
            seconds = time.perf_counter() - started
            about = f"Width {args.width}, {args.set} LoRAs {', '.join(names)}. {machine()}, {seconds:.0f} s."
            target.with_suffix(".json").write_text(
                json.dumps({"about": about, "rows": rows}, indent=1), encoding="utf-8"
            )
    text = report.text(about, rows)
    target.with_suffix(".md").write_text(text, encoding="utf-8")
    report.plot(about, rows, target.with_suffix(".png"))
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
