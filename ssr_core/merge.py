"""merge(): from a calibration to one LoRA. The only loop over sites."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from .calibration import Calibration
from .diagnostics import Report, SiteReport, residuals
from .errors import SSRError, StatisticsError
from .low_rank_update import LowRankUpdate
from .rank import isotropic_factor, truncate
from .router import Ridge, normal_equations, route, solve_router
from .site import Site
from .subspace import Subspace
from .sufficient_statistics import SufficientStatistics


@dataclass(frozen=True)
class MergeSettings:
    """Everything that can be chosen after collecting; none of it needs new statistics."""

    ridge: Ridge = field(default_factory=Ridge)
    rank: float = 0  # of each site: 0 = the joint rank, 1 or more = at most so many, between 0 and 1 = energy to keep
    routing: float = 1.0  # 0 = the plain stack, 1 = fully routed
    strengths: tuple[float, ...] | None = None  # (K,) instead of the LoRAs' own
    weights: tuple[float, ...] | None = None  # (K,) how much each task's tokens count
    balanced: bool = True  # whether a task counts the same however many tokens it saw
    count_absent: bool = True  # whether tokens of a task count where it has no LoRA, to be left alone there

    PAPER: ClassVar[MergeSettings]

    def check(self, tasks: int) -> None:
        """Raise SSRError for a value that cannot be meant."""
        if not 0 <= self.routing <= 1:
            raise SSRError(f"routing is {self.routing}; it goes from 0 (the plain stack) to 1 (fully routed).")
        if not math.isfinite(self.rank) or self.rank < 0 or (self.rank >= 1 and self.rank != int(self.rank)):
            raise SSRError(f"rank is {self.rank}; give 0 (full), a whole number, or a share of energy between 0 and 1.")
        for name, values in (("strengths", self.strengths), ("weights", self.weights)):
            if values is not None and (len(values) != tasks or not all(map(math.isfinite, values))):
                raise SSRError(f"{name} must be {tasks} finite numbers, one per LoRA, not {values}.")
        if self.weights is not None and (min(self.weights) < 0 or max(self.weights) == 0):
            raise SSRError(f"weights are {self.weights}; they must not be negative, nor all zero.")
        penalties = (self.ridge.relative, self.ridge.floor, self.ridge.absolute)
        if not all(math.isfinite(p) and p >= 0 for p in penalties):
            raise SSRError(f"ridge is {self.ridge}; its penalties must be finite and not negative.")


MergeSettings.PAPER = MergeSettings(ridge=Ridge.PAPER, balanced=False, count_absent=False)


@dataclass(frozen=True, eq=False)
class Merge:
    """One LoRA made of several, and what is known about it."""

    updates: Mapping[Site, LowRankUpdate]  # float32
    report: Report


def merge(
    calibration: Calibration,
    settings: MergeSettings | None = None,
    on_site: Callable[[int, int], None] = lambda done, total: None,
) -> Merge:
    """Solve the router of every site and route.

    Args:
        on_site: called with (done, total) before each site; may raise to stop.

    Raises:
        SSRError: settings that cannot be meant.
        StatisticsError: statistics that do not belong to these LoRAs, or are not finite.
        SolveError: a correlation matrix is singular.
    """
    settings = settings or MergeSettings()
    settings.check(len(calibration.loras))
    strengths = settings.strengths or tuple(lora.strength for lora in calibration.loras)
    updates: dict[Site, LowRankUpdate] = {}
    reports: list[SiteReport] = []
    for done, (site, space) in enumerate(calibration.subspaces.items()):
        on_site(done, len(calibration.subspaces))
        scaled = space.scaled(strengths)
        if space.is_shared:
            update, report = _merge_shared(site, scaled, _statistics_of(calibration, site, space), settings)
        else:
            update, report = _pass_through(site, scaled, settings)
        updates[site] = LowRankUpdate(update.down.float().contiguous(), update.up.float().contiguous())
        reports.append(report)
    return Merge(updates, Report(calibration.names, strengths, tuple(reports)))


def _merge_shared(
    site: Site, scaled: Subspace, statistics: SufficientStatistics, settings: MergeSettings
) -> tuple[LowRankUpdate, SiteReport]:
    weights = _weights(statistics, scaled, settings)
    equations = normal_equations(statistics, scaled, weights, settings.ridge, site)
    router = torch.eye(scaled.rank, scaled.down.shape[0], dtype=torch.float64)
    if settings.routing:
        router = torch.lerp(router, solve_router(equations), settings.routing)
    # `up` R has the rank of `up`, so the rows of the context cost no rank and cutting to it loses nothing
    rank = settings.rank or (scaled.rank if scaled.context and settings.routing else 0)
    if not rank:
        update, energy = route(scaled, router) if settings.routing else scaled.plain_stack(), 1.0
    else:
        update, truncation = truncate(route(scaled, router), equations.factor, rank)
        router, energy = router @ truncation.projection, truncation.energy if settings.rank else 1.0
    kept = residuals(statistics, scaled, router)
    report = SiteReport(site, scaled.ranks, update.rank, statistics.tokens, kept, equations.condition, energy)
    return update, report


def _pass_through(site: Site, scaled: Subspace, settings: MergeSettings) -> tuple[LowRankUpdate, SiteReport]:
    """The update of the one task that has a LoRA here."""
    update, energy = scaled.task(scaled.present[0]), 1.0
    if settings.rank:
        update, truncation = truncate(update, isotropic_factor(update), settings.rank)
        energy = truncation.energy
    return update, SiteReport(site, scaled.ranks, update.rank, energy=energy)


def _weights(statistics: SufficientStatistics, subspace: Subspace, settings: MergeSettings) -> list[float]:
    """(K,) what each task's sums are multiplied with."""
    weights = list(settings.weights or [1.0] * len(statistics.tokens))
    if settings.balanced and (seen := [n for n in statistics.tokens if n]):
        mean = sum(seen) / len(seen)
        weights = [w * mean / n if n else 0.0 for w, n in zip(weights, statistics.tokens, strict=True)]
    if not settings.count_absent:
        weights = [w if rank else 0.0 for w, rank in zip(weights, subspace.ranks, strict=True)]
    return weights


def _statistics_of(calibration: Calibration, site: Site, space: Subspace) -> SufficientStatistics:
    statistics = calibration.statistics.get(site)
    if statistics is None:
        raise StatisticsError(f"There are no statistics for {site}; collect them again with these LoRAs.")
    statistics.check(space, site)
    return statistics
