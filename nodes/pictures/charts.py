"""Charts of a conflict, by matplotlib: what is kept, where in the model it is lost, who disturbs whom, at what rank."""

from __future__ import annotations

import logging
import textwrap
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ...ssr_core import Conflict
from .picture import image_of

WIDTH = 1024  # pixels; labels are still read at half of it
DPI = 100
INK, PAPER, ACCENT, STACK = "#20222a", "#ffffff", "#0d6e54", "#e0a24f"
SCALE = ["#f4f7f6", "#f6dfa4", "#e88a4a", "#b3293a", "#4f1230"]  # from nothing to as wrong as leaving a LoRA out
NOT_LATIN = ("Noto Sans CJK SC", "Noto Sans CJK JP", "Microsoft YaHei", "PingFang SC", "Hiragino Sans", "Yu Gothic")
MISSING = "The chart needs matplotlib. Install it in ComfyUI's Python: pip install matplotlib. The report is complete."


def chart(conflict: Conflict) -> Tensor:
    """An IMAGE, (1, height, width, 3) in 0..1; without matplotlib a notice that says how to get it."""
    rows = len(conflict.cases)
    first, top, bottom = 0.9 + 0.62 * rows, 1.2 + 2 * (0.55 + 0.4 * rows), max(3.3, 1.5 + 0.42 * rows)  # inches

    def draw(figure: Any) -> None:
        figure.get_layout_engine().set(h_pad=0.1, w_pad=0.1, hspace=0.04, wspace=0.04)
        kept, upper, lower = figure.subfigures(3, 1, height_ratios=[first, top, bottom])
        _kept(kept.subplots(), conflict)
        _blocks(upper, conflict)
        stacked, routed, ranks = lower.subplots(1, 3, width_ratios=[1, 1, 0.9])
        _cross_talk(stacked, conflict, "plain", "Cross-talk: stacked")
        _cross_talk(routed, conflict, "routed", "Cross-talk: routed", named=False)
        _ranks(ranks, conflict)

    return drawn(first + top + bottom, draw)


def drawn(height: float, draw: Callable[[Any], None]) -> Tensor:
    """An IMAGE of what `draw` puts on a matplotlib figure, `height` inches high; without matplotlib a notice."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        logging.warning(MISSING)
        return image_of(_notice(MISSING))
    with _style():
        figure: Any = Figure(figsize=(WIDTH / DPI, height), dpi=DPI, facecolor=PAPER, layout="constrained")
        canvas = FigureCanvasAgg(figure)
        draw(figure)
        canvas.draw()
        pixels = numpy.asarray(canvas.buffer_rgba())[..., :3].copy()
    return image_of(Image.fromarray(pixels))


def _style() -> Any:
    """Of everything drawn inside; nothing of matplotlib's own settings is changed for others."""
    from matplotlib import font_manager, rc_context

    known = set(font_manager.get_font_names())
    family = ["DejaVu Sans", *(name for name in NOT_LATIN if name in known)]
    return rc_context(
        {
            **{"font.family": family, "font.size": 13, "axes.titlesize": 14, "axes.titleweight": "bold"},
            **{"text.color": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK},
            **{"axes.edgecolor": "#c9ccd1", "axes.titlelocation": "left", "axes.titlepad": 8},
        }
    )


def _kept(axis: Any, conflict: Conflict) -> None:
    """A row for each case: how much of its LoRAs is left, stacked and routed."""
    rows = numpy.arange(len(conflict.cases))
    for kind, colour, shift in (("stack", STACK, -0.19), ("merge", ACCENT, 0.19)):
        left = (1 - conflict.error(kind)).clamp(0, 1).nan_to_num(0).numpy()
        axis.barh(rows + shift, left, 0.34, color=colour, label="plain stack" if kind == "stack" else "routed")
        for row, share in zip(rows, left, strict=True):
            axis.text(share + 0.01, row + shift, f"{100 * share:.0f}%", va="center", fontsize=12)
    axis.set_yticks(rows, _numbered(conflict.labels, 24))
    axis.invert_yaxis()
    axis.set_xlim(0, 1.08)
    axis.set_xticks([])
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    axis.set_title("Kept of each LoRA, and of several at once")
    axis.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False, borderpad=0, borderaxespad=0.2)


def _blocks(figure: Any, conflict: Conflict) -> None:
    """The error of each LoRA in each block of the model, stacked and routed."""
    names, axes = list(conflict.blocks), figure.subplots(2, 1)
    for axis, kind, title in zip(axes, ("stack", "merge"), ("plain stack", "routed"), strict=True):
        values = torch.stack([conflict.error_by_block(kind)[name] for name in names], dim=1).numpy()
        drawn = axis.imshow(values, cmap=_colours(), vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        axis.set_title(f"Error by block: {title}")
        axis.set_yticks(range(len(conflict.cases)), _numbered(conflict.labels, 20))
        axis.tick_params(length=0)
        axis.set_xticks([])
        _separate(axis, values.shape)
    for axis in axes:
        _part(axis, names)
    _label_blocks(axes[-1], names)
    bar = figure.colorbar(drawn, ax=list(axes), extend="max", pad=0.015, fraction=0.03, aspect=12)
    bar.set_ticks([0, 0.5, 1], labels=["0 kept", "0.5", "1 lost"])
    bar.outline.set_visible(False)


def _kinds(names: Sequence[str]) -> list[str]:
    """Of each block: its name without its number."""
    return [name.rpartition(".")[0] if name.rpartition(".")[2].isdigit() else name for name in names]


def _part(axis: Any, names: Sequence[str]) -> None:
    """A gap between one kind of blocks and the next."""
    for column, (left, right) in enumerate(pairwise(_kinds(names))):
        if left != right:
            axis.axvline(column + 0.5, color=PAPER, linewidth=5)


def _label_blocks(axis: Any, names: Sequence[str], most: int = 16) -> None:
    """Numbers of blocks below them, and below these what kind of blocks they are, where there is room."""
    kinds = _kinds(names)
    every = -(-len(names) // most)
    numbers = [name.rpartition(".")[2] for name in names]
    shown = [i for i, number in enumerate(numbers) if number.isdigit() and int(number) % every == 0]
    axis.set_xticks(shown, [numbers[i] for i in shown])
    right = -1.0
    for kind in dict.fromkeys(kinds):
        members = [i for i, other in enumerate(kinds) if other == kind]
        label, middle = short(kind, 24), (members[0] + members[-1]) / 2
        width = len(label) * len(names) / 72  # in columns: so many characters fit below all of them
        if middle - width / 2 > right:
            axis.annotate(
                label, (middle, 0), (0, -26), ("data", "axes fraction"), "offset points", ha="center", va="top"
            )
            right = middle + width / 2


def _cross_talk(axis: Any, conflict: Conflict, kind: str, title: str, named: bool = True) -> None:
    """What each LoRA writes on the prompts of each other, relative to what belongs there."""
    found = conflict.cross_talk(kind).clone()
    for row, case in enumerate(conflict.cases):
        found[row, list(case.speakers)] = torch.nan
    values = found.numpy()
    axis.imshow(values, cmap=_colours(), vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    axis.set_title(title)
    numbers = range(len(conflict.names))
    axis.set_xticks(numbers, [str(i + 1) for i in numbers])
    rows = range(len(conflict.cases))
    axis.set_yticks(rows, _numbered(conflict.labels, 14) if named else [str(i + 1) for i in rows])
    axis.tick_params(length=0)
    axis.set_xlabel("LoRA that writes")
    axis.set_ylabel("on the prompts of")
    _separate(axis, values.shape)
    for (row, column), value in numpy.ndenumerate(values):
        if not numpy.isnan(value):
            colour = PAPER if value > 0.6 else INK
            text = "<1%" if value < 0.005 else f"{100 * value:.0f}%"
            axis.text(column, row, text, color=colour, ha="center", va="center", fontsize=min(13, 55 / len(numbers)))


def _ranks(axis: Any, conflict: Conflict) -> None:
    """What of the merge's effect is lost by a cut to each rank."""
    ranks = list(range(1, conflict.rank + 1))
    lost = [max(conflict.lost_at(rank), 1e-5) for rank in ranks]
    axis.plot(ranks, lost, color=ACCENT, linewidth=2.5)
    axis.set_yscale("log")
    axis.set_ylim(1e-4, 1)
    axis.set_xlim(1, max(ranks[-1], 2))
    axis.set_yticks([1e-4, 1e-3, 1e-2, 1e-1, 1], ["0.01%", "0.1%", "1%", "10%", "100%"])
    axis.minorticks_off()
    axis.axhline(0.01, color=ACCENT, linewidth=1, linestyle=(0, (4, 4)))
    axis.grid(color="#e6e8eb", linewidth=1)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    axis.set_title("Lost by a cut")
    axis.set_xlabel("to rank")


def _separate(axis: Any, shape: Sequence[int]) -> None:
    """Thin lines of paper between the cells, and none around them."""
    axis.set_xticks([column - 0.5 for column in range(1, shape[1])], minor=True)
    axis.set_yticks([row - 0.5 for row in range(1, shape[0])], minor=True)
    axis.grid(which="minor", color=PAPER, linewidth=1.5 if shape[1] < 40 else 0.6)
    axis.tick_params(which="minor", length=0)
    axis.spines[:].set_visible(False)


def _numbered(names: Sequence[str], most: int) -> list[str]:
    return [f"{short(name, most)}  {number}" for number, name in enumerate(names, 1)]


def _colours() -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("conflict", SCALE).with_extremes(bad="#e6e8eb")


def short(name: str, most: int) -> str:
    """With its middle left out where it is too long: both ends tell files apart."""
    if len(name) <= most:
        return name
    head = (most - 1) // 2
    return f"{name[:head]}…{name[-(most - 1 - head) :]}"


def _notice(text: str) -> Image.Image:
    sheet = Image.new("RGB", (WIDTH, WIDTH // 4), PAPER)
    ImageDraw.Draw(sheet).multiline_text(
        (40, WIDTH // 8), textwrap.fill(text, 58), INK, ImageFont.load_default(28), anchor="lm", spacing=12
    )
    return sheet
