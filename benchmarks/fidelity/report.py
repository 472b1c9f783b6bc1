# SPDX-License-Identifier: Apache-2.0
"""Tables and a plot of what `run` measured."""

from __future__ import annotations

from collections.abc import Sequence
from math import isnan, nan
from pathlib import Path
from statistics import fmean

FREE = ("stack 1.0", "stack 0.7", "stack 1/K", "TIES", "DARE-TIES", "SVD", "KnOTS", "WUDI", "NP-LoRA")
INSTANT = "ours, no calibration"
RIVALS = ("RegMean", "IterIS start", "IterIS", "paper")
OURS = ("ours, no pairs", "ours", "ours, own lines", "ours, size of one")
WHOLE, SMALL = "ours", "ours, size of one"  # what was polished
STACKS = FREE[:3]
ASKS = {
    "singles": "Prompts for one LoRA, mean over the LoRAs of a subset; 0 = this LoRA alone",
    "joint": "Prompts for a character in a style, mean over such pairs of a subset; 0 = these two stacked",
}

RATIOS = """Where only a character and a style are merged, the plain stack is the reference of the joint prompts, and
what is hardly more than a stack is near it; so joint prompts alone are compared where three or more are merged."""

Rows = Sequence[dict]


def text(about: str, rows: Rows) -> str:
    """Everything, as Markdown."""
    parts = [f"# Fidelity\n\n{about}\nError: 0 = the LoRAs that are asked for, alone; 1 = the base model.\n"]
    for asked, meaning in ASKS.items():
        for kind in ("velocity", "image"):
            if chosen := _with(rows, kind):
                count = len(_subsets(rows, asked))
                head = f"## {asked.capitalize()}: {kind} error, mean over {count} subsets\n\n{meaning}.\n"
                parts.append(f"{head}\n{_means(rows, kind, asked, chosen)}")
    parts.append(f"## Ratios, mean over subsets (worst subset)\n\n{RATIOS}\n\n{_ratios(rows)}")
    for asked in ASKS:
        parts.append(f"## {asked.capitalize()}: velocity error, subset by subset\n\n{_every(rows, asked)}")
    return "\n".join(parts)


def error(rows: Rows, kind: str, subset: str, way: str, budget: tuple[int, int], asked: str = "singles") -> float:
    """Mean over the asks of one subset; NaN if there are none."""
    budget = (0, 0) if way in (*FREE, INSTANT) else budget
    found = [
        row[kind]
        for row in rows
        if (row["subset"], row["way"], _kind(row)) == (subset, way, asked) and (row["steps"], row["prompts"]) == budget
    ]
    return fmean(found) if found else nan


def budgets(rows: Rows) -> list[tuple[int, int]]:
    return sorted({(row["steps"], row["prompts"]) for row in rows if row["steps"]})


def _calibrated(rows: Rows) -> tuple[str, ...]:
    return (*RIVALS, *OURS, *_polished(rows))


def _polished(rows: Rows) -> list[str]:
    return list(dict.fromkeys(row["way"] for row in rows if "polished" in row["way"]))


def _kind(row: dict) -> str:
    return "joint" if "+" in row["ask"] else "singles"


def _with(rows: Rows, kind: str) -> list[tuple[int, int]]:
    """Budgets at which this kind of error was measured."""
    return [b for b in budgets(rows) if not isnan(error(rows, kind, _subsets(rows)[0], "ours", b))]


def _subsets(rows: Rows, asked: str = "singles") -> list[str]:
    return list(dict.fromkeys(row["subset"] for row in rows if _kind(row) == asked))


def _instant(rows: Rows) -> tuple[str, ...]:
    """Not in results that are older than it."""
    return (INSTANT,) if any(row["way"] == INSTANT for row in rows) else ()


def _means(rows: Rows, kind: str, asked: str, chosen: Sequence[tuple[int, int]]) -> str:
    """A row for each way: there are more of them than of budgets."""

    def mean(way: str, budget: tuple[int, int]) -> str:
        return f"{fmean(error(rows, kind, s, way, budget, asked) for s in _subsets(rows, asked)):.3f}"

    free = [[way, *[mean(way, chosen[0])] * len(chosen)] for way in (*FREE, *_instant(rows))]
    body = free + [[way, *(mean(way, budget) for budget in chosen)] for way in _calibrated(rows)]
    return _table(["steps x prompts", *map(_name, chosen)], body)


def _ratios(rows: Rows) -> str:
    """Means over subsets of the error of one way over that of the best of others."""
    singles, joint = _subsets(rows), _subsets(rows, "joint")
    many = [subset for subset in joint if subset.count("+") > 1]
    others, both = (*FREE, *RIVALS), ("singles", "joint")
    polished = _polished(rows)
    wanted: list[tuple[str, Sequence[str], str, Sequence[str], list[str]]] = [
        ("singles, {} / paper", both[:1], "ours", ["paper"], singles),
        ("singles, {} / paper", both[:1], "ours, size of one", ["paper"], singles),
        *(("singles, {} / best plain stack", both[:1], way, STACKS, singles) for way in _instant(rows)),
        ("singles, {} / best plain stack", both[:1], "ours", STACKS, singles),
        ("singles, {} / best of all others", both[:1], "ours", others, singles),
        *(
            (f"{kind}, {{}} / {rival}", (kind,), way, [rival], singles if kind == "singles" else many)
            for kind in ASKS
            for way, rival in ((way, WHOLE if way.startswith(WHOLE) else SMALL) for way in polished)
        ),
        *(("singles, {} / paper", both[:1], way, ["paper"], singles) for way in polished),
        *(("singles, {} / best plain stack", both[:1], way, STACKS, singles) for way in polished),
        *(
            ("joint, three or more LoRAs, {} / best of all others", both[1:], way, others, many)
            for way in (*OURS, *polished)
        ),
        *(
            ("mean of singles and joint, {} / best of all others", both, way, others, joint)
            for way in (*OURS, *polished)
        ),
    ]

    def figure(
        asked: Sequence[str], way: str, rivals: Sequence[str], subsets: list[str], budget: tuple[int, int]
    ) -> str:
        def mean(subset: str, one: str) -> float:
            return fmean(error(rows, "velocity", subset, one, budget, kind) for kind in asked)

        found = [mean(subset, way) / min(mean(subset, rival) for rival in rivals) for subset in subsets]
        return f"{fmean(found):.2f} ({max(found):.2f})" if found else "-"

    body = [
        [label.format(way), *(figure(asked, way, rivals, subsets, b) for b in budgets(rows))]
        for label, asked, way, rivals, subsets in wanted
    ]
    return _table(["velocity", *map(_name, budgets(rows))], body)


def _every(rows: Rows, asked: str) -> str:
    ways = (*FREE, *_instant(rows), *_calibrated(rows))
    body = [
        [subset, _name(b), *(f"{error(rows, 'velocity', subset, way, b, asked):.3f}" for way in ways)]
        for subset in _subsets(rows, asked)
        for b in budgets(rows)
    ]
    return _table(["LoRAs", "steps x prompts", *ways], body)


def plot(about: str, rows: Rows, target: Path) -> None:
    """Error of prompts for one LoRA and of prompts for two, calibrated with the largest budget."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    last = budgets(rows)[-1]
    kind = "image" if last in _with(rows, "image") else "velocity"
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 5), layout="constrained", sharey=True)
    for axis, asked in zip(axes, ASKS, strict=True):
        subsets = _subsets(rows, asked)
        ways = (*FREE, *_instant(rows), *_calibrated(rows))
        errors = {way: fmean(error(rows, kind, s, way, last, asked) for s in subsets) for way in ways}
        colours = ["tab:orange" if way in (INSTANT, *OURS, *_polished(rows)) else "tab:blue" for way in errors]
        axis.barh(list(errors), list(errors.values()), color=colours)
        axis.axvline(1, color="grey", lw=0.5)
        axis.set(title=f"{asked}: {kind} error, calibrated with {_name(last)}")
    axes[0].invert_yaxis()
    figure.suptitle(about.split(".")[0], fontsize=10)
    figure.savefig(target, dpi=110)


def _name(budget: tuple[int, int]) -> str:
    return f"{budget[0]}x{budget[1]}"


def _table(head: list[str], body: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
