"""Summary: the two sentences on top of a report, what is kept and what to do next."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ..statistics.case import Case, unheard
from .likeness import Likeness

WEAK, FAIR = 0.5, 0.2  # errors from which on a LoRA comes out weak, or with losses
SLIGHT = 0.05  # of the whole effect: an error that nobody sees
FEW_LEVELS = 4  # noise levels; with fewer the prior decides more than a person would expect
MOST = 4  # LoRAs that are named one by one


@dataclass(frozen=True)
class Summary:
    """What is known of a merge, or of the one that SSR Solve would make."""

    names: tuple[str, ...]
    cases: tuple[Case, ...]  # (C,)
    stack: tuple[float, ...]  # (C,) errors of the plain stack, 0 = as these LoRAs alone; NaN if not known
    merge: tuple[float, ...]  # (C,) of the merge
    coverage: int = FEW_LEVELS  # noise levels, or samples, that were seen
    alike: tuple[Likeness, ...] = ()  # LoRAs that are one and the same
    made: bool = True  # whether the merge is there already
    refined: bool = False  # whether it keeps more than is told

    def __str__(self) -> str:
        return f"{self._kept()}\n{self._next()}"

    def _kept(self) -> str:
        """Of each LoRA by itself, and of them together."""
        seen = [i for i in self._singles if not math.isnan(self.merge[i])]
        drowned = [i for i in seen if WEAK < self.merge[i] < self.stack[i] / 2]
        known = [(self.names[i], self.stack[i], self.merge[i]) for i in seen if i not in drowned]
        unsaid = "".join(f" {self._drowned(i)}" for i in drowned)
        if not known:
            return unsaid.strip() or "Nothing was measured, so it is not known what the merge keeps."
        names, stack, merge = zip(*known, strict=True)
        verb = "keeps" if self.made else "would keep"
        least = " at least" if self.refined else ""
        said = f"In its layers the merge {verb}{least} {_shares(names, merge)}"
        if together := [self.merge[i] for i, case in enumerate(self.cases) if case.is_combination]:
            whole = [error for error in together if not math.isnan(error)]
            said += f", and {_range(whole)} of what they do together" if whole else ""
        return f"{said}; loaded one after the other, they would keep {_shares(names, stack, named=False)}.{unsaid}"

    def _drowned(self, task: int) -> str:
        """Of a quiet LoRA among loud ones: what is left of them in a layer is more than itself, and hardly visible."""
        name, merge, stack = self.names[task], self.merge[task], self.stack[task]
        return (
            f"Of {name} the layers tell little, as the others are louder there than it is (error {merge:.2f}, stacked "
            f"{stack:.2f}); pictures are mostly nearer."
        )

    def _next(self) -> str:
        """The first thing that is worth doing."""
        if len(self.names) == 1:
            return (
                f"Next: there is only {self.names[0]}, and nothing to merge it with. Connect `tasks` of each SSR Add "
                "LoRA to the next one."
            )
        if self.alike:
            return self.alike[0].advice(self.names)
        if self.coverage < FEW_LEVELS:
            return f"Next: collect again with {FEW_LEVELS} steps or more; what was seen is too little to go by."
        lost = [(self.merge[i], self.names[i]) for i in self._singles if self.merge[i] > FAIR]
        if lost:
            error, name = max(lost)
            how = "Prompts that differ more from those of the others, and more of them, help"
            more = "; or a higher strength of it" if error > WEAK else "; eight steps, too"
            return f"Next: look at {name} with SSR Compare, as it loses the most. {how}{more}."
        if all(self.stack[i] < SLIGHT for i in self._singles):
            return "Next: load the LoRAs one after the other; they hardly disturb each other, and a merge gains little."
        if pair := next(unheard(self.cases, len(self.names)), None):
            both = " and ".join(self.names[task] for task in pair)
            return (
                f"Next: if you want {both} in one picture, add prompts that ask for both (SSR Add Combination, or "
                "`combinations`) and collect again; else look at it with SSR Compare."
            )
        if self.made:
            return "Next: look at it with SSR Compare on prompts of your own, and save it with SSR Save LoRA."
        return "Next: merge them with SSR Solve, and look at it with SSR Compare."

    @property
    def _singles(self) -> range:
        return range(len(self.names))


def percent(share: float | Tensor) -> str:
    """Short, as people say it: 3.1 %, 42 %."""
    value = 100 * float(share)
    if 0 < value < 0.05:
        return "<0.1 %"
    return "-" if math.isnan(value) else f"{value:.0f} %" if abs(value) >= 9.5 or not value else f"{value:.1f} %"


def _shares(names: Sequence[str], errors: Sequence[float], named: bool = True) -> str:
    """What is left of each; of many the mean, and who is left the least."""
    kept = [max(0.0, 1 - error) for error in errors]
    if len(names) <= MOST:
        return _listed(
            [f"{percent(share)}{f' of {name}' if named else ''}" for share, name in zip(kept, names, strict=True)]
        )
    least, name = min(zip(kept, names, strict=True))
    return f"{percent(sum(kept) / len(kept))} of the LoRAs on average, at least {percent(least)} ({name})"


def _range(errors: Sequence[float]) -> str:
    kept = sorted(max(0.0, 1 - error) for error in errors)
    least, most = percent(kept[0]), percent(kept[-1])
    return least if least == most else f"{least.removesuffix(' %')} to {most}"


def _listed(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
