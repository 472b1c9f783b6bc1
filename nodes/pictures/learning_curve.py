"""The error of a merge while it is polished, by matplotlib: a line for each case, and one for all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ...ssr_core import Evaluation
from .charts import ACCENT, drawn, short

HEIGHT = 4.6  # inches
LINES = ["#8a8f98", "#e88a4a", "#b3293a", "#5b7fb8", "#a98ac4", "#c9a227", "#4f1230", "#7c9a5e"]


def learning_curve(history: Sequence[Evaluation], labels: Sequence[str]) -> Tensor:
    """An IMAGE, (1, height, width, 3) in 0..1; without matplotlib a notice that says how to get it.

    Args:
        labels: (C,) of the cases.
    """

    def draw(figure: Any) -> None:
        axis = figure.subplots()
        steps = [one.step for one in history]
        for number, label in enumerate(labels):
            values = [one.cases[number] for one in history]
            axis.plot(steps, values, color=LINES[number % len(LINES)], linewidth=1.5, label=short(label, 28))
        axis.plot(steps, [one.error for one in history], color=ACCENT, linewidth=3, label="all")
        axis.set_ylim(bottom=0)
        axis.set_xlim(0, max(steps[-1], 1))
        axis.grid(color="#e6e8eb", linewidth=1)
        axis.set_axisbelow(True)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
        axis.set_title("Error on held-out points: 0 = the LoRAs asked for, 1 = none")
        axis.set_xlabel("step")
        axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)

    return drawn(HEIGHT, draw)
