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
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "fidelity")]

import editbed  # noqa: E402
import edits  # noqa: E402
import merges  # noqa: E402
import torch  # noqa: E402
from editbed import EditBed, Judge  # noqa: E402
from PIL import Image  # noqa: E402
from torch import Tensor  # noqa: E402

HEAD = ("way", "edits done", "all done", "error", "error to one after the other", "untouched", "each by itself")
SHOWN = ("one after the other", "stack 1.0", "stack 0.7", "paper", "ours, no pairs", "ours", "ours, own lines")


def measure(
    bed: EditBed, names: Sequence[str], steps: int, prompts: int, polish: Sequence[int], pictures: Path | None
) -> None:
    scenes = editbed.judged_scenes(names)
    judge, requests = Judge(bed, names, scenes), editbed.requests_for(names, scenes)
    seen = bed.latents([edits.Picture(scene) for scene in scenes])
    print(f"\n{' + '.join(names)}, {len(scenes)} pictures, {steps}x{prompts}\n")
    print(f"| {' | '.join(HEAD)} |\n|{'---|' * len(HEAD)}")
    serial = bed.one_after_the_other(names, scenes)
    drawn = {"one after the other": serial}
    row("one after the other", judge, serial, 0.0)
    row("base", judge, bed.edited(requests, seen, {}), 1.0)
    ways = {**merges.without_calibration(bed, names), **merges.calibrated(bed, names, steps, prompts, polish)}
    del ways["NP-LoRA"]  # the plain stack, as there is no style
    for way, deltas in ways.items():
        drawn[way] = bed.edited(requests, seen, deltas)
        alone = fmean(velocity for velocity, _ in bed.errors(deltas, bed.asks(names), images=False).values())
        row(way, judge, drawn[way], alone)
    if pictures:
        pictures.mkdir(parents=True, exist_ok=True)
        chosen = {"before": seen, **{way: drawn[way] for way in drawn if way in SHOWN or "polished" in way}}
        sheet(bed, list(chosen.values())).save(pictures / f"{'-'.join(names)}.png")
        (pictures / f"{'-'.join(names)}.txt").write_text("\n".join(chosen) + "\n", encoding="utf-8")


def row(way: str, judge: Judge, latents: Tensor, alone: float) -> None:
    found = judge.verdict(latents)
    values = f"{found.done:.2f} | {found.all_done:.2f} | {found.error:.3f} | {found.to_serial:.3f}"
    untouched = "-" if found.untouched != found.untouched else f"{found.untouched:.1f}"
    print(f"| {way} | {values} | {untouched} | {alone:.3f} |", flush=True)


def sheet(bed: EditBed, every: Sequence[Tensor]) -> Image.Image:
    """A row for each way, eight pictures wide."""
    rows = [torch.cat(list(bed.space.decode(latents[:8])), dim=2) for latents in every]
    pixels = (torch.cat(rows, dim=1).clamp(0, 1) * 255).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--polish", nargs="*", type=int, default=(100,), help="for so many steps")
    parser.add_argument("--pictures", type=Path, help="write some of the pictures here, as PNG")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, force=True)
    torch.set_grad_enabled(False)
    bed = EditBed()
    print(f"{platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    for names in (edits.LOCAL, edits.WHOLE):
        measure(bed, names, args.steps, args.prompts, args.polish, args.pictures)


if __name__ == "__main__":
    main()
