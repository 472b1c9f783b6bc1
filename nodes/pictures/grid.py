"""A labelled grid of pictures: rows are prompts, columns are models. Needs Pillow and nothing else."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

INK, PAPER, ACCENT, TINT = (32, 34, 40), (255, 255, 255), (13, 110, 84), (220, 242, 234)
NOT_LATIN = ("NotoSansCJK-Regular.ttc", "msyh.ttc", "YuGothM.ttc", "PingFang.ttc", "Hiragino Sans GB.ttc")
LINES = 3  # of a heading
SMALLEST = 9  # pixels of a letter


@dataclass(frozen=True)
class Layout:
    """Where everything stands, from the width and height of a picture."""

    width: int
    height: int

    @property
    def gap(self) -> int:
        return max(4, self.width // 32)

    @property
    def letters(self) -> int:
        return max(12, self.width // 10)

    @property
    def labels(self) -> int:
        """Width of the column with the prompts."""
        return self.width

    def left(self, column: int) -> int:
        return self.labels + self.gap + column * (self.width + self.gap)


def grid(
    pictures: Mapping[tuple[int, int], Image.Image],
    rows: Sequence[str],
    columns: Sequence[str],
    highlight: int,
    cell: int = 192,
    captions: Mapping[tuple[int, int], str] | None = None,
) -> Image.Image:
    """The pictures at (row, column), at most `cell` wide and high, with the columns from `highlight` on set off.

    Args:
        captions: lines below pictures; without any, no place is kept for them.
    """
    captions = captions or {}
    first = next(iter(pictures.values()))
    scale = cell / max(first.size)
    at = Layout(max(1, round(first.width * scale)), max(1, round(first.height * scale)))
    headings = [_fitted(name, at.width, at.letters * LINES * 4 // 3, at.letters) for name in columns]
    head = max(heading.height for heading in headings) + 2 * at.gap
    lines = max((caption.count("\n") + 1 for caption in captions.values()), default=0)
    foot = lines * at.letters * 4 // 3
    bottom = head + len(rows) * (at.height + foot + at.gap)
    sheet = Image.new("RGB", (at.left(len(columns)), bottom), PAPER)
    draw = ImageDraw.Draw(sheet)
    half = at.gap // 2
    draw.rectangle(
        (at.left(highlight) - half, half, at.left(len(columns) - 1) + at.width + half - 1, bottom - half), fill=TINT
    )
    for column, heading in enumerate(headings):
        colour = ACCENT if column >= highlight else INK
        heading.draw(draw, (at.left(column) + at.width / 2, head / 2), "mm", colour)
    for row, prompt in enumerate(rows):
        top = head + row * (at.height + foot + at.gap)
        label = _fitted(prompt, at.labels - at.gap, at.height, at.letters)
        label.draw(draw, (at.gap, top + at.height / 2), "lm", INK)
        for column in range(len(columns)):
            picture = pictures[row, column].convert("RGB").resize((at.width, at.height), Image.Resampling.LANCZOS)
            sheet.paste(picture, (at.left(column), top))
            if caption := captions.get((row, column)):
                below = at.left(column) + at.width / 2, top + at.height + foot / 2
                colour = ACCENT if column >= highlight else INK
                _fitted(caption, at.width, foot, at.letters).draw(draw, below, "mm", colour)
    return sheet


@dataclass(frozen=True)
class Text:
    """Words broken into lines at a size at which they fit."""

    lines: str
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont
    height: int

    def draw(
        self, draw: ImageDraw.ImageDraw, at: tuple[float, float], anchor: str, colour: tuple[int, int, int]
    ) -> None:
        align = "center" if anchor == "mm" else "left"
        draw.multiline_text(at, self.lines, colour, self.font, anchor=anchor, align=align, spacing=4)


def _fitted(words: str, width: int, height: int, letters: int) -> Text:
    """As large as fits into `width` and `height`; what does not even fit in small letters is cut short."""
    draw = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    for size in range(letters, SMALLEST - 1, -1):
        found = _broken(draw, words, width, _font(size, words))
        if found.height <= height:
            return found
    while words and found.height > height:
        words = words[: len(words) * 9 // 10]
        found = _broken(draw, words.rstrip() + "…", width, _font(SMALLEST, words))
    return found


def _broken(
    draw: ImageDraw.ImageDraw, words: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont
) -> Text:
    """Into lines of at most `width`: between words, and within one that is longer, such as a file's name."""
    lines = [""]
    for word in words.split():
        longer = f"{lines[-1]} {word}".strip()
        if draw.textlength(longer, font) <= width:
            lines[-1] = longer
            continue
        lines += [""] if lines[-1] else []
        for part in _parts(draw, word, width, font):
            if lines[-1] and draw.textlength(lines[-1] + part, font) > width:
                lines.append("")
            lines[-1] += part
    text = "\n".join(lines)
    box = draw.multiline_textbbox((0, 0), text, font, spacing=4)
    return Text(text, font, round(box[3] - box[1]))


def _parts(
    draw: ImageDraw.ImageDraw, word: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont
) -> Iterator[str]:
    """Where a long word may be broken: after its dashes, dots and underscores, else anywhere."""
    for part in re.split(r"(?<=[-._])", word):
        yield from [part] if draw.textlength(part, font) <= width else part


def _font(size: int, words: str) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own, or one of the system's for letters that it lacks."""
    if any(ord(letter) > 0x2E80 for letter in words):
        for name in NOT_LATIN:
            try:
                return ImageFont.truetype(name, size)
            except OSError:
                continue
    return ImageFont.load_default(size)
