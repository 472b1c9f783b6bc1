"""Advice: a conflict between LoRAs in words that a person can act on."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import permutations

from torch import Tensor

from ..solve.merge_report import RANKS, apart
from ..solve.summary import FAIR, FEW_LEVELS, WEAK, percent
from .conflict import Conflict, most_of

NOTABLE = 0.05  # of a LoRA's own effect: cross-talk that is worth a line
LOSS = 0.01  # that a recommended rank may cost
EVERYWHERE = "all over the model"


def advise(conflict: Conflict) -> str:
    """What to know first; then a table of errors, the matrix of cross-talk, and all that is worth doing."""
    return f"{conflict.summary}\n\n{details(conflict)}"


def details(conflict: Conflict) -> str:
    """The advice without its first two sentences."""
    return "\n".join([*_table(conflict), "", *_matrix(conflict), "", *_findings(conflict)])


def _table(conflict: Conflict) -> Iterator[str]:
    width = max(4, *map(len, conflict.labels))
    yield f"{len(conflict.names)} LoRAs in {len(conflict.sites)} sites of {len(conflict.blocks)} blocks, before merging"
    yield f"{'LoRA':<{width}}  strength  plain stack  routed"
    others = len(conflict.cases) - len(conflict.strengths)
    strengths = [f"{strength:.2f}" for strength in conflict.strengths] + [""] * others
    for label, strength, stack, merge in zip(
        conflict.labels, strengths, conflict.error("stack"), conflict.error("merge"), strict=True
    ):
        yield f"{label:<{width}}  {strength:>8}  {_figure(stack):>11}  {_figure(merge):>6}"
    yield "Error on the calibration tokens: 0 = these LoRAs alone, 1 = as if they were not there."


def _matrix(conflict: Conflict) -> Iterator[str]:
    width, columns = max(13, *map(len, conflict.labels)), [max(15, len(name)) for name in conflict.names]
    yield "Cross-talk, % of what belongs on the prompts that other LoRAs add to them: plain stack -> routed"
    yield f"{'on prompts of':<{width}}" + "".join(
        f"  {name:>{wide}}" for name, wide in zip(conflict.names, columns, strict=True)
    )
    plain, routed = conflict.cross_talk("plain"), conflict.cross_talk("routed")
    for i, (label, case) in enumerate(zip(conflict.labels, conflict.cases, strict=True)):
        cells = [
            "-" if j in case.speakers else f"{percent(plain[i, j])} -> {percent(routed[i, j])}"
            for j in range(len(columns))
        ]
        yield f"{label:<{width}}" + "".join(f"  {cell:>{wide}}" for cell, wide in zip(cells, columns, strict=True))


def _findings(conflict: Conflict) -> Iterator[str]:
    if line := apart(conflict.names, conflict.cases):
        yield line
    yield from _rivals(conflict)
    yield from _expectations(conflict)
    if line := _leftovers(conflict):
        yield line
    if line := _recommended_rank(conflict):
        yield line
    if conflict.coverage < FEW_LEVELS:
        yield (
            f"A LoRA was seen at {conflict.coverage} noise levels or samples only, so routing is held back. "
            f"Collect with {FEW_LEVELS} steps or more."
        )


def _rivals(conflict: Conflict, most: int = 4) -> Iterator[str]:
    plain, routed = conflict.cross_talk("plain"), conflict.cross_talk("routed")
    pairs = [(i, j) for i, j in permutations(range(len(conflict.names)), 2) if plain[i, j] > NOTABLE]
    if not pairs:
        yield "The LoRAs hardly disturb each other: a plain stack is nearly as good as a merge."
    for i, j in sorted(pairs, key=lambda pair: -plain[pair])[:most]:
        one, other = conflict.names[i], conflict.names[j]
        yield (
            f"{other} disturbs {one}: stacked, it adds {percent(plain[i, j])} of {one}'s own effect to its prompts, "
            f"{_where(conflict.competing(i, j), conflict)}; routed, {percent(routed[i, j])}."
        )


def _expectations(conflict: Conflict) -> Iterator[str]:
    for name, stack, merge in zip(  # combinations and silence stand in the table
        conflict.names, conflict.error("stack").tolist(), conflict.error("merge").tolist(), strict=False
    ):
        kept = f"routed, the layers keep {percent(1 - merge)} of its effect"
        if math.isnan(merge):
            yield f"{name} has no effect on its own prompts: does it need a trigger word?"
        elif merge > WEAK:
            yield (
                f"Expect losses of {name}: {kept}. To most of them its prompts look like the others'. Prompts that "
                "differ more from theirs help, and more of them; or a higher strength of it."
            )
        elif merge > FAIR:
            yield f"Expect some losses of {name}: {kept}. More prompts and steps help."
        else:
            better = f"; stacked, they would be off by {percent(stack)}" if stack > 2 * merge > 2 * NOTABLE else ""
            yield f"Expect {name} nearly as it is alone: {kept}{better}."


def _leftovers(conflict: Conflict) -> str:
    """Where most of what routing cannot mend is."""
    left = {
        block: float((sum(one.merge for one in sites) / conflict.effect).nan_to_num(posinf=0).sum())
        for block, sites in conflict.blocks.items()
    }
    where = _where(most_of(left, 0.5), conflict)
    if not sum(left.values()) or where == EVERYWHERE:
        return ""
    return f"Half of what routing leaves is {where.removeprefix('most ')}: if a LoRA comes out wrong, look there first."


def _where(blocks: Sequence[str], conflict: Conflict) -> str:
    """Only if it is a part of the model that can be named."""
    few = len(blocks) <= max(1, len(conflict.blocks) / 3)
    return f"most in {_ranges(blocks)}" if few and _ranges(blocks).count(",") < 4 else EVERYWHERE


def _recommended_rank(conflict: Conflict) -> str:
    good = [rank for rank in RANKS if rank < conflict.rank and conflict.lost_at(rank) < LOSS]
    if not good:
        return ""
    return f"A rank of {good[0]} in SSR Solve loses {percent(conflict.lost_at(good[0]))} of the effect."


def _ranges(blocks: Sequence[str]) -> str:
    """Consecutive blocks in short: double_blocks.3-5, final_layer."""
    runs: list[tuple[str, list[int]]] = []
    for block in blocks:
        stem, _, number = block.rpartition(".")
        if not number.isdigit():
            runs.append((block, []))
        elif runs and runs[-1][0] == stem and runs[-1][1] and runs[-1][1][-1] == int(number) - 1:
            runs[-1][1].append(int(number))
        else:
            runs.append((stem, [int(number)]))
    return ", ".join(_run(stem, numbers) for stem, numbers in runs)


def _run(stem: str, numbers: Sequence[int]) -> str:
    if not numbers:
        return stem
    return f"{stem}.{numbers[0]}" + (f"-{numbers[-1]}" if len(numbers) > 1 else "")


def _figure(value: float | Tensor) -> str:
    return "-" if math.isnan(float(value)) else f"{float(value):.3f}"
