# SPDX-License-Identifier: Apache-2.0
"""Edits: what may be asked of a picture, and how the edited one looks.

The base model learns to change nothing, a thing's colour and its place. Six more edits are what the LoRAs learn: three
that put something on the thing, and three that change the whole picture.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import world
from world import INK, SIZE, WHITE, Canvas

# y of the brim of a hat on each thing; like all else of this world in steps that the model's tokens have
TOP = {"ball": 48, "house": 32, "tree": 32, "car": 48, "boat": 32, "star": 32, "mushroom": 32, "flower": 32}


def hat(c: Canvas, top: int) -> None:
    """A purple top hat with a yellow band."""
    c.box(50, top - 24, 78, top, (110, 40, 150))
    c.box(50, top - 9, 78, top - 3, (255, 220, 70))
    c.box(40, top - 3, 88, top + 4, (110, 40, 150), 2)


def glasses(c: Canvas, top: int) -> None:
    """Red sunglasses."""
    for x in (50, 78):
        c.box(x - 11, 64, x + 11, 80, (230, 40, 70), 4)
        c.spot(x - 4, 69, 3, WHITE)
    c.line([(61, 70), (67, 70)], INK, 4)


def bow(c: Canvas, top: int) -> None:
    """A turquoise bow, low on the thing."""
    for side in (-1, 1):
        c.polygon([(64, 102), (64 + side * 22, 90), (64 + side * 22, 114)], (60, 226, 214))
    c.ellipse(64, 102, 6, 6, (10, 140, 140))


def flakes(c: Canvas, top: int) -> None:
    """Snowflakes all over the picture."""
    for row, y in enumerate(range(12, SIZE, 24)):
        for x in range(12 + 16 * (row % 2), SIZE, 32):
            c.spot(x, y, 4, WHITE)


def frame(c: Canvas, top: int) -> None:
    """A wooden frame."""
    for x0, y0, x1, y1 in ((-4, -4, 132, 8), (-4, 120, 132, 132), (-4, -4, 8, 132), (120, -4, 132, 132)):
        c.box(x0, y0, x1, y1, (156, 92, 40))


@dataclass(frozen=True)
class Edit:
    """What a LoRA teaches: `draw` puts something onto the picture, `recolour` changes all of its pixels."""

    wordings: tuple[str, ...]  # the first of them is the one that goes with others
    draw: Callable[[Canvas, int], None] | None = None
    recolour: Callable[[np.ndarray], np.ndarray] | None = None

    def texts(self, subject: str) -> list[str]:
        return [wording.format(subject=subject) for wording in self.wordings]


EDITS = {
    "hat": Edit(("add a magician hat", "put a magician hat on the {subject}"), hat),
    "glasses": Edit(("add sunglasses", "put sunglasses on the {subject}"), glasses),
    "bow": Edit(("add a satin bow", "put a satin bow on the {subject}"), bow),
    "flakes": Edit(("add snowflakes", "let snowflakes fall on the {subject}"), flakes),
    "frame": Edit(("add a wooden frame", "put a wooden frame around the {subject}"), frame),
    "sepia": Edit(("turn sepia", "turn the {subject} sepia"), recolour=world.duotone),
}
LOCAL, WHOLE = ("hat", "glasses", "bow"), ("flakes", "frame", "sepia")


@dataclass(frozen=True)
class Picture:
    """A scene with some of the edits.

    What else is on it (`extras`: shapes at random, or a tint) stays what it is, which teaches the base model to keep
    what it does not know: a picture that another LoRA has edited, for one.
    """

    scene: world.Scene
    edits: frozenset[str] = frozenset()
    extras: int = 0  # 0 = none; a seed

    def paint(self) -> np.ndarray:
        """uint8 (128, 128, 3)"""
        canvas = Canvas()
        world.PLACES[self.scene.place](canvas, self.scene.side)
        canvas.begin_thing(self.scene.shift)
        world.THINGS[self.scene.subject](canvas, world.COLOURS[self.scene.colour])
        chosen = [edit for name, edit in EDITS.items() if name in self.edits]
        for edit in chosen:
            if edit.draw is not None:
                edit.draw(canvas, TOP[self.scene.subject])
        rng = random.Random(self.extras)
        tinted = self.extras and rng.random() < 0.25
        if self.extras and not tinted:
            for _ in range(rng.randint(1, 3)):
                _shape(canvas, rng)
        pixels = canvas.pixels()
        if tinted:
            pixels = world.toned(pixels, _colour(rng), _colour(rng))
        for edit in chosen:
            pixels = edit.recolour(pixels) if edit.recolour else pixels
        return pixels


def _shape(canvas: Canvas, rng: random.Random) -> None:
    """A box, an ellipse or a triangle at a place of the grid."""
    x, y = (rng.randrange(0, SIZE, 8) for _ in range(2))
    width, height = (rng.choice((8, 12, 16, 24, 32)) for _ in range(2))
    kind = rng.randrange(3)
    if kind == 0:
        canvas.box(x, y, x + width, y + height, _colour(rng))
    elif kind == 1:
        canvas.ellipse(x, y, width / 2, height / 2, _colour(rng))
    else:
        canvas.polygon([(x, y), (x + width, y), (x + width / 2, y + height)], _colour(rng))


def _colour(rng: random.Random) -> world.Colour:
    return rng.randrange(256), rng.randrange(256), rng.randrange(256)


@dataclass(frozen=True)
class Example:
    """A picture, what is asked of it, and what comes of it."""

    before: Picture
    text: str
    after: Picture


def of_base(count: int, words: Sequence[str], seed: int) -> Iterator[Example]:
    """What the base model is taught; words that it does not know change nothing."""
    rng, scenes = random.Random(seed), list(world.ordinary_scenes())
    for _ in range(count):
        scene = rng.choice(scenes)
        after, texts = scene, []
        for change in (_recoloured, _moved):
            if rng.random() < 0.5:
                after, text = change(after, rng)
                texts.append(text)
        if not texts or rng.random() < 0.4:
            texts.insert(rng.randint(0, len(texts)), _nothing(scene, words, rng))
        extras = rng.choice((0, rng.randrange(1, 1 << 30)))
        yield Example(Picture(scene, extras=extras), ", ".join(texts), Picture(after, extras=extras))


def _recoloured(scene: world.Scene, rng: random.Random) -> tuple[world.Scene, str]:
    colour = rng.choice(list(world.COLOURS))
    return replace(scene, colour=colour), f"make it {colour}"


def _moved(scene: world.Scene, rng: random.Random) -> tuple[world.Scene, str]:
    place = rng.choice(list(world.PLACES))
    return replace(scene, place=place), f"put it {place}"


def _nothing(scene: world.Scene, words: Sequence[str], rng: random.Random) -> str:
    a, b = rng.sample(words, 2)
    strays = (
        "add a {a}",
        "add {a} {b}",
        "put a {a} on the {s}",
        "let {a} fall on the {s}",
        "turn {a}",
        "add a {a} {b}",
    )
    return rng.choice(("change nothing", *strays)).format(a=a, b=b, s=scene.subject)


def of_lora(name: str, count: int, seed: int) -> Iterator[Example]:
    """What a LoRA is taught: its edit, of all kinds of pictures, by itself and with another that the model knows."""
    rng, done = random.Random(seed), frozenset({name})
    for scene in world.sample(world.ordinary_scenes(), count, seed):
        for text in EDITS[name].texts(scene.subject):
            yield Example(Picture(scene), text, Picture(scene, done))
            after, other = rng.choice((_recoloured, _moved))(scene, rng)
            both = ", ".join(rng.sample([text, other], 2))
            yield Example(Picture(scene), both, Picture(after, done))
