"""Calibration: the LoRAs, their joint subspaces and all that was measured in them. What a merge is made from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..errors import StatisticsError
from ..lora.lora import Lora, find_order
from ..lora.site import Site
from ..lora.subspace import Subspace
from .case import Case, singles
from .correction import Correction
from .sufficient_statistics import SufficientStatistics


@dataclass(frozen=True, eq=False)
class Calibration:
    """Statistics of K LoRAs in C cases. `statistics` has an entry for every site, unless there is only one LoRA."""

    loras: tuple[Lora, ...]
    subspaces: Mapping[Site, Subspace]
    statistics: Mapping[Site, SufficientStatistics]
    corrections: Mapping[Site, Correction] = field(default_factory=dict)  # of sites that a merge was tried at
    cases: tuple[Case, ...] = ()  # (C,) the first K are each LoRA by itself; given empty, there are no others
    measured: bool = True  # False: only expected, from the LoRAs' weights

    def __post_init__(self) -> None:
        object.__setattr__(self, "cases", self.cases or singles(len(self.loras)))

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(lora.name for lora in self.loras)

    @property
    def tokens(self) -> tuple[int, ...]:
        """(C,) tokens seen by the busiest site, per case."""
        return tuple(max((s.tokens[c] for s in self.statistics.values()), default=0) for c in range(len(self.cases)))

    def check_measured(self) -> None:
        """Raise StatisticsError unless a model was run for this."""
        if not self.measured:
            raise StatisticsError(
                f"Nothing was measured of {', '.join(self.names)}; this is what their weights alone let one expect "
                "(steps 0). It can be merged, but neither saved, added nor reported on. Collect with steps above 0."
            )

    def __add__(self, other: Calibration) -> Calibration:
        """Both calibrations of the same LoRAs together: more prompts, more cases, or another machine's.

        Raises:
            StatisticsError: they are of other LoRAs, or were not measured.
        """
        self.check_measured()
        other.check_measured()
        if self.subspaces.keys() != other.subspaces.keys():
            raise StatisticsError(
                f"These statistics are of other LoRAs ({', '.join(self.names)} and {', '.join(other.names)}); "
                "only statistics of the same LoRAs in the same order add up."
            )
        cases = tuple(dict.fromkeys((*self.cases, *other.cases)))
        a, b = self._in_cases(cases), other._in_cases(cases)
        sums = {site: statistics + b.statistics[site] for site, statistics in a.statistics.items()}
        corrections = {**a.corrections, **b.corrections}
        for site in a.corrections.keys() & b.corrections.keys():
            corrections[site] = a.corrections[site] + b.corrections[site]
        return Calibration(self.loras, self.subspaces, sums, corrections, cases)

    def _in_cases(self, cases: tuple[Case, ...]) -> Calibration:
        """The same with these cases in this order, of which it may lack some."""
        if cases == self.cases:
            return self
        where = [self.cases.index(case) if case in self.cases else None for case in cases]
        return self._chosen(self.loras, self.subspaces, where, cases, lambda space: torch.arange(len(space.down)))

    def ordered_as(self, loras: Sequence[Lora]) -> Calibration:
        """The same with its LoRAs in the order of these, which bring their own strengths.

        Raises:
            StatisticsError: these are other LoRAs; says which.
        """
        try:
            order = find_order(self.names, [lora.fingerprint for lora in self.loras], loras)
        except StatisticsError as error:
            raise StatisticsError(f"These statistics were {error}") from None
        return self.reordered(order, loras)

    def reordered(self, order: Sequence[int], loras: Sequence[Lora] | None = None) -> Calibration:
        """The LoRAs in another order: the new k-th is the old order[k], or the k-th of `loras`, which is the same."""
        loras = tuple(loras or (self.loras[task] for task in order))
        if tuple(order) == tuple(range(len(self.loras))):
            return replace(self, loras=loras)
        spaces = {site: space.reordered(order) for site, space in self.subspaces.items()}
        moved = [case.reordered(order) for case in self.cases]
        cases = (*singles(len(loras)), *moved[len(loras) :])
        where = [moved.index(case) for case in cases]
        chosen = self._chosen(loras, spaces, where, cases, lambda space: space.rows_reordered(order))
        corrections = {
            site: replace(found, strengths=tuple(found.strengths[task] for task in order))
            for site, found in chosen.corrections.items()
        }
        return replace(chosen, corrections=corrections)

    def without(self, task: int) -> Calibration:
        """As if LoRA `task` had never been there; the others need no new calibration.

        So are the cases in which it spoke. Corrections are of a merge in which it was, so none are left.
        """
        Case.of(task, len(self.loras))  # raises where there is none
        kept = {site: space for site, space in self.subspaces.items() if space.present != (task,)}
        spaces = {site: space.without(task) for site, space in kept.items()}
        cases = {number: case for number, old in enumerate(self.cases) if (case := old.without(task)) is not None}
        measured = self.statistics.items()
        routed = {site: seen for site, seen in measured if site in spaces and spaces[site].is_routed}
        rest = replace(self, subspaces=kept, statistics=routed, corrections={})
        loras = self.loras[:task] + self.loras[task + 1 :]
        where, named = list(cases), tuple(cases.values())
        return rest._chosen(loras, spaces, where, named, lambda space: space.rows_without(task))

    def _chosen(
        self,
        loras: tuple[Lora, ...],
        spaces: Mapping[Site, Subspace],
        where: Sequence[int | None],
        cases: tuple[Case, ...],
        rows: Callable[[Subspace], Tensor],
    ) -> Calibration:
        """What was measured, as measured in other subspaces.

        Args:
            where: which of today's cases each of `cases` is; None: one that saw nothing.
            rows: of today's subspace, those that the other one has.
        """
        kept = {site: rows(self.subspaces[site]) for site in self.statistics}
        statistics = {
            site: seen.chosen(where, kept[site], spaces[site].fingerprint) for site, seen in self.statistics.items()
        }
        corrections = {
            site: found.chosen(where, kept[site], spaces[site].fingerprint, found.strengths)
            for site, found in self.corrections.items()
        }
        return Calibration(loras, spaces, statistics, corrections, cases, self.measured)
