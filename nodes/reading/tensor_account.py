"""Account: what became of every tensor of a LoRA file. Nothing is dropped in silence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from torch import Tensor

from .keys import ADAPTER, is_bias, owner


class Fate(Enum):
    ROUTED = "routed"
    EXPANDED = "made low-rank and routed"
    SUMMED = "norm, bias and other differences, summed"
    TEXT = "of the text encoder, summed (connect clip to SSR Collect Stats to route them)"
    REPLACES = "replace a weight"
    OFF = "left out, being at strength 0"
    DROPPED = "left out as asked"
    DORMANT = "change nothing (alpha 0 or all zero)"
    OVERWRITTEN = "left out, as ComfyUI does: another tensor of the file changes the same weight"
    MISFIT = "left out, as ComfyUI does: of another size than this model's weights"
    UNREAD = "left out, as ComfyUI does: incomplete, or of a kind that it does not read"
    UNMATCHED = "left out: they name nothing in this model"


LEFT_OUT = (Fate.OVERWRITTEN, Fate.MISFIT, Fate.UNREAD, Fate.UNMATCHED)
UNUSED = (Fate.DORMANT, Fate.OFF, Fate.DROPPED)
LOSS = 0.05  # of the energy of all layers that became low-rank: more is told before anything is sampled


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
    notes: tuple[str, ...] = ()  # what else there is to say of the file

    def lines(self, name: str) -> Iterator[str]:
        """For the report."""
        counts = Counter(self.fates.values())
        parts = []
        for fate in Fate:
            if counts[fate]:
                example = next(key for key, found in self.fates.items() if found is fate)
                parts.append(f"{counts[fate]} {fate.value}" + (f", such as {example}" if fate in LEFT_OUT else ""))
        yield f"{name}, {len(self.fates)} tensors: {'; '.join(parts)}."
        yield from (f"{name}: {note}" for note in self.notes)
        if self.expanded:
            yield f"{name}: {self._expansions()}"
        if kinds := sorted({one.kind for one in self.expanded if one.on_base}):
            yield f"{name}: {' and '.join(kinds)} depend on the base's weights, so the merge holds for this base only."

    def warnings(self, name: str) -> Iterator[str]:
        """What a person would want to know before anything is sampled."""
        yield from (f"{name}: {note}" for note in self.notes)
        if misfits := [key for key, fate in self.fates.items() if fate is Fate.MISFIT]:
            yield f"{name}: {len(misfits)} tensors are {Fate.MISFIT.value}, such as {misfits[0]}."
        if self.expanded and self._kept < 1 - LOSS:
            yield f"{name}: {self._expansions()}"

    @property
    def _kept(self) -> float:
        total = sum(one.weighed for one in self.expanded)
        return sum(one.kept * one.weighed for one in self.expanded) / total if total else 1.0

    def _expansions(self) -> str:
        kinds = Counter(one.kind for one in self.expanded)
        counted = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
        worst = min(self.expanded, key=lambda one: one.kept)
        text = f"{counted} layers became low-rank, of rank {max(one.rank for one in self.expanded)} at most"
        if worst.kept > 1 - 1e-4:
            return f"{text}, exactly."
        return (
            f"{text}, keeping {100 * self._kept:.1f} % of their energy (least: {100 * worst.kept:.1f} % at "
            f"{worst.layer}). A higher expand_rank in SSR Collect Stats keeps more."
        )


def fates_of(
    tensors: Mapping[str, Tensor],
    key_map: Mapping[str, Any],
    of_model: Mapping[int, Fate],
    of_text: Mapping[int, Fate],
    summed_text: bool,
) -> dict[str, Fate]:
    """Of every tensor of a file. Those that ComfyUI only read a number from share the fate of their weight's.

    Args:
        key_map: ComfyUI's, from names to weights.
        of_model, of_text: by the identity of the tensors that ComfyUI took, what became of them in either network.
        summed_text: whether the text encoder's are only summed.
    """
    if summed_text:
        of_text = {key: fate if fate in UNUSED else Fate.TEXT for key, fate in of_text.items()}
    taken = {**of_model, **of_text}
    names = {key: owner(key, key_map) for key in tensors}
    # what a tensor changes: which weight or slice of one, and whether it is its bias
    targets = {key: (str(key_map.get(name)), is_bias(key)) for key, name in names.items()}
    of_target = {targets[key]: taken[id(value)] for key, value in tensors.items() if id(value) in taken}
    adapted = {names[key] for key, value in tensors.items() if id(value) in taken and not is_bias(key)}
    fates = {}
    for key, value in tensors.items():
        name, weight = names[key], of_target.get(targets[key])
        if id(value) in taken:
            fates[key] = taken[id(value)]
        elif not name:
            fates[key] = Fate.UNMATCHED
        elif weight is None or not ADAPTER.fullmatch(key):
            fates[key] = Fate.UNREAD
        else:
            number = name in adapted and key.endswith((".alpha", ".reshape_weight"))
            fates[key] = weight if number else Fate.OVERWRITTEN
    return fates
