# SPDX-License-Identifier: Apache-2.0
"""A labelled grid of pictures: rows are prompts, columns are models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

CELL = 192
GAP = 6
LABELS = 190  # width of the column with the prompts
HEAD = 40
INK, PAPER, ACCENT = (32, 34, 40), (255, 255, 255), (13, 110, 84)


def grid(
    pictures: Mapping[tuple[int, int], Path], prompts: Sequence[str], columns: Sequence[str], highlight: int
) -> Image.Image:
    """The pictures at (row, column), with column `highlight` set off."""
    width = LABELS + len(columns) * (CELL + GAP) + GAP
    sheet = Image.new("RGB", (width, HEAD + len(prompts) * (CELL + GAP) + GAP), PAPER)
    draw = ImageDraw.Draw(sheet)
    left = _left(highlight)
    draw.rectangle((left - 4, 4, left + CELL + 3, sheet.height - 3), fill=(220, 242, 234))
    for column, name in enumerate(columns):
        colour = ACCENT if column == highlight else INK
        draw.text((_left(column) + CELL / 2, HEAD / 2 + 2), name, colour, _font(20), anchor="mm")
    for row, prompt in enumerate(prompts):
        top = HEAD + row * (CELL + GAP)
        text = _wrapped(draw, prompt, LABELS - 2 * GAP)
        draw.multiline_text((GAP, top + CELL / 2), text, INK, _font(17), anchor="lm", spacing=6)
        for column in range(len(columns)):
            with Image.open(pictures[row, column]) as picture:
                sheet.paste(picture.convert("RGB").resize((CELL, CELL), Image.Resampling.LANCZOS), (_left(column), top))
    return sheet


def _left(column: int) -> int:
    return LABELS + GAP + column * (CELL + GAP)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _wrapped(draw: ImageDraw.ImageDraw, text: str, width: int) -> str:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if draw.textlength(longer, _font(17)) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return "\n".join(lines)
