"""Account: what became of every tensor of a LoRA file. Nothing is dropped in silence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum


class Fate(Enum):
    ROUTED = "routed"
    EXPANDED = "made low-rank and routed"
    SUMMED = "norm, bias and other differences, summed"
    TEXT = "of the text encoder, summed (connect clip to SSR Collect Stats to route them)"
    REPLACES = "replace a weight"
    DORMANT = "change nothing (alpha 0 or all zero)"
    OVERWRITTEN = "left out, as ComfyUI does: another tensor of the file changes the same weight"
    UNREAD = "left out, as ComfyUI does: incomplete, or of a kind that it does not read"
    UNMATCHED = "left out: they name nothing in this model"


LEFT_OUT = (Fate.OVERWRITTEN, Fate.UNREAD, Fate.UNMATCHED)


@dataclass(frozen=True)
class Expanded:
    """An adapter that is no plain LoRA, or a full difference, and what was made of it."""

    kind: str  # "LoHa", "DoRA", ...
    layer: str
    rank: int
    kept: float  # share of its squared norm
    weighed: float  # its squared norm
    on_base: bool  # whether it was computed from the base's own weight


@dataclass(frozen=True)
class Account:
    """What became of every tensor of a LoRA file."""

    fates: Mapping[str, Fate]  # by key of the file
    expanded: tuple[Expanded, ...] = ()

    def lines(self, name: str) -> Iterator[str]:
        """For the report."""
        counts = Counter(self.fates.values())
        parts = []
        for fate in Fate:
            if counts[fate]:
                example = next(key for key, found in self.fates.items() if found is fate)
                parts.append(f"{counts[fate]} {fate.value}" + (f", such as {example}" if fate in LEFT_OUT else ""))
        yield f"{name}, {len(self.fates)} tensors: {'; '.join(parts)}."
        if self.expanded:
            yield f"{name}: {self._expansions()}"
        if kinds := sorted({one.kind for one in self.expanded if one.on_base}):
            yield f"{name}: {' and '.join(kinds)} depend on the base's weights, so the merge holds for this base only."

    def _expansions(self) -> str:
        kinds = Counter(one.kind for one in self.expanded)
        counted = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
        worst = min(self.expanded, key=lambda one: one.kept)
        total = sum(one.weighed for one in self.expanded)
        kept = sum(one.kept * one.weighed for one in self.expanded) / total if total else 1.0
        text = f"{counted} layers became low-rank, of rank {max(one.rank for one in self.expanded)} at most"
        if worst.kept > 1 - 1e-4:
            return f"{text}, exactly."
        return (
            f"{text}, keeping {100 * kept:.1f} % of their energy (least: {100 * worst.kept:.1f} % at {worst.layer}). "
            "A higher expand_rank in SSR Collect Stats keeps more."
        )
