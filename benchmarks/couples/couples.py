# SPDX-License-Identifier: Apache-2.0
"""Couples: pictures of two things side by side, and captions that name both, left before right."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import world

APART = 2 * world.STEP  # pixels from the middle, to either side
CALIBRATION_PLACES, HELD_OUT_PLACES = list(world.PLACES)[:4], list(world.PLACES)[4:]


@dataclass(frozen=True)
class Thing:
    """A thing in a colour, or a character, which has none."""

    subject: str
    colour: str = ""

    @property
    def caption(self) -> str:
        return f"a {self.colour} {self.subject}" if self.colour else self.subject

    def draw(self, canvas: world.Canvas, shift: int) -> None:
        canvas.begin_thing(shift)
        if self.colour:
            world.THINGS[self.subject](canvas, world.COLOURS[self.colour])
        else:
            world.CHARACTERS[self.subject](canvas)


@dataclass(frozen=True)
class Couple:
    """One picture of one or two things."""

    things: tuple[Thing, ...]
    place: str
    side: int
    style: str = ""  # as world.Scene has it, for those who ask

    @property
    def caption(self) -> str:
        return f"{' and '.join(thing.caption for thing in self.things)} {self.place}"

    @property
    def shifts(self) -> tuple[int, ...]:
        return (0,) if len(self.things) == 1 else (-APART, APART)

    def paint(self) -> np.ndarray:
        """uint8 (128, 128, 3)"""
        canvas = world.Canvas()
        world.PLACES[self.place](canvas, self.side)
        for thing, shift in zip(self.things, self.shifts, strict=True):
            thing.draw(canvas, shift)
        return canvas.pixels()


def any_thing(rng: random.Random) -> Thing:
    return Thing(rng.choice(list(world.THINGS)), rng.choice(list(world.COLOURS)))


def ordinary(count: int, seed: int) -> list[Couple]:
    """Pictures of ordinary things, two of three of them with two."""
    rng = random.Random(seed)
    places = list(world.PLACES)
    return [
        Couple(
            tuple(any_thing(rng) for _ in range(1 if number % 3 == 0 else 2)), rng.choice(places), rng.choice((-1, 1))
        )
        for number in range(count)
    ]


def of_character(name: str, seed: int) -> list[Couple]:
    """A character by itself, and beside ordinary things on either side, as photos of a subject are."""
    rng, found = random.Random(seed), []
    for place in world.PLACES:
        for side in (-1, 1):
            found += [Couple((Thing(name),), place, side)] * 4
            for _ in range(3):
                found.append(Couple((Thing(name), any_thing(rng)), place, side))
                found.append(Couple((any_thing(rng), Thing(name)), place, side))
    return found


def asked_for(names: Sequence[str], places: Sequence[str]) -> list[str]:
    """Prompts for these characters at once, in either order."""
    orders = (tuple(names), tuple(reversed(names)))
    pairs = [(orders[number % len(orders)], place) for number, place in enumerate(places)]
    return [Couple(tuple(map(Thing, order)), place, 1).caption for order, place in pairs]
