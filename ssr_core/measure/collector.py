"""StatisticsCollector: runs LoRAs on a model, a case at a time, and gathers their statistics; no weight is touched."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..errors import LoraError, StatisticsError
from ..lora.lora import Lora
from ..lora.low_rank_update import LowRankUpdate
from ..lora.site import Site
from ..lora.subspace import Subspace, join_loras
from ..statistics.calibration import Calibration
from ..statistics.case import Case, singles
from ..statistics.correction import Correction
from ..statistics.sufficient_statistics import SufficientStatistics
from .recording import Recording
from .refinement import Refinement, Uncompared
from .requirement import Requirement, groups_of, statistics_dtype, targets_dtype
from .survey import Survey

CONTEXT = 128  # context rows per layer


class StatisticsCollector:
    """Collects the statistics of K LoRAs on one model.

    >>> collector = StatisticsCollector([cat, dog])
    >>> for task, batch in enumerate(batches):
    ...     with torch.no_grad(), collector.watching(model, task):  # LoRA `task` is active inside
    ...         model(**batch)
    >>> with torch.no_grad(), collector.watching(model, (0, 1)):  # both are: a picture that asks for both
    ...     model(**both)
    >>> calibration = collector.calibration()

    A case is the number of a LoRA, or those of several that are active together; none, (), is silence: prompts where no
    LoRA should speak.
    """

    def __init__(
        self, loras: Sequence[Lora], subspaces: Mapping[Site, Subspace] | None = None, combinations: int = 0
    ) -> None:
        """`subspaces` of an earlier calibration of the same LoRAs, so that the statistics of both add up.

        `combinations`: how many cases there will be beside those of one LoRA, as far as is known; only the precision in
        which very large statistics are kept depends on it.
        """
        if not loras:
            raise LoraError("There is no LoRA to collect statistics for; give at least one.")
        self.loras = tuple(loras)
        self.subspaces = dict(subspaces or join_loras(loras))
        if not self.subspaces:
            raise LoraError(f"None of {', '.join(lora.name for lora in loras)} holds a low-rank update.")
        self._cases = list(singles(len(self.loras)))
        self._combinations = combinations
        self._statistics: dict[Site, SufficientStatistics] = {}
        self._corrections: dict[Site, Correction] = {}
        self._names: dict[str, str] = {}
        self.survey = Survey()
        self.uncompared: dict[str, Uncompared] = {}  # modules of which no case is refined, and why

    @contextmanager
    def watching(self, model: nn.Module, case: int | Sequence[int]) -> Iterator[Recording]:
        """Inside the block the LoRAs of a case are active on `model` and its tokens are counted.

        A transaction: statistics are added only if the block ends without an exception. Hooks always come off.

        Raises:
            ModelMismatchError: a LoRA writes to a layer that the model lacks or that has another size.
            StatisticsError: activations were not finite.
        """
        with self.recording(case) as recording:
            recording.attach(model)
            yield recording

    @contextmanager
    def surveying(self, model: nn.Module, case: int | Sequence[int], rows: int = CONTEXT) -> Iterator[Recording]:
        """Like `watching`, but to find up to `rows` context rows per layer. A short run of every LoRA will do.

        Call it for each of them before the first `watching`; then `see` fixes the rows.
        """
        with self.recording(case, rows) as recording:
            recording.attach(model)
            yield recording

    @contextmanager
    def refining(
        self, model: nn.Module, case: int | Sequence[int], updates: Mapping[Site, LowRankUpdate]
    ) -> Iterator[Refinement]:
        """Compare a merge, given by its updates, with a case's LoRAs; a second merge then makes up for the first.

        >>> with torch.no_grad(), collector.refining(model, case, merge(collector.calibration()).updates) as run:
        ...     with run.alone():
        ...         model(**batch)
        ...     with run.merged():
        ...         model(**batch)
        """
        with self.refinement(case, updates) as refinement:
            refinement.attach(model)
            yield refinement

    @contextmanager
    def refinement(
        self,
        case: int | Sequence[int],
        updates: Mapping[Site, LowRankUpdate],
        modules: frozenset[str] | None = None,
        weights: Mapping[Site, Sequence[float]] | None = None,
    ) -> Iterator[Refinement]:
        """Like `refining`, for hosts that decide themselves when the hooks go on and off.

        `modules` that are compared, one of `groups`; None = all. All groups together give the same.
        `weights` (C,) by site, of the merge to come: all cases are summed with them and take the memory of one.
        """
        speaking, number = self._numbered(case)
        known = {self._renamed(site): site for site in self.subspaces}
        ours = {known.get(site, site): update for site, update in updates.items()}
        strengths = [lora.strength for lora in self.loras]
        refinement = Refinement(
            *(self.subspaces, ours, number, speaking.speakers, strengths),
            modules=modules,
            dtype=targets_dtype(self.subspaces, len(self._cases)) if weights is None else torch.float32,
        )
        try:
            yield refinement
        finally:
            refinement.close()
        found = dict(refinement.corrections())
        refinement.clear()
        self._know(speaking, number)
        self.uncompared.update(refinement.uncompared)
        for site, seen in found.items():
            if weights is not None:
                of_site = weights[self._renamed(site)]
                seen = seen.folded([weight / of_site[0] for weight in of_site[: len(seen.targets)]])
            self._corrections[site] = self._corrections[site] + seen if site in self._corrections else seen
        for site in [site for site in self._corrections if site.module in self.uncompared]:
            del self._corrections[site]

    @contextmanager
    def recording(self, case: int | Sequence[int], survey: int = 0, tokens: int = 0) -> Iterator[Recording]:
        """Like `watching`, for hosts that decide themselves when the hooks go on (`attach`) and off (`detach`).

        `survey` makes it one of `surveying`, with so many context rows. `tokens` of each layer and forward pass are
        counted at most, chosen at random; 0 = all.
        """
        speaking, number = self._numbered(case)
        active = {task: self.loras[task].strength for task in speaking.speakers}
        recording = Recording(self.subspaces, number, active, survey, tokens, self.survey.shared, self._dtype)
        try:
            yield recording
        finally:
            recording.close()
        if survey:
            self.survey.add(recording, survey)
        else:
            self._know(speaking, number)
        self._statistics.update(self._sums_with(recording))
        self._names.update(recording.names)
        recording.clear()

    def see(self, rows: int = CONTEXT) -> None:
        """Give every subspace the context rows that the surveys found, or the first `rows` of them."""
        if self._statistics:
            raise StatisticsError("Context rows cannot be added once statistics are collected; survey first.")
        routed = [site for site, space in self.subspaces.items() if space.is_routed]
        found = self.survey.spend((site.module for site in routed), rows)
        for site in routed:
            if site.module in found:
                self.subspaces[site] = self.subspaces[site].with_context(found[site.module])

    @property
    def _dtype(self) -> torch.dtype:
        """What statistics are kept in."""
        sizes = [len(space.down) for space in self.subspaces.values() if space.is_routed]
        return statistics_dtype(sizes, len(self.loras) + self._combinations)

    def requirement(
        self,
        context: int = 0,
        refine: bool = False,
        dtype: torch.dtype = torch.float32,
        **how: Any,
    ) -> Requirement:
        """The memory that collecting will take, see Requirement.of; known better once something was measured."""
        seen = self._statistics.items()
        tokens = {site: -(-sum(one.tokens) // max(1, sum(one.samples))) for site, one in seen if sum(one.tokens)}
        return Requirement.of(self.subspaces, context, refine, dtype, self._combinations, tokens=tokens, **how)

    def groups(self, count: int) -> list[frozenset[str]]:
        """Modules in groups that refinements can be run for one after the other, if memory is short."""
        return groups_of(self.subspaces, count)

    def calibration(self) -> Calibration:
        """Everything collected so far. Sites carry the names of the model's modules."""
        renamed = self._renamed
        return Calibration(
            tuple(self._views(task) for task in range(len(self.loras))),
            {renamed(site): space for site, space in self.subspaces.items()},
            {renamed(site): self._so_far(site) for site, space in self.subspaces.items() if space.is_routed},
            {renamed(site): correction.padded(len(self._cases)) for site, correction in self._corrections.items()},
            tuple(self._cases),
        )

    def _views(self, task: int) -> Lora:
        """The LoRA with its factors where the joint subspaces keep them, so that nothing is in memory twice."""
        lora = self.loras[task]
        updates = {}
        for site, update in lora.updates.items():
            space = self.subspaces.get(site)  # None where another LoRA cuts the site into slices
            updates[site] = space.task(task) if space is not None and space.ranks[task] == update.rank else update
        return replace(lora, updates=updates)

    def _renamed(self, site: Site) -> Site:
        return Site(self._names.get(site.module, site.module), site.start, site.stop, site.out_features)

    def _sums_with(self, recording: Recording) -> dict[Site, SufficientStatistics]:
        sums = {}
        for site, seen in recording.statistics():
            seen.check(self.subspaces[site], site)
            sums[site] = self._so_far(site) + seen
        return sums

    def _so_far(self, site: Site) -> SufficientStatistics:
        found = self._statistics.get(site) or SufficientStatistics.empty(self.subspaces[site])
        return found.padded(len(self._cases))

    def _numbered(self, which: int | Sequence[int]) -> tuple[Case, int]:
        """A case and its number, be it new."""
        case = Case.of(which, len(self.loras))
        return case, self._cases.index(case) if case in self._cases else len(self._cases)

    def _know(self, case: Case, number: int) -> None:
        """Of a case that was run, without an error."""
        self._cases[number:] = self._cases[number:] or [case]
