"""merge(): from a calibration to one LoRA. The only loop over sites."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import SolveError, SSRError, StatisticsError
from ..lora.low_rank_update import LowRankUpdate
from ..lora.site import Site
from ..lora.subspace import Subspace
from ..parallel import each
from ..statistics.calibration import Calibration
from ..statistics.correction import Correction
from ..statistics.sufficient_statistics import SufficientStatistics
from .diagnostics import Report, SiteReport, effects, residuals
from .rank import Directions, spread_ranks
from .router import Ridge
from .selection import Rule, treatment_of
from .solution import Solution, solve_site


@dataclass(frozen=True)
class MergeSettings:
    """Everything that can be chosen after collecting; none of it needs new statistics."""

    ridge: Ridge = field(default_factory=Ridge)
    rank: float = 0  # 0 = the joint rank, 1 or more = that of the result, between 0 and 1 = energy that each site keeps
    spread: bool = True  # whether sites that need more than `rank` may take from those that need less
    routing: float = 1.0  # 0 = the plain stack, 1 = fully routed
    strengths: tuple[float, ...] | None = None  # (K,) instead of the LoRAs' own
    weights: tuple[float, ...] | None = None  # (K,) how much each task's tokens count
    balanced: bool = True  # whether tasks count the same however strong they are and however many tokens they saw
    corrected: bool = True  # whether corrections count, if there are any
    count_absent: bool = True  # whether tokens of a task count where it has no LoRA, to be left alone there
    rules: tuple[Rule, ...] = ()  # layers that are stacked without routing, or left out

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
        penalties = (self.ridge.relative, self.ridge.scarcity, self.ridge.floor, self.ridge.absolute)
        if not all(math.isfinite(p) and p >= 0 for p in penalties):
            raise SSRError(f"ridge is {self.ridge}; its penalties must be finite and not negative.")


REMEMBERED_BYTES = 2**30  # of solutions that are kept between the two passes over the sites that spread ranks take

MergeSettings.PAPER = MergeSettings(ridge=Ridge.PAPER, balanced=False, corrected=False, count_absent=False)


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
        SolveError: a correlation matrix is singular, or the result is too large.
    """
    settings = settings or MergeSettings()
    settings.check(len(calibration.loras))
    strengths = settings.strengths or tuple(lora.strength for lora in calibration.loras)
    updates: dict[Site, LowRankUpdate] = {}
    reports: list[SiteReport] = []
    measured = {
        site: _statistics_of(calibration, site, space)
        for site, space in calibration.subspaces.items()
        if space.is_shared or (space.is_routed and settings.count_absent)
    }
    weights = task_weights(calibration, settings)
    corrections = _corrections(calibration, strengths) if settings.corrected and settings.routing else {}

    treatments = {site: treatment_of(site.module, settings.rules) for site in calibration.subspaces}

    def solved(site: Site) -> Solution:
        return solve_site(
            *(site, calibration.subspaces[site].scaled(strengths), measured.get(site), corrections.get(site)),
            *(weights[site], settings.ridge, 0.0 if treatments[site] == "stack" else settings.routing),
        )

    spread = settings.spread and settings.rank >= 1
    sites = list(calibration.subspaces)
    kept = [site for site in sites if treatments[site] != "drop"] if spread else []
    total = len(sites) + len(kept)
    spectra: dict[Site, tuple[float, ...]] = {}
    known: dict[Site, tuple[Solution, Directions]] = {}
    remembered = 0  # bytes of these
    for site, (solution, directions) in zip(kept, each(lambda site: _with_directions(solved(site)), kept), strict=True):
        on_site(len(spectra), total)
        spectra[site] = directions.spectrum
        if remembered < REMEMBERED_BYTES:
            known[site] = solution, directions
            remembered += solution.nbytes
    costs = {
        site: len(calibration.subspaces[site].up) + calibration.subspaces[site].down[0].numel() for site in spectra
    }
    ranks = spread_ranks(spectra, costs, int(settings.rank))

    def made(site: Site) -> tuple[LowRankUpdate | None, SiteReport]:
        if treatments[site] == "drop":
            return None, _left_out(site, calibration.subspaces[site].scaled(strengths), measured.get(site))
        solution, directions = known.pop(site, None) or (solved(site), None)
        return solution.cut(ranks.get(site, settings.rank), directions)

    for done, (site, (update, report)) in enumerate(zip(sites, each(made, sites), strict=True)):
        on_site(total - len(sites) + done, total)
        reports.append(report)
        if update is not None:
            updates[site] = _in_float32(update, site)
    return Merge(updates, Report(calibration.names, strengths, tuple(reports)))


def _in_float32(update: LowRankUpdate, site: Site) -> LowRankUpdate:
    narrow = LowRankUpdate(update.down.float().contiguous(), update.up.float().contiguous())
    if not narrow.is_finite():
        raise SolveError(
            f"{site}: the merged values do not fit into float32. Lower the strengths, or leave out the LoRA whose "
            "values are that large; its file may be damaged."
        )
    return narrow


def _with_directions(solution: Solution) -> tuple[Solution, Directions]:
    return solution, solution.directions()


def _left_out(site: Site, scaled: Subspace, statistics: SufficientStatistics | None) -> SiteReport:
    """What is lost with a site."""
    if statistics is None:
        return SiteReport(site, scaled.ranks, 0)
    lost = residuals(statistics, scaled, torch.zeros(scaled.rank, scaled.down.shape[0], dtype=torch.float64))
    return SiteReport(site, scaled.ranks, 0, statistics.tokens, lost)


def task_weights(calibration: Calibration, settings: MergeSettings) -> dict[Site, list[float]]:
    """(K,) for each shared site: what each task's sums are multiplied with."""
    given = torch.tensor(settings.weights or [1.0] * len(calibration.loras), dtype=torch.float64)
    shares = _effects(calibration) if settings.balanced else {}
    weights = {}
    for site, space in calibration.subspaces.items():
        there = 1 if settings.count_absent else torch.tensor(space.ranks) > 0
        weights[site] = (given * there / shares.get(site.module, 1)).tolist()
    return weights


def _effects(calibration: Calibration) -> dict[str, Tensor]:
    """(K,) for each module: the sum over task k's tokens of |up_k z_k|^2, at strength 1.

    Least squares over all tokens as they are would serve the strongest LoRA and let its cross-talk drown the others: a
    style often writes ten times what a subject does. Divided by their effects, all have the same share in the error.
    """
    sums: dict[str, Tensor] = {}
    tokens: dict[str, Tensor] = {}
    for site, statistics in calibration.statistics.items():
        found = sums.setdefault(site.module, torch.zeros(len(statistics.tokens), dtype=torch.float64))
        found += torch.tensor(effects(statistics, calibration.subspaces[site]), dtype=torch.float64)
        tokens[site.module] = torch.tensor(statistics.tokens, dtype=torch.float64)
    return {module: _filled(found, tokens[module]) for module, found in sums.items()}


def _filled(effects: Tensor, tokens: Tensor) -> Tensor:
    """Where a task has no effect, what the others have on average on as many tokens."""
    there = (effects > 0) & (tokens > 0)
    mean = (effects[there] / tokens[there]).mean() if there.any() else torch.ones((), dtype=torch.float64)
    return torch.where(there, effects, mean * tokens.clamp_min(1))


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
