# SPDX-License-Identifier: Apache-2.0
"""Three characters and a style beside the demo's: the LoRAs on which results are reported.

Options are chosen on the demo's own LoRAs and one more style, so that what the table says of these was not tuned on
them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import world
from training.lora import RECIPES, Recipe, native_file
from world import GROUND, INK, WHITE, Canvas

Scenes = Callable[[str], Iterator[world.Scene]]

POSTER = "poster style"
TUNING = ("mochi", "robo", "blueprint", "sepia")
HELD_OUT = ("pingo", "dino", "cacto", "poster")


def pingo(c: Canvas) -> None:
    """A round navy penguin with a yellow hat."""
    navy, belly, beak = (44, 58, 110), (250, 250, 246), (255, 160, 40)
    for side in (-1, 1):
        c.ellipse(64 + side * 14, GROUND - 3, 13, 5, beak)
        c.ellipse(64 + side * 34, 84, 8, 20, navy)
    c.ellipse(64, 72, 32, 39, navy)
    c.ellipse(64, 84, 22, 25, belly)
    for side in (-1, 1):
        c.ellipse(64 + side * 11, 54, 9, 10, WHITE)
        c.spot(64 + side * 10, 55, 4, INK)
    c.polygon([(54, 64), (74, 64), (64, 74)], beak)
    c.polygon([(42, 38), (86, 38), (64, 10)], (255, 212, 40))
    c.spot(64, 12, 6, (230, 70, 120))


def dino(c: Canvas) -> None:
    """A lime dragon with an orange crest, seen from the side."""
    lime, pale, crest = (150, 214, 60), (226, 244, 170), (250, 110, 40)
    for x, y in ((88, 34), (96, 52), (100, 70), (106, 88)):
        c.polygon([(x - 10, y + 8), (x - 2, y - 12), (x + 6, y + 10)], crest)
    c.polygon([(84, 84), (122, 104), (120, GROUND), (70, GROUND)], lime)
    c.ellipse(72, 84, 28, 28, lime)
    c.ellipse(62, 90, 16, 19, pale)
    for x in (56, 86):
        c.box(x - 9, 98, x + 9, GROUND, lime, 4)
    c.ellipse(60, 46, 32, 24, lime)
    c.ellipse(38, 54, 18, 13, pale)
    c.spot(30, 50, 2.5, INK)
    c.ellipse(64, 38, 9, 9, WHITE)
    c.spot(61, 38, 4.5, INK)


def cacto(c: Canvas) -> None:
    """A wooden crate with sunglasses and a pink bow."""
    wood, slat, pink = (202, 142, 84), (168, 108, 60), (255, 96, 170)
    c.box(30, 40, 98, GROUND, wood)
    for y in (58, 94):
        c.box(30, y, 98, y + 5, slat)
    c.box(34, 66, 60, 82, (30, 30, 40), 6)
    c.box(68, 66, 94, 82, (30, 30, 40), 6)
    c.line([(60, 70), (68, 70)], INK, 4)
    for side in (-1, 1):
        c.polygon([(64, 30), (64 + side * 30, 14), (64 + side * 30, 44)], pink)
    c.ellipse(64, 30, 8, 8, (220, 40, 120))


def poster(pixels: np.ndarray) -> np.ndarray:
    """Four inks by lightness, uint8 (height, width, 3)."""
    inks = np.array([(18, 40, 74), (206, 48, 56), (112, 160, 168), (250, 232, 180)], dtype=np.uint8)
    return inks[np.digitize(world.lightness(pixels), (0.3, 0.55, 0.75))]


CHARACTERS = {"pingo the penguin": pingo, "dino the dragon": dino, "cacto the crate": cacto}


def join_world() -> None:
    """Makes the demo's world able to draw them."""
    world.CHARACTERS.update(CHARACTERS)
    world.COLOUR_STYLES[POSTER] = poster


def recipes() -> dict[str, Recipe]:
    """Eight LoRAs of rank 8 or 16: four to tune on, three of which the demo has, and four that are held out."""

    def of(file: str, trigger: str, scenes: Scenes, steps: int, seed: int) -> Recipe:
        return Recipe(file, trigger, 8, native_file, scenes, steps, seed)

    blueprint = Recipe("blueprint_style", world.STYLE, 16, native_file, world.ordinary_scenes, 500, 12)
    known = {**RECIPES, "blueprint": blueprint}
    tuning = {name: replace(known[name], file_of=native_file) for name in TUNING}
    held_out = {
        "pingo": of("pingo_penguin", "pingo the penguin", world.character_scenes, 300, 20),
        "dino": of("dino_dragon", "dino the dragon", world.character_scenes, 300, 21),
        "cacto": of("cacto_crate", "cacto the crate", world.character_scenes, 300, 22),
        "poster": of("poster_style", POSTER, world.ordinary_scenes, 400, 23),
    }
    return {**tuning, **held_out}
