# SPDX-License-Identifier: Apache-2.0
"""Several edits of one picture at once, by LoRAs that were merged in several ways, against one edit after the other.

    COMFYUI_PATH=/path/to/ComfyUI python benchmarks/edits/train_edits.py     # once
    COMFYUI_PATH=/path/to/ComfyUI python benchmarks/edits/run.py

Prints a table for three LoRAs that put something on a thing and for three that change the whole picture.
"""

from __future__ import annotations

import argparse
import logging
import platform
import sys
from collections.abc import Mapping, Sequence
from math import isnan
from pathlib import Path
from statistics import fmean

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "fidelity")]

import editbed  # noqa: E402
import edits  # noqa: E402
import merges  # noqa: E402
import torch  # noqa: E402
import world  # noqa: E402
from editbed import EditBed, Judge, Verdict  # noqa: E402
from PIL import Image, ImageDraw  # noqa: E402
from testbed import Deltas  # noqa: E402
from torch import Tensor  # noqa: E402

SETS = {"local": edits.LOCAL, "whole": edits.WHOLE}
ASKED = ("edits done", "all done", "error", "untouched")
HEAD = ("way", *ASKED, *(f"{column}, in turn" for column in ASKED), "each by itself")
SHOWN = (
    "one after the other",
    "stack 1.0",
    "stack 0.7",
    "TIES",
    "paper",
    "ours",
    "ours, own lines",
    "own lines, polished 100",
)
LABEL = 130  # pixels for the names of the ways


def measure(
    bed: EditBed, names: Sequence[str], steps: int, prompts: int, polish: Sequence[int], pictures: Path | None
) -> None:
    scenes = editbed.judged_scenes()
    judge, requests = Judge(bed, names, scenes), editbed.requests_for(names, scenes)
    seen = bed.latents([edits.Picture(scene) for scene in scenes])
    print(f"\n{' + '.join(names)}, {len(scenes)} pictures, {steps}x{prompts}\n")
    print(f"| {' | '.join(HEAD)} |\n|{'---|' * len(HEAD)}")
    drawn = {"one after the other": judge.serial}
    serial = judge.verdict(judge.serial)
    row("each LoRA in turn", serial, serial, 0.0)
    ways = {
        **merges.without_calibration(bed, names),
        **merges.calibrated(bed, names, steps, prompts, polish),
        **own_lines_polished(bed, names, steps, prompts, polish),
    }
    del ways["NP-LoRA"]  # the plain stack, as there is no style
    for way, deltas in ways.items():
        drawn[way] = bed.edited(requests, seen, deltas)
        in_turn = judge.verdict(bed.one_after_the_other(names, scenes, deltas))
        alone = fmean(velocity for velocity, _ in bed.errors(deltas, bed.asks(names), images=False).values())
        row(way, judge.verdict(drawn[way]), in_turn, alone)
    if pictures:
        pictures.mkdir(parents=True, exist_ok=True)
        shown = {"before": seen, **{way: latents for way, latents in drawn.items() if way in SHOWN}}
        sheet(bed, shown).save(pictures / f"{'-'.join(names)}.png")


def own_lines_polished(
    bed: EditBed, names: Sequence[str], steps: int, prompts: int, amounts: Sequence[int]
) -> dict[str, Deltas]:
    """The merge with prompts that ask for all of them, after SSR Polish."""
    starts = {"own lines": (merges.statistics(bed, names, steps, prompts, own=4), None, amounts)}
    return merges.taught(bed, names, steps, prompts, starts, bed.combinations(names))


def row(way: str, at_once: Verdict, in_turn: Verdict, alone: float) -> None:
    cells = [f"{one.done:.2f} | {one.all_done:.2f} | {one.error:.3f} | {_levels(one)}" for one in (at_once, in_turn)]
    print(f"| {way} | {' | '.join(cells)} | {alone:.3f} |", flush=True)


def _levels(verdict: Verdict) -> str:
    return "-" if isnan(verdict.untouched) else f"{verdict.untouched:.1f}"


def sheet(bed: EditBed, shown: Mapping[str, Tensor]) -> Image.Image:
    """A row for each way with its name, eight pictures wide."""
    rows = [torch.cat(list(bed.space.decode(latents[:8])), dim=2) for latents in shown.values()]
    pixels = (torch.cat(rows, dim=1).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    found = Image.new("RGB", (pixels.shape[1] + LABEL, pixels.shape[0]), "white")
    found.paste(Image.fromarray(pixels), (LABEL, 0))
    for number, way in enumerate(shown):
        ImageDraw.Draw(found).text((8, (number + 0.5) * world.SIZE), way, "black", anchor="lm")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--polish", nargs="*", type=int, default=(100,), help="for so many steps")
    parser.add_argument("--sets", nargs="*", choices=SETS, default=list(SETS), help="which three LoRAs")
    parser.add_argument("--pictures", type=Path, help="write some of the pictures here, as PNG")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, force=True)
    torch.set_grad_enabled(False)
    bed = EditBed()
    print(f"{platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    for chosen in args.sets:
        measure(bed, SETS[chosen], args.steps, args.prompts, args.polish, args.pictures)


if __name__ == "__main__":
    main()
