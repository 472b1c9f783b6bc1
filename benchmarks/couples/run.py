# SPDX-License-Identifier: Apache-2.0
"""Two subjects in one picture: how often a merge draws both where they belong, against stacks and a LoRA on each half.

    COMFYUI_PATH=/path/to/ComfyUI python benchmarks/couples/train_couples.py    # once
    COMFYUI_PATH=/path/to/ComfyUI python benchmarks/couples/run.py

Judged by templates: of every thing and character of the world in every colour, the one that a half of the picture is
nearest to. A picture is right if both halves are what the prompt asks for.
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT / "benchmarks" / "fidelity"), str(ROOT / "demo")]

import host  # noqa: E402, I001

import cast  # noqa: E402
import comfy.sd  # noqa: E402
import couples  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import world  # noqa: E402
from couples import CALIBRATION_PLACES, HELD_OUT_PLACES, Couple, Thing, asked_for  # noqa: E402
from PIL import Image  # noqa: E402
from regional import BOTH, regional  # noqa: E402
from merges import without_context  # noqa: E402
from testbed import dense  # noqa: E402
from torch import Tensor  # noqa: E402
from train_couples import BASE, CHARACTERS, FOLDER, HELD_OUT, TUNING  # noqa: E402
from training import storage  # noqa: E402
from training.captions import Captions  # noqa: E402
from training.latents import PatchComponents  # noqa: E402

combination = host._part("nodes.reading.combination")

STEPS, SEEDS = 12, 8
BARE, ORACLE = "base", "each on its half (oracle)"
MARGIN = 4  # pixels in the middle that are not looked at: the two things meet there


class Bed:
    """The model that can draw two things, and ways to run it."""

    def __init__(self) -> None:
        self.patcher = comfy.sd.load_diffusion_model(str(FOLDER / f"{BASE}.safetensors"), {"dtype": torch.float32})
        self.model = self.patcher.model.diffusion_model.eval()
        self.modules = dict(self.patcher.model.named_modules())
        self.space = PatchComponents(**storage.load("components"))

    def task(self, name: str, prompts: Sequence[str]) -> Any:
        return host.nodes.task.Task(name, FOLDER / f"{name}.safetensors", 1.0, self.conditioning(prompts))

    def conditioning(self, prompts: Sequence[str]) -> list[Any]:
        encoded = Captions.encode(list(prompts))
        return [[t[None], {"pooled_output": p[None]}] for t, p in zip(encoded.tokens, encoded.pooled, strict=True)]

    @torch.no_grad()
    def draw(self, prompts: Sequence[str], steps: int = STEPS, first_seed: int = 500) -> Tensor:
        """A latent for each prompt, from noise that depends on its number only."""
        encoded = Captions.encode(list(prompts))
        x = torch.cat(
            [
                torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(first_seed + n))
                for n in range(len(prompts))
            ]
        )
        for sigma, following in pairwise(torch.linspace(1, 0, steps + 1)):
            x = x + self.model(x, sigma.expand(len(x)), encoded.tokens, y=encoded.pooled) * (following - sigma)
        return x

    def patched(self, deltas: Mapping[str, Tensor], run: Callable[[], Tensor]) -> Tensor:
        kept = {name: self.modules[name].weight.data for name in deltas}
        try:
            for name, delta in deltas.items():
                self.modules[name].weight.data = kept[name] + delta.reshape(kept[name].shape)
            return run()
        finally:
            for name, weight in kept.items():
                self.modules[name].weight.data = weight

    def pixels(self, latents: Tensor) -> np.ndarray:
        """uint8 (n, 128, 128, 3)"""
        return (self.space.decode(latents).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()


def candidates() -> list[Thing]:
    things = [Thing(name, colour) for name in world.THINGS for colour in world.COLOURS]
    return things + [Thing(name) for name in world.CHARACTERS]


def judge(pictures: np.ndarray, asked: Sequence[Couple]) -> tuple[float, float]:
    """(share of halves that are right, share of pictures with both right)"""
    table = np.array(
        [
            [_nearest(picture, couple.place, number) == thing for number, thing in enumerate(couple.things)]
            for picture, couple in zip(pictures, asked, strict=True)
        ]
    )
    return float(table.mean()), float(table.all(1).mean())


def _nearest(picture: np.ndarray, place: str, half: int) -> Thing:
    things, templates = _templates(place, half)
    errors = ((templates - picture[None, :, _columns(half)].astype(np.float32)) ** 2).mean((1, 2, 3))
    return things[int(errors.argmin())]


def _columns(half: int) -> slice:
    middle = world.SIZE // 2
    return slice(0, middle - MARGIN) if half == 0 else slice(middle + MARGIN, world.SIZE)


@cache
def _templates(place: str, half: int) -> tuple[list[Thing], np.ndarray]:
    """Everything that may stand in this half, in either lighting, (n, 128, columns, 3)."""
    things, found = [], []
    for thing in candidates():
        for side in (-1, 1):
            canvas = world.Canvas()
            world.PLACES[place](canvas, side)
            thing.draw(canvas, (-couples.APART, couples.APART)[half])
            things.append(thing)
            found.append(canvas.pixels()[:, _columns(half)].astype(np.float32))
    return things, np.stack(found)


# --- calibrating ---


def singles_of(name: str) -> list[str]:
    """By itself, and beside an ordinary thing, in the places of calibration."""
    subject = Thing(CHARACTERS[name])
    things = (Thing("house", "red"), Thing("ball", "blue"), Thing("tree", "green"), Thing("star", "yellow"))
    alone = [Couple((subject,), place, 1).caption for place in CALIBRATION_PLACES]
    beside = zip(things, CALIBRATION_PLACES, strict=False)
    return alone + [Couple((subject, thing), place, 1).caption for thing, place in beside]


def calibrated(bed: Bed, names: Sequence[str], joint: Sequence[str], refine: int, steps: int = 8) -> Any:
    """What SSR Collect Stats gathers, with prompts that ask for both if there are any."""
    nodes, ignore = host.nodes, lambda _: None
    tasks = [bed.task(name, singles_of(name)) for name in names]
    loaded = [nodes.patches.read_task(task, bed.patcher) for task in tasks]
    asked = [combination.Combination("all", bed.conditioning(joint))] if joint else []
    cases = nodes.case_prompts.cases_of(tasks, asked, 0)
    sampling = nodes.runs.Sampling(0, steps, "euler", "simple")
    runs = nodes.runs.plan(cases, sampling, host.CONTEXT, refine)
    found = nodes.diffusion_model.calibrate(bed.patcher, loaded, runs, host.LATENT, host.CONTEXT, ignore, ignore)
    return found[0], found[0].loras


def with_owners(bed: Bed, calibration: Any, loras: Sequence[Any], joint: Sequence[str], steps: int = 8) -> Any:
    """The statistics with a case more, in which each LoRA speaks on its half and both in the text."""
    core, cases = host.ssr_core, (*calibration.cases, host.ssr_core.Case((0, 1)))
    statistics = dict(calibration.statistics)
    for swapped in (False, True):  # every other prompt names the second one first, who then stands on the left
        collected: dict[str, list] = {}
        with regional(bed.patcher.model, loras[::-1] if swapped else loras, collected):
            bed.draw(joint[swapped::2], steps, first_seed=0)
        speakers = {0: int(swapped), 1: int(not swapped), BOTH: 2}
        for site, seen in statistics.items():
            statistics[site] = seen + _owned(
                core, calibration.subspaces[site], collected.get(site.module, ()), speakers
            )
    padded = {site: seen.padded(3) for site, seen in statistics.items()}
    return core.Calibration(calibration.loras, calibration.subspaces, padded, {}, cases)


def _owned(core: Any, space: Any, inputs: Sequence[Any], speakers: Mapping[int, int]) -> Any:
    """Sums over the tokens of each owner, as those of the case in which it speaks."""
    found = core.SufficientStatistics.empty(space)
    for owner, case in speakers.items():
        accumulator = core.Accumulator()
        for rows, owned in inputs:
            accumulator.update(rows[:, owned == owner].flatten(0, 1) @ space.down.float().mT)
        found = found + accumulator.compute(case, space)
    return found


def ways(bed: Bed, names: Sequence[str]) -> dict[str, Any]:
    """Differences of weights by name of the way; None: each LoRA on its half."""
    core = host.ssr_core
    joint = asked_for([CHARACTERS[name] for name in names], CALIBRATION_PLACES)
    plain, loras = calibrated(bed, names, (), 0)
    refined, _ = calibrated(bed, names, (), 1)
    together, _ = calibrated(bed, names, joint, 0)
    both, _ = calibrated(bed, names, joint, 1)
    one, other = names
    glued = [f"{singles_of(one)[0]}, {CHARACTERS[other]}", f"{singles_of(other)[2]}, {CHARACTERS[one]}"]
    default, _ = calibrated(bed, names, glued, 1)
    sums = [dense(lora.updates) for lora in loras]
    stack = {name: sum(one.get(name, 0) for one in sums) for name in {n for one in sums for n in one}}
    merged = {
        "paper's settings": core.merge(without_context(plain), core.MergeSettings.PAPER),
        "no joint prompts, unrefined": core.merge(plain),
        "no joint prompts": core.merge(refined),
        "joint prompts, unrefined": core.merge(together),
        "owners, unrefined": core.merge(with_owners(bed, plain, loras, joint)),
        "pairs of their own prompts, refined": core.merge(default),
        "joint prompts": core.merge(both),
    }
    return {
        BARE: {},
        ORACLE: loras,
        "stack 1.0": stack,
        "stack 0.7": {name: 0.7 * delta for name, delta in stack.items()},
        **{name: dense(found.updates) for name, found in merged.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=Path, help="write the drawn pictures of every way here, as PNG")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    cast.join_world()
    bed = Bed()
    print(f"{platform.machine()}, torch {torch.__version__}; {SEEDS} seeds, places not calibrated in")
    for label, names in (("tuning", TUNING), ("held out", HELD_OUT)):
        things = [Thing(CHARACTERS[name]) for name in names]
        asked = [
            Couple(tuple(order), place, 1)
            for place in HELD_OUT_PLACES
            for order in (things, things[::-1])
            for _ in range(SEEDS)
        ]
        print(f"\n{' + '.join(names)} ({label}), {len(asked)} pictures\n")
        print("| way | halves right | both right | error against the oracle |\n|---|---|---|---|")
        found = ways(bed, names)
        oracle, base = (bed.pixels(_drawn(bed, found[way], asked)).astype(np.float32) for way in (ORACLE, BARE))
        for way, deltas in found.items():
            pictures = bed.pixels(_drawn(bed, deltas, asked))
            halves, both = judge(pictures, asked)
            error = ((pictures - oracle) ** 2).mean() / ((base - oracle) ** 2).mean()
            print(f"| {way} | {halves:.2f} | {both:.2f} | {error:.3f} |", flush=True)
            if args.pictures:
                args.pictures.mkdir(parents=True, exist_ok=True)
                sheet = np.concatenate(list(pictures[:: SEEDS // 2]), axis=1)
                Image.fromarray(sheet).save(args.pictures / f"{'-'.join(names)} {way}.png")


def _drawn(bed: Bed, deltas: Any, asked: Sequence[Couple]) -> Tensor:
    prompts = [couple.caption for couple in asked]
    if isinstance(deltas, dict):
        return bed.patched(deltas, lambda: bed.draw(prompts))
    order = [deltas if couple.things[0].subject == asked[0].things[0].subject else deltas[::-1] for couple in asked]
    parts = []
    for number, (prompt, loras) in enumerate(zip(prompts, order, strict=True)):
        with regional(bed.patcher.model, loras):
            parts.append(bed.draw([prompt], first_seed=500 + number))
    return torch.cat(parts)


if __name__ == "__main__":
    main()
