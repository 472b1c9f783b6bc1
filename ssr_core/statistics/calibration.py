"""Calibration: the LoRAs, their joint subspaces and all that was measured in them. What a merge is made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from ..errors import StatisticsError
from ..lora.lora import Lora, find_order
from ..lora.site import Site
from ..lora.subspace import Subspace
from .correction import Correction
from .sufficient_statistics import SufficientStatistics

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Calibration:
    """Statistics of K LoRAs. `statistics` has an entry for every site, unless there is only one LoRA."""

    loras: tuple[Lora, ...]
    subspaces: Mapping[Site, Subspace]
    statistics: Mapping[Site, SufficientStatistics]
    corrections: Mapping[Site, Correction] = field(default_factory=dict)  # of sites that a merge was tried at

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(lora.name for lora in self.loras)

    @property
    def tokens(self) -> tuple[int, ...]:
        """(K,) tokens seen by the busiest site, per task."""
        return tuple(max((s.tokens[k] for s in self.statistics.values()), default=0) for k in range(len(self.loras)))

    def __add__(self, other: Calibration) -> Calibration:
        """Both calibrations of the same LoRAs together: more prompts, more steps, or another machine's.

        Raises:
            StatisticsError: they are of other LoRAs.
        """
        if self.subspaces.keys() != other.subspaces.keys():
            raise StatisticsError(
                f"These statistics are of other LoRAs ({', '.join(self.names)} and {', '.join(other.names)}); "
                "only statistics of the same LoRAs in the same order add up."
            )
        sums = {site: statistics + other.statistics[site] for site, statistics in self.statistics.items()}
        corrections = {**self.corrections, **other.corrections}
        for site in self.corrections.keys() & other.corrections.keys():
            corrections[site] = self.corrections[site] + other.corrections[site]
        return Calibration(self.loras, self.subspaces, sums, corrections)

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
        statistics, corrections = {}, {}
        for site, seen in self.statistics.items():
            rows = self.subspaces[site].rows_reordered(order)
            statistics[site] = SufficientStatistics(
                seen.grams.chosen(order, rows),
                *(_picked(seen.tokens, order), spaces[site].fingerprint),
                *(_picked(seen.samples, order), _picked(seen.levels, order)),
            )
            if (correction := self.corrections.get(site)) is not None:
                corrections[site] = Correction(
                    correction.grams.chosen(order, rows),
                    tuple(t[:, rows] if t.numel() else t for t in _picked(correction.targets, order)),
                    *(spaces[site].fingerprint, _picked(correction.strengths, order)),
                )
        return Calibration(loras, spaces, statistics, corrections)

    def without(self, task: int) -> Calibration:
        """As if LoRA `task` had never been there; the others need no new calibration.

        Corrections are of a merge in which it was, so none are left.
        """
        check_task(task, self.loras)
        kept = {
            site: (space.without(task), self.statistics.get(site), space)
            for site, space in self.subspaces.items()
            if space.present != (task,)
        }
        return Calibration(
            self.loras[:task] + self.loras[task + 1 :],
            {site: space for site, (space, _, _) in kept.items()},
            {
                site: statistics.without(task, whole)
                for site, (space, statistics, whole) in kept.items()
                if statistics is not None and space.is_routed
            },
        )


def check_task(task: int, loras: Sequence[Lora]) -> None:
    """Raise StatisticsError unless `task` is the number of a LoRA."""
    if not 0 <= task < len(loras):
        raise StatisticsError(f"There is no task {task}; tasks are numbered from 0 to {len(loras) - 1}.")


def _picked(values: Sequence[T], order: Sequence[int]) -> tuple[T, ...]:
    return tuple(values[task] for task in order)
