"""Problem: the least squares of all sites, at the strengths and settings that were chosen."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch

from ..errors import StatisticsError
from ..lora.site import Site
from ..lora.subspace import Subspace
from ..statistics.calibration import Calibration
from ..statistics.correction import Correction
from ..statistics.sufficient_statistics import SufficientStatistics
from .diagnostics import residuals
from .merge_report import SiteReport
from .selection import treatment_of
from .settings import MergeSettings
from .solution import Solution, solve_site
from .weights import task_weights


@dataclass(frozen=True, eq=False)
class Problem:
    """What is to be solved, a site at a time.

    A solution is linear in what it should write. So with a `writer` it is what this LoRA contributes to the merge, and
    the solutions of all writers add up to the one without.
    """

    calibration: Calibration
    settings: MergeSettings
    writer: int | None = None  # the LoRA that alone is written; None: all

    @cached_property
    def strengths(self) -> tuple[float, ...]:
        """(K,)"""
        return self.settings.strengths or tuple(lora.strength for lora in self.calibration.loras)

    @cached_property
    def treatments(self) -> dict[Site, str]:
        """What the rules say of each site: keep, stack or drop."""
        return {site: treatment_of(site.module, self.settings.rules) for site in self.calibration.subspaces}

    @property
    def sites(self) -> list[Site]:
        spaces = self.calibration.subspaces.items()
        return [site for site, space in spaces if self.writer is None or space.ranks[self.writer]]

    @property
    def kept(self) -> list[Site]:
        return [site for site in self.sites if self.treatments[site] != "drop"]

    @property
    def looked(self) -> list[Site]:
        """Those that are solved before the rest, to spread a size over them."""
        return self.kept if self.settings.spread and self.settings.rank >= 1 else []

    @cached_property
    def _measured(self) -> dict[Site, SufficientStatistics]:
        """Of the sites that are routed.

        Raises:
            StatisticsError: they are missing, of other LoRAs, or not finite.
        """
        absent = self.settings.count_absent
        spaces = self.calibration.subspaces.items()
        routed = ((site, space) for site, space in spaces if space.is_shared or (space.is_routed and absent))
        return {site: _statistics_of(self.calibration, site, space) for site, space in routed}

    @cached_property
    def _weights(self) -> dict[Site, list[float]]:
        return task_weights(self.calibration, self.settings)

    @cached_property
    def _corrections(self) -> dict[Site, Correction]:
        wanted = self.settings.corrected and self.settings.routing
        return _corrections(self.calibration, self.strengths) if wanted else {}

    def check(self) -> None:
        """Look at all statistics before the first site is solved, in the caller's thread.

        Raises:
            StatisticsError: statistics that do not belong to these LoRAs, or are not finite.
        """
        _ = self._measured, self._weights, self._corrections

    def solve(self, site: Site) -> Solution:
        """At full rank.

        Raises:
            SolveError: its correlation matrix is singular.
        """
        statistics = self._measured.get(site)
        # nobody knows how to part what was never heard: a mean would weaken every LoRA there (the paper has no word)
        unheard = self.settings.ridge.prior and statistics is not None and not sum(statistics.tokens)
        routing = 0.0 if unheard or self.treatments[site] == "stack" else self.settings.routing
        correction = self._corrections.get(site)
        if correction is not None and self.writer is not None and correction.is_folded:
            correction = None  # of a sum over cases nobody knows whose part is whose
        if correction is not None and self.writer is not None:
            whole = self.calibration.subspaces[site].scaled(self.strengths)
            correction = correction.share(self.writer, whole, self.calibration.cases)
        how = (self._weights[site], self.settings.ridge, routing, self.calibration.cases)
        solution = solve_site(site, self._scaled(site), statistics, correction, *how)
        if correction is None or self.writer is not None or not routing:
            return solution
        return replace(solution, uncorrected=solve_site(site, self._scaled(site), statistics, None, *how))

    @property
    def is_refined(self) -> bool:
        """Whether corrections take part."""
        return bool(self._corrections) and bool(self.settings.routing)

    def rank_of(self, site: Site) -> float:
        """What a site is cut to where sizes are not spread; 0 = all of it. A part is no larger than its LoRA."""
        whole = 0 if self.writer is None else self.calibration.subspaces[site].ranks[self.writer]
        return self.settings.rank or whole

    def left_out(self, site: Site) -> SiteReport:
        """What is lost with a site."""
        scaled, statistics = self._scaled(site), self._measured.get(site)
        if statistics is None:
            return SiteReport(site, scaled.ranks, 0)
        nothing = torch.zeros(scaled.rank, scaled.down.shape[0], dtype=torch.float64)
        lost = residuals(statistics, scaled, nothing, cases=self.calibration.cases)
        return SiteReport(site, scaled.ranks, 0, statistics.tokens, lost)

    def cost(self, site: Site) -> int:
        """Numbers that a site's LoRA takes per rank."""
        space = self.calibration.subspaces[site]
        return len(space.up) + space.down[0].numel()

    def _scaled(self, site: Site) -> Subspace:
        heard = [0.0 if self.writer not in (None, task) else one for task, one in enumerate(self.strengths)]
        return self.calibration.subspaces[site].scaled(heard)


def _corrections(calibration: Calibration, strengths: tuple[float, ...]) -> dict[Site, Correction]:
    """Those that hold at these strengths."""
    found = {site: seen for site, seen in calibration.corrections.items() if seen.strengths == tuple(strengths)}
    for site, correction in found.items():
        correction.check(calibration.subspaces[site], site)
    return found


def _statistics_of(calibration: Calibration, site: Site, space: Subspace) -> SufficientStatistics:
    statistics = calibration.statistics.get(site)
    if statistics is None:
        raise StatisticsError(f"There are no statistics for {site}; collect them again with these LoRAs.")
    statistics.check(space, site)
    return statistics
