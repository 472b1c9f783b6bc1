"""Solution: what the merge writes at one site, at full rank, and its cut to a smaller one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..lora.low_rank_update import LowRankUpdate
from ..lora.site import Site
from ..lora.subspace import Subspace
from ..statistics.case import Case
from ..statistics.correction import Correction
from ..statistics.sufficient_statistics import SufficientStatistics
from .diagnostics import residuals
from .merge_report import SiteReport
from .rank import Directions, Truncation, isotropic_factor
from .router import NormalEquations, Ridge, normal_equations, solve_router, solve_up


@dataclass(frozen=True, eq=False)
class Solution:
    """What a site writes, at full rank: `basis` @ `router` @ z."""

    site: Site
    scaled: Subspace
    routing: float
    basis: Tensor  # (out, r)
    router: Tensor  # (r, R) float64
    energy: Tensor  # basis^T basis
    statistics: SufficientStatistics | None = None  # None: nothing was measured, or nothing is to be routed
    equations: NormalEquations | None = None
    has_own_basis: bool = False  # not the LoRAs' own `up`
    cases: tuple[Case, ...] = ()  # (C,) who speaks
    uncorrected: Solution | None = None  # the same from the statistics alone, where there is a correction

    @property
    def factor(self) -> Tensor:
        """L, the metric that truncation measures in."""
        return self.equations.factor if self.equations else isotropic_factor(self.scaled.plain_stack())

    @property
    def nbytes(self) -> int:
        """About what it takes in memory, with its directions and beside the statistics."""
        size, own = self.router.shape[1], self.basis.nbytes if self.has_own_basis else 0
        return 8 * 6 * size**2 + own

    def directions(self) -> Directions:
        return Directions.of(self.router.mT @ self.energy @ self.router, self.factor)

    def cut(self, rank: float, directions: Directions | None) -> tuple[LowRankUpdate, SiteReport]:
        """To `rank` as MergeSettings has it, 0 = the joint rank; `directions` if they are known already."""
        scaled, router, kept = self.scaled, self.router, 1.0
        routing = self.routing if self.statistics is not None else 0.0
        spectrum: tuple[float, ...] = ()
        # context rows cost no rank: the joint rank is all there is, and cutting to it loses nothing (but corrections)
        wanted = rank or (scaled.rank if scaled.context and routing else 0)
        if wanted:
            most = min(scaled.down[0].numel(), len(self.basis))
            found = (directions or self.directions()).cut(self.factor, wanted, most)
            if wanted >= most and len(router.mT) > most:
                found = self._whole(found.spectrum)
            down = scaled.down[: router.shape[1]]
            update, spectrum = found.applied(down, self.basis, router), found.spectrum
            router, kept = router @ found.projection, found.energy if rank else 1.0
        elif routing:
            update = LowRankUpdate(scaled.down, self.basis @ router.to(self.basis))
        else:
            update = scaled.plain_stack()
        seen = self.statistics
        if seen is None or self.equations is None:
            return update, SiteReport(self.site, scaled.ranks, update.rank, energy=kept, spectrum=spectrum)
        condition = self.equations.condition_bound if wanted or routing else math.nan
        if self.uncorrected is not None:
            # a correction serves the inputs that the merge leads to; on those of the LoRAs alone, which is all that
            # statistics know, its error would seem larger and not smaller than without
            lost = self.uncorrected.cut(rank, None)[1].residuals
        else:
            own = (self.basis, self.energy) if self.has_own_basis else None
            lost = residuals(seen, scaled, router, own, self.cases)
        return update, SiteReport(
            *(self.site, scaled.ranks, update.rank, seen.tokens, lost, condition, kept, seen.coverage),
            *(seen.has_levels, spectrum),
        )

    def _whole(self, spectrum: tuple[float, ...]) -> Truncation:
        """All of it, at the rank that the layer has at most: it has fewer inputs or outputs than the signal has rows.

        The metric does not know that: with the ridge, rows seem independent that are not, and cutting would lose some.
        """
        down = self.scaled.down[: self.router.shape[1]].flatten(1).double()
        written = (self.basis.double() @ self.router).mT
        span = torch.linalg.qr(down if down.shape[1] <= written.shape[1] else written)[0]
        return Truncation(span, span.mT, 1.0, spectrum)


def solve_site(
    site: Site,
    scaled: Subspace,
    statistics: SufficientStatistics | None,
    correction: Correction | None,
    weights: Sequence[float],
    ridge: Ridge,
    routing: float,
    cases: tuple[Case, ...] = (),
) -> Solution:
    """Solve a site whose tasks are at their strengths.

    Args:
        statistics: None where the only task, or the only one with a LoRA here, stays as it is.
        weights: (C,) what each case's sums are multiplied with.
        routing: 0 = the plain stack, 1 = fully routed.
        cases: (C,) who speaks; given empty, each LoRA by itself.

    Raises:
        SolveError: the correlation matrix is singular.
    """
    basis, plain = scaled.up, torch.eye(scaled.rank, scaled.down.shape[0], dtype=torch.float64)
    if statistics is None:
        own = torch.eye(scaled.rank, dtype=torch.float64)
        return Solution(site, scaled, routing, basis, own, scaled.energy)
    equations = normal_equations(statistics, scaled, weights, ridge, site, correction, cases)
    router, energy, own_basis = plain, scaled.energy, False
    if routing and correction is not None:
        basis = torch.lerp(basis.double() @ plain, solve_up(equations, scaled, correction, weights), routing)
        router, energy, own_basis = torch.eye(len(plain.mT), dtype=torch.float64), basis.mT @ basis, True
        basis = basis.float()
    elif routing:
        router = torch.lerp(plain, solve_router(equations), routing)
    return Solution(site, scaled, routing, basis, router, energy, statistics, equations, own_basis, cases)
