# SPDX-License-Identifier: Apache-2.0
"""Tables and a plot of what `run` measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isnan
from pathlib import Path
from statistics import fmean

FREE = ("stack 1.0", "stack 0.7", "stack 1/K", "TIES", "DARE-TIES", "SVD")
CALIBRATED = ("paper", "ours", "ours, size of one")
STACKS = FREE[:3]

Rows = Sequence[dict]


def text(about: str, rows: Rows) -> str:
    parts = [
        f"# Fidelity\n\n{about}\nError: 0 = the LoRA alone, 1 = the base model, mean over the LoRAs of a subset.\n"
    ]
    for kind in ("velocity", "image"):
        parts.append(f"## {kind.capitalize()} error, mean over {len(_subsets(rows))} subsets\n\n{_means(rows, kind)}")
    parts.append(f"## Ratios\n\n{_ratios(rows)}")
    parts.append(f"## Velocity error, subset by subset\n\n{_every(rows)}")
    return "\n".join(parts)


def error(rows: Rows, kind: str, subset: str, way: str, budget: tuple[int, int]) -> float:
    """Mean over the LoRAs of one subset."""
    budget = (0, 0) if way in FREE else budget
    return fmean(
        row[kind]
        for row in rows
        if row["subset"] == subset and row["way"] == way and (row["steps"], row["prompts"]) == budget
    )


def budgets(rows: Rows) -> list[tuple[int, int]]:
    return sorted({(row["steps"], row["prompts"]) for row in rows if row["steps"]})


def _with(rows: Rows, kind: str) -> list[tuple[int, int]]:
    """Budgets at which this kind of error was measured."""
    return [b for b in budgets(rows) if not isnan(error(rows, kind, _subsets(rows)[0], "ours", b))]


def _subsets(rows: Rows) -> list[str]:
    return list(dict.fromkeys(row["subset"] for row in rows))


def _means(rows: Rows, kind: str) -> str:
    def mean(way: str, budget: tuple[int, int]) -> str:
        return f"{fmean(error(rows, kind, s, way, budget) for s in _subsets(rows)):.3f}"

    body = [[_name(b), *(mean(way, b) for way in (*FREE, *CALIBRATED))] for b in _with(rows, kind)]
    return _table(["steps x prompts", *FREE, *CALIBRATED], body)


def _ratios(rows: Rows) -> str:
    def over(kind: str, way: str, other: str) -> Callable[[str, tuple[int, int]], float]:
        return lambda s, b: error(rows, kind, s, way, b) / error(rows, kind, s, other, b)

    def to_best_stack(subset: str, budget: tuple[int, int]) -> float:
        best = min(error(rows, "velocity", subset, stack, budget) for stack in STACKS)
        return error(rows, "velocity", subset, "ours", budget) / best

    wanted = {
        "velocity, ours / paper, mean": (over("velocity", "ours", "paper"), fmean),
        "velocity, ours at the size of one / paper, mean": (over("velocity", "ours, size of one", "paper"), fmean),
        "velocity, ours / best plain stack, mean": (to_best_stack, fmean),
        "velocity, ours / best plain stack, worst subset": (to_best_stack, max),
        "image, ours / paper, mean": (over("image", "ours", "paper"), fmean),
    }
    body = [
        [label, *(f"{reduce([ratio(s, b) for s in _subsets(rows)]):.2f}" for b in budgets(rows))]
        for label, (ratio, reduce) in wanted.items()
    ]
    return _table(["over subsets", *map(_name, budgets(rows))], body)


def _every(rows: Rows) -> str:
    body = [
        [subset, _name(b), *(f"{error(rows, 'velocity', subset, way, b):.3f}" for way in (*FREE, *CALIBRATED))]
        for subset in _subsets(rows)
        for b in budgets(rows)
    ]
    return _table(["LoRAs", "steps x prompts", *FREE, *CALIBRATED], body)


def plot(about: str, rows: Rows, target: Path) -> None:
    """Error against budget, one panel for velocities and one for images."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    names = [_name(b) for b in budgets(rows)]
    for way in (*STACKS, "TIES", *CALIBRATED):
        values = [fmean(error(rows, "velocity", s, way, b) for s in _subsets(rows)) for b in budgets(rows)]
        solved = way in CALIBRATED
        axes[0].plot(names, values, marker="o" if solved else "", ls="-" if solved else ":", label=way)
    axes[0].axhline(1, color="grey", lw=0.5)
    axes[0].set(title="velocity error", xlabel="calibration, steps x prompts", ylim=(0, None))
    axes[0].legend(fontsize=8)
    last = budgets(rows)[-1]
    images = {way: fmean(error(rows, "image", s, way, last) for s in _subsets(rows)) for way in (*FREE, *CALIBRATED)}
    axes[1].barh(list(images)[::-1], list(images.values())[::-1])
    axes[1].axvline(1, color="grey", lw=0.5)
    axes[1].set(title=f"image error, calibrated with {_name(last)}")
    figure.suptitle(about.split(".")[0], fontsize=10)
    figure.savefig(target, dpi=110)


def _name(budget: tuple[int, int]) -> str:
    return f"{budget[0]}x{budget[1]}"


def _table(head: list[str], body: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
