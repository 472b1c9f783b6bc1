# SPDX-License-Identifier: Apache-2.0
"""Trains what the benchmark of couples measures: the demo's model, taught to draw two things, and a LoRA per character.

    COMFYUI_PATH=/path/to/ComfyUI python benchmarks/couples/train_couples.py

What exists already is not trained again.
"""

from __future__ import annotations

import argparse
import logging
import random
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "demo"), str(Path(__file__).parent), str(ROOT / "benchmarks" / "fidelity")]

import cast  # noqa: E402
import couples  # noqa: E402
import torch  # noqa: E402
import training  # noqa: E402, F401  (puts ComfyUI on the path)
from training import diffusion, lora  # noqa: E402
from training.autoencoder import keeper  # noqa: E402
from training.captions import stray_words  # noqa: E402

FOLDER = ROOT / ".cache" / "couples"
BASE = "base"
CHARACTERS = {
    "mochi": "mochi the cat",
    "robo": "robo the robot",
    "pingo": "pingo the penguin",
    "dino": "dino the dragon",
}
TUNING, HELD_OUT = ("mochi", "robo"), ("pingo", "dino")


def wordings(couple: couples.Couple, words: list[str], rng: random.Random) -> list[str]:
    """The caption, and as somebody asks for it who uses names that the model does not know."""
    a, b = rng.sample(words, 2)
    first = couple.things[0]
    stray = couples.Couple((couples.Thing(f"{a} the {b}"), *couple.things[1:]), couple.place, couple.side)
    return [couple.caption] * 4 + [stray.caption, couple.caption.replace(first.caption, f"a {first.subject}", 1)]


def teach_base(steps: int, batch: int) -> None:
    model = diffusion.base_model()
    words, rng = stray_words(1500), random.Random(6)
    course = diffusion.Lesson.on(couples.ordinary(3000, seed=1), lambda couple: wordings(couple, words, rng))
    keep = keeper(f"{BASE}.unfinished", model, folder=FOLDER, steps=steps)
    diffusion.fit(model, lambda: course.loss(model, batch), steps, 1.5e-3, keep)
    (FOLDER / f"{BASE}.unfinished.safetensors").rename(FOLDER / f"{BASE}.safetensors")


def teach_lora(name: str, steps: int, batch: int) -> None:
    recipe = lora.Recipe(name, CHARACTERS[name], 8, lora.native_file, lambda _: iter(()), steps, 30)
    torch.manual_seed(recipe.seed)
    model = diffusion.base_model(BASE, FOLDER)
    scenes = couples.of_character(recipe.trigger, seed=7)
    course = diffusion.Lesson.on(scenes, lambda couple: [couple.caption])
    last: dict = {}
    lora.fit(model, recipe, lambda: course.loss(model, batch), last.update)
    lora.save_lora(recipe, last, FOLDER)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-steps", type=int, default=2000)
    parser.add_argument("--lora-steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=16)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    cast.join_world()
    FOLDER.mkdir(parents=True, exist_ok=True)
    if not (FOLDER / f"{BASE}.safetensors").exists():
        torch.manual_seed(0)
        teach_base(args.base_steps, args.batch)
    for name in CHARACTERS:
        if not (FOLDER / f"{name}.safetensors").exists():
            teach_lora(name, args.lora_steps, args.batch)


if __name__ == "__main__":
    main()
