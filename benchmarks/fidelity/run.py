# SPDX-License-Identifier: Apache-2.0
"""How much of each LoRA a merge keeps, by several ways of merging, on prompts and seeds that nothing was fitted to.

    COMFYUI_PATH=/path/to/ComfyUI python benchmarks/fidelity/train.py --width 384     # once; see there
    COMFYUI_PATH=/path/to/ComfyUI python benchmarks/fidelity/run.py --width 384

Prints a table and writes <width>-<set>.json, .md and .png beside it. Error 0 = the LoRA alone, 1 = the base model.
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

BUDGETS = ((1, 1), (1, 4), (4, 4), (8, 8))  # steps x prompts
SETS = {"held-out": cast.HELD_OUT, "tuning": cast.TUNING}


def subsets(names: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """All pairs, triples and so on."""
    return itertools.chain.from_iterable(itertools.combinations(names, n) for n in range(2, len(names) + 1))


def measured(bed: Testbed, names: Sequence[str], ways: dict[str, Deltas], steps: int, prompts: int) -> list[dict]:
    rows, images = [], (steps, prompts) in ((0, 0), BUDGETS[-1])  # they take as long as all else
    for way, deltas in ways.items():
        for name, (velocity, image) in bed.errors(deltas, names, images).items():
            where = {"subset": "+".join(names), "steps": steps, "prompts": prompts, "way": way, "lora": name}
            rows.append({**where, "velocity": velocity, "image": image})
    return rows


@cache
def testbed(width: int) -> Testbed:
    """One for each process."""
    torch.set_grad_enabled(False)
    return Testbed(width)


def run(width: int, subset: tuple[str, ...]) -> list[dict]:
    """All that is measured of one subset."""
    started, bed = time.perf_counter(), testbed(width)
    rows = measured(bed, subset, merges.without_calibration(bed, subset), 0, 0)
    for steps, prompts in BUDGETS:
        calibration = merges.calibrated(bed, subset, steps, prompts)
        rows += measured(bed, subset, merges.routed(calibration, subset, bed), steps, prompts)
    sys.stderr.write(f"{' + '.join(subset)}: {time.perf_counter() - started:.0f} s\n")
    return rows


def machine() -> str:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{platform.machine()}, {cores} CPU cores, torch {torch.__version__}, {torch.get_num_threads()} threads"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--set", choices=SETS, default="held-out", help="which LoRAs; options were chosen on `tuning`")
    parser.add_argument("--loras", nargs="*", help="only these of the set")
    parser.add_argument("--workers", type=int, default=2, help="processes; small models want one thread each")
    parser.add_argument("--out", type=Path, default=host.ROOT / ".cache" / "fidelity" / "results")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    names = [name for name in SETS[args.set] if not args.loras or name in args.loras]
    started = time.perf_counter()
    with ProcessPoolExecutor(args.workers, multiprocessing.get_context("spawn")) as pool:
        rows = list(itertools.chain(*pool.map(partial(run, args.width), subsets(names))))
    about = (
        f"Width {args.width}, {args.set} LoRAs {', '.join(names)}. {machine()}, {time.perf_counter() - started:.0f} s."
    )
    args.out.mkdir(parents=True, exist_ok=True)
    target = args.out / f"{args.width}-{args.set}"
    target.with_suffix(".json").write_text(json.dumps({"about": about, "rows": rows}, indent=1), encoding="utf-8")
    text = report.text(about, rows)
    target.with_suffix(".md").write_text(text, encoding="utf-8")
    report.plot(about, rows, target.with_suffix(".png"))
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
