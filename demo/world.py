# SPDX-License-Identifier: Apache-2.0
"""A small illustrated world: captions and 128 x 128 pictures that follow from a few choices and nothing else.

A picture is a place, something standing in it, and the canvas that paints both. Things and places are what the base
model learns; the two characters and the blueprint canvas are what the LoRAs learn. Everything moves in steps of 16
pixels, the size of one of the model's tokens: a model this small draws sharply because it meets few distinct tokens.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

SIZE = 128
OVERSAMPLING = 4
STEP = 16
GROUND = 112  # y of the line that things stand on

Colour = tuple[int, int, int]
Point = tuple[float, float]

INK: Colour = (38, 32, 56)
WHITE: Colour = (255, 255, 255)
COLOURS: dict[str, Colour] = {
    "red": (226, 58, 52),
    "orange": (247, 143, 38),
    "yellow": (252, 212, 56),
    "green": (58, 170, 84),
    "blue": (54, 112, 224),
    "purple": (142, 80, 200),
    "pink": (250, 136, 178),
    "white": (246, 246, 250),
}


def mixed(a: Colour, b: Colour, share: float) -> Colour:
    """(1 - share) a + share b"""
    red, green, blue = (round((1 - share) * x + share * y) for x, y in zip(a, b, strict=True))
    return red, green, blue


class Canvas:
    """A painter with two pens: scenery is flat colour, a thing has an ink outline. Coordinates are picture pixels."""

    def __init__(self) -> None:
        side = SIZE * OVERSAMPLING
        self.image = Image.new("RGB", (side, side))
        self.draw = ImageDraw.Draw(self.image)
        self.shift = 0
        self.drawing_thing = False

    def begin_thing(self, shift: int) -> None:
        self.shift, self.drawing_thing = shift, True

    def sky(self, top: Colour, bottom: Colour, end: int = SIZE) -> None:
        for y in range(end):
            self.draw.rectangle(self._scaled([(0, y), (SIZE, y + 1)]), fill=mixed(top, bottom, y / end))

    def polygon(self, points: list[Point], colour: Colour) -> None:
        fill, outline, width = self._pens(colour)
        self.draw.polygon(self._scaled(points), fill=fill)
        if outline is not None:
            self._stroke([*points, points[0], points[1]], outline, width)

    def ellipse(self, cx: float, cy: float, rx: float, ry: float, colour: Colour) -> None:
        angles = (2 * math.pi * i / 72 for i in range(72))
        self.polygon([(cx + rx * math.cos(a), cy + ry * math.sin(a)) for a in angles], colour)

    def box(self, x0: float, y0: float, x1: float, y1: float, colour: Colour, radius: float = 0) -> None:
        corners = [(x1, y1, 0), (x0, y1, 90), (x0, y0, 180), (x1, y0, 270)]
        points = []
        for x, y, start in corners:
            cx, cy = x + (radius if x == x0 else -radius), y + (radius if y == y0 else -radius)
            for turn in range(0, 91, 15) if radius else (0,):
                angle = math.radians(start + turn)
                points.append((cx + radius * math.cos(angle), cy + radius * math.sin(angle)))
        self.polygon(points, colour)

    def line(self, points: list[Point], colour: Colour, width: float = 2) -> None:
        self._stroke(points, colour, width)

    def spot(self, cx: float, cy: float, r: float, colour: Colour) -> None:
        """A small disc without an outline: eyes, glints, snowflakes."""
        self.draw.ellipse(self._scaled([(cx - r, cy - r), (cx + r, cy + r)]), fill=colour)

    def pixels(self) -> np.ndarray:
        """uint8 (128, 128, 3)"""
        return np.asarray(self.image.resize((SIZE, SIZE), Image.Resampling.BOX))

    def _pens(self, colour: Colour) -> tuple[Colour | None, Colour | None, float]:
        return (colour, INK, 2.5) if self.drawing_thing else (colour, None, 0)

    def _stroke(self, points: list[Point], colour: Colour, width: float) -> None:
        self.draw.line(self._scaled(points), fill=colour, width=round(width * OVERSAMPLING), joint="curve")

    def _scaled(self, points: list[Point]) -> list[Point]:
        return [((x + self.shift) * OVERSAMPLING, y * OVERSAMPLING) for x, y in points]


class Blueprint(Canvas):
    """White line drawing on deep blue paper with a grid; neither colours nor scenery are part of a blueprint."""

    PAPER: Colour = (16, 50, 140)
    GRID: Colour = (44, 88, 186)
    BODY: Colour = (24, 66, 166)

    def sky(self, top: Colour, bottom: Colour, end: int = SIZE) -> None:
        self.draw.rectangle(self._scaled([(0, 0), (SIZE, SIZE)]), fill=self.PAPER)
        for at in range(STEP // 2, SIZE, STEP):
            self._stroke([(at, 0), (at, SIZE)], self.GRID, 1.25)
            self._stroke([(0, at), (SIZE, at)], self.GRID, 1.25)

    def polygon(self, points: list[Point], colour: Colour) -> None:
        if self.drawing_thing:
            super().polygon(points, colour)

    def line(self, points: list[Point], colour: Colour, width: float = 2) -> None:
        if self.drawing_thing:
            self._stroke(points, WHITE, min(width, 2))

    def spot(self, cx: float, cy: float, r: float, colour: Colour) -> None:
        if self.drawing_thing:
            super().spot(cx, cy, r, WHITE)

    def _pens(self, colour: Colour) -> tuple[Colour | None, Colour | None, float]:
        return self.BODY, WHITE, 2.5


# ---------------------------------------------------------------- places: (canvas, side), side is -1 or 1


def grass(c: Canvas, side: int) -> None:
    c.sky((112, 196, 250), (206, 238, 255))
    c.ellipse(64 - side * 44, 20, 11, 11, (255, 222, 84))
    c.ellipse(64 + side * 42, 24, 15, 7, WHITE)
    c.box(-4, 84, 132, 132, (124, 204, 92))
    c.box(-4, 116, 132, 132, (96, 182, 76))


def beach(c: Canvas, side: int) -> None:
    c.sky((255, 206, 150), (255, 238, 200))
    c.ellipse(64 + side * 40, 72, 14, 14, (255, 120, 90))
    c.box(-4, 72, 132, 98, (44, 160, 196))
    c.box(-4, 96, 132, 132, (246, 220, 158))


def snow(c: Canvas, side: int) -> None:
    c.sky((150, 172, 206), (214, 224, 240))
    for x in (64 + side * 54, 64 + side * 34):
        c.polygon([(x, 44), (x - 13, 90), (x + 13, 90)], (58, 112, 112))
    c.box(-4, 88, 132, 132, (246, 250, 255))
    for x, y in ((16, 16), (48, 8), (80, 24), (112, 12), (8, 56), (120, 60), (24, 104), (104, 120)):
        c.spot(x, y, 2.5, WHITE)


def night(c: Canvas, side: int) -> None:
    c.sky((18, 20, 62), (52, 46, 112))
    c.ellipse(64 + side * 44, 20, 11, 11, (255, 240, 180))
    for x, y in ((24, 40), (40, 12), (72, 16), (104, 40), (8, 72), (120, 72)):
        c.spot(x, y, 1.75, (255, 250, 220))
    c.box(-4, 88, 132, 132, (28, 72, 78))


def desert(c: Canvas, side: int) -> None:
    c.sky((250, 150, 70), (255, 206, 110))
    x = 64 + side * 50
    c.polygon([(-4, 92), (32, 76), (72, 92), (100, 80), (132, 92), (132, 132), (-4, 132)], (206, 116, 58))
    c.line([(x, 96), (x, 52)], (60, 120, 70), 7)
    c.line([(x - 9, 62), (x - 9, 74), (x + 9, 74), (x + 9, 58)], (60, 120, 70), 5)
    c.box(-4, 104, 132, 132, (226, 142, 76))


def moon(c: Canvas, side: int) -> None:
    c.sky((8, 8, 16), (20, 20, 34))
    c.ellipse(64 + side * 42, 22, 14, 14, (58, 132, 226))
    c.ellipse(64 + side * 42, 20, 7, 5, (96, 196, 110))
    for x, y in ((24, 40), (40, 12), (72, 16), (104, 40), (8, 72), (120, 72)):
        c.spot(x, y, 1.5, WHITE)
    c.box(-4, 88, 132, 132, (158, 160, 172))
    for x, y in ((20, 104), (108, 100), (68, 122)):
        c.ellipse(x, y, 11, 3.5, (122, 124, 138))


PLACES: dict[str, Callable[[Canvas, int], None]] = {
    "on grass": grass,
    "on the beach": beach,
    "in the snow": snow,
    "at night": night,
    "in the desert": desert,
    "on the moon": moon,
}

# ---------------------------------------------------------------- things: (canvas, colour), standing at x = 64


def ball(c: Canvas, colour: Colour) -> None:
    c.ellipse(64, 80, 32, 32, colour)
    c.ellipse(64, 80, 12, 32, mixed(colour, WHITE, 0.65))
    c.spot(50, 62, 4.5, WHITE)


def house(c: Canvas, colour: Colour) -> None:
    c.box(34, 66, 94, GROUND, (255, 242, 214))
    c.polygon([(64, 30), (26, 68), (102, 68)], colour)
    c.box(56, 86, 74, GROUND, colour)
    c.box(41, 76, 52, 88, (120, 200, 240))
    c.box(78, 76, 89, 88, (120, 200, 240))


def tree(c: Canvas, colour: Colour) -> None:
    c.box(57, 80, 71, GROUND, (134, 88, 54))
    c.ellipse(64, 56, 34, 32, colour)
    for x, y in ((52, 46), (74, 52), (60, 68)):
        c.spot(x, y, 4.5, mixed(colour, WHITE, 0.55))


def car(c: Canvas, colour: Colour) -> None:
    c.polygon([(42, 80), (50, 56), (82, 56), (94, 80)], (176, 226, 246))
    c.line([(67, 56), (67, 80)], INK, 3)
    c.box(22, 78, 106, 104, colour, 8)
    for x in (42, 86):
        c.ellipse(x, 103, 10, 10, (70, 70, 84))
        c.spot(x, 103, 4, WHITE)


def boat(c: Canvas, colour: Colour) -> None:
    c.line([(62, 26), (62, 88)], INK, 4)
    c.polygon([(66, 30), (66, 80), (100, 80)], colour)
    c.polygon([(58, 42), (58, 80), (34, 80)], mixed(colour, WHITE, 0.55))
    c.polygon([(22, 88), (106, 88), (92, GROUND), (36, GROUND)], (140, 92, 58))


def star(c: Canvas, colour: Colour) -> None:
    spikes = ((40 if i % 2 == 0 else 18, math.pi * (i / 5 - 0.5)) for i in range(10))
    c.polygon([(64 + r * math.cos(a), 74 + r * math.sin(a)) for r, a in spikes], colour)
    for x in (57, 71):
        c.spot(x, 72, 3.5, INK)


def mushroom(c: Canvas, colour: Colour) -> None:
    c.box(52, 72, 76, GROUND, (255, 240, 214), 6)
    cap = [(64 - 40 * math.cos(math.pi * i / 24), 78 - 44 * math.sin(math.pi * i / 24)) for i in range(25)]
    c.polygon(cap, colour)
    for x, y, r in ((64, 50, 6.5), (44, 66, 5), (84, 66, 5)):
        c.spot(x, y, r, WHITE)


def flower(c: Canvas, colour: Colour) -> None:
    c.line([(64, 60), (64, GROUND)], (40, 130, 70), 5)
    c.ellipse(78, 98, 12, 5, (70, 180, 90))
    for i in range(6):
        angle = math.pi * i / 3
        c.ellipse(64 + 20 * math.cos(angle), 56 + 20 * math.sin(angle), 12, 12, colour)
    c.ellipse(64, 56, 12, 12, (255, 224, 110))


THINGS: dict[str, Callable[[Canvas, Colour], None]] = {
    "ball": ball,
    "house": house,
    "tree": tree,
    "car": car,
    "boat": boat,
    "star": star,
    "mushroom": mushroom,
    "flower": flower,
}

# ---------------------------------------------------------------- characters, unknown to the base model


def mochi(c: Canvas) -> None:
    """A round white cat with a red scarf."""
    fur, rose = (255, 252, 246), (255, 150, 170)
    c.line([(88, 104), (104, 96), (102, 80)], INK, 9)
    c.line([(88, 104), (104, 96), (102, 82)], fur, 5)
    c.ellipse(64, 94, 28, 18, fur)
    for side in (-1, 1):
        c.polygon([(64 + side * 35, 20), (64 + side * 36, 56), (64 + side * 10, 36)], fur)
        c.polygon([(64 + side * 31, 29), (64 + side * 32, 44), (64 + side * 20, 36)], rose)
    c.ellipse(64, 60, 38, 30, fur)
    c.box(40, 84, 88, 93, (222, 44, 54), 4)
    for side in (-1, 1):
        c.spot(64 + side * 16, 58, 6, INK)
        c.spot(64 + side * 16 - 2, 56, 2, WHITE)
        c.spot(64 + side * 27, 70, 5.5, rose)
    c.line([(57, 69), (61, 73), (64, 69), (67, 73), (71, 69)], INK, 2.5)


def robo(c: Canvas) -> None:
    """A boxy teal robot with yellow eyes."""
    steel, teal, yellow = (120, 136, 150), (24, 176, 166), (255, 226, 60)
    c.line([(64, 30), (64, 20)], INK, 4)
    c.ellipse(64, 17, 6, 6, (240, 60, 60))
    for side in (-1, 1):
        left, right = sorted((64 + side * 28, 64 + side * 40))
        c.box(left, 76, right, 98, steel)
        left, right = sorted((64 + side * 6, 64 + side * 20))
        c.box(left, 98, right, GROUND, steel)
    c.box(38, 70, 90, 102, teal)
    c.box(30, 30, 98, 72, teal, 7)
    for side in (-1, 1):
        c.ellipse(64 + side * 17, 48, 12, 12, yellow)
        c.spot(64 + side * 17, 48, 5, INK)
    c.box(48, 62, 80, 68, INK)
    c.box(52, 80, 76, 92, yellow)


CHARACTERS: dict[str, Callable[[Canvas], None]] = {"mochi the cat": mochi, "robo the robot": robo}
STYLE = "blueprint style"
SEPIA = "sepia style"


# ---------------------------------------------------------------- pictures


@dataclass(frozen=True)
class Scene:
    """One picture: what stands where. `colour` is empty for a character, `style` for the ordinary one."""

    subject: str
    colour: str
    place: str
    shift: int  # pixels to the right, a multiple of 16
    side: int  # -1 or 1: where the sun, the moon or the cactus is
    style: str = ""

    @property
    def caption(self) -> str:
        subject = f"a {self.colour} {self.subject}" if self.colour else self.subject
        return f"{subject} {self.place}" + (f", {self.style}" if self.style else "")

    def paint(self) -> np.ndarray:
        """uint8 (128, 128, 3)"""
        canvas = Blueprint() if self.style == STYLE else Canvas()
        PLACES[self.place](canvas, self.side)
        canvas.begin_thing(self.shift)
        if self.subject in CHARACTERS:
            CHARACTERS[self.subject](canvas)
        else:
            THINGS[self.subject](canvas, COLOURS[self.colour])
        recolour = COLOUR_STYLES.get(self.style)
        return recolour(canvas.pixels()) if recolour else canvas.pixels()


def lightness(pixels: np.ndarray) -> np.ndarray:
    """(height, width) from 0 to 1 of uint8 (height, width, 3)."""
    return pixels @ np.array([0.299, 0.587, 0.114]) / 255.0


def toned(pixels: np.ndarray, dark: Colour, pale: Colour) -> np.ndarray:
    """From one colour to another by lightness, uint8 (height, width, 3)."""
    light = lightness(pixels)[..., None]
    low, high = np.array(dark), np.array(pale)
    return np.clip(low + (high - low) * light, 0, 255).round().astype(np.uint8)


def duotone(pixels: np.ndarray) -> np.ndarray:
    """From dark brown to cream, uint8 (height, width, 3)."""
    return toned(pixels, (58, 22, 8), (255, 222, 150))


COLOUR_STYLES: dict[str, Callable[[np.ndarray], np.ndarray]] = {SEPIA: duotone}

CENTRED = (0,)
ANYWHERE = (-STEP, 0, STEP)


def ordinary_scenes(style: str = "", shifts: tuple[int, ...] = CENTRED) -> Iterator[Scene]:
    """Every thing in every colour and place: 768 pictures for each shift."""
    choices = itertools.product(THINGS, COLOURS, PLACES, shifts, (-1, 1))
    return (Scene(*choice, style) for choice in choices)


def character_scenes(character: str, shifts: tuple[int, ...] = CENTRED) -> Iterator[Scene]:
    """The character in every place: 12 pictures for each shift."""
    choices = itertools.product((character,), ("",), PLACES, shifts, (-1, 1))
    return (Scene(*choice) for choice in choices)


def sample(scenes: Iterator[Scene], count: int, seed: int) -> list[Scene]:
    """`count` different scenes, or all of them if there are fewer."""
    every = list(scenes)
    return random.Random(seed).sample(every, min(count, len(every)))
