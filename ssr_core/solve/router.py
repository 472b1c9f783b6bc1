"""The router: which LoRAs' rows a signal in the joint subspace is sent to, by ordinary least squares.

SSR-Merge, section 3 (Wei et al., arXiv 2606.10617): R = Q G^-1 with G = sum z z^T and Q = sum over tasks of the task's
own rows of z times z^T. A case in which several LoRAs speak is one more Gram in G, of which Q has the rows of all of
them; of silence it has none. Neither adds a row to anything.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import SolveError
from ..lora.low_rank_update import LowRankUpdate
from ..lora.subspace import Subspace
from ..statistics.case import Case, singles
from ..statistics.correction import Correction
from ..statistics.sufficient_statistics import SufficientStatistics


@dataclass(frozen=True)
class Ridge:
    """How far the data are trusted, and what holds where they are silent.

    R minimizes  sum over tokens |R z - z_S|^2  +  |(R - R0) D^(1/2)|^2  with a diagonal D of penalties and z_S the
    rows of z that belong to the LoRAs that speak.
    """

    relative: float = 1e-2  # D as a fraction of each diagonal entry of G: the same wherever scale was folded
    scarcity: float = 1.0  # of the mean diagonal entry of a task's rows, over the noise levels seen to the power of 4
    floor: float = 1e-6  # the same, however many noise levels: for rows that saw nothing
    absolute: float = 0.0  # added to the mean over tokens of z z^T, as the paper does
    prior: bool = True  # R0 = identity times the share of cases in which a row's LoRA speaks: the mean; else zero

    PAPER: ClassVar[Ridge]

    def penalties(self, correlation: Tensor, subspace: Subspace, tokens: float, coverage: float) -> Tensor:
        """(R,) the diagonal of D.

        After few noise levels a row may look silent only because it was not seen yet. A fraction of its own diagonal
        entry would then hardly bind it, so part of the penalty is taken from the mean of its block. What lies between
        the levels is off by the square of their distance, and the squared error by its fourth power.
        """
        diagonal = correlation.diagonal()
        blocks = [*subspace.blocks, slice(subspace.rank, None)]
        means = torch.cat([diagonal[b].mean().expand_as(diagonal[b]) for b in blocks if diagonal[b].numel()])
        # a block that saw nothing at all has no scale of its own; any positive penalty then gives the prior
        means = torch.where(means > 0, means, torch.ones_like(means))
        floor = means * (self.floor + self.scarcity / max(coverage, 1.0) ** 4)
        return self.relative * diagonal + floor + self.absolute * tokens


Ridge.PAPER = Ridge(relative=0.0, scarcity=0.0, floor=0.0, absolute=1e-4, prior=False)


@dataclass(frozen=True, eq=False)
class NormalEquations:
    """R (G + D) = Q + R0 D, of one site. All float64."""

    correlation: Tensor  # G, (R, R)
    guide: Tensor  # Q, (rank, R)
    penalties: Tensor  # the diagonal of D, (R,)
    prior: Tensor  # R0, (rank, R)
    where: str  # what errors call the site, and how much it saw

    @cached_property
    def factor(self) -> Tensor:
        """L, (R, R) lower triangular, with L L^T = G + D: also the metric in which truncation measures.

        Raises:
            SolveError: not positive definite.
        """
        factor, failed = torch.linalg.cholesky_ex(self._scaled)
        # rounding can lift the pivots of a singular matrix just above zero
        if failed or factor.diagonal().min() ** 2 < 10 * len(factor) * torch.finfo(torch.float64).eps:
            raise SolveError(
                f"{self.where}, too little for a joint rank of {len(self.penalties)} at this ridge: the correlation "
                "matrix is singular. Raise the ridge, or calibrate with more steps or prompts."
            )
        return factor * self._scale[:, None]

    @cached_property
    def condition(self) -> float:
        """Of G + D scaled to a unit diagonal."""
        values = torch.linalg.eigvalsh(self._scaled)
        return float(values[-1] / values[0]) if values[0] > 0 else math.inf

    @cached_property
    def condition_bound(self) -> float:
        """Not more than `condition`, and nearly free: from the pivots of the factor."""
        pivots = self.factor.diagonal() / self._scale
        return float((pivots.max() / pivots.min()) ** 2)

    @cached_property
    def _scale(self) -> Tensor:
        diagonal = self.correlation.diagonal() + self.penalties
        return diagonal.clamp_min(torch.finfo(torch.float64).tiny).sqrt()

    @cached_property
    def _scaled(self) -> Tensor:
        # to a unit diagonal: rows of `down` may differ by orders of magnitude
        return (self.correlation + self.penalties.diag()) / self._scale / self._scale[:, None]


def normal_equations(
    statistics: SufficientStatistics,
    subspace: Subspace,
    weights: Sequence[float],
    ridge: Ridge,
    site: object = "this site",
    correction: Correction | None = None,
    cases: Sequence[Case] = (),
) -> NormalEquations:
    """The normal equations of a weighted sum of the cases' tokens.

    Args:
        weights: (C,) what each case's sums are multiplied with.
        correction: further tokens, for `solve_up`.
        cases: (C,) who speaks; given empty, each LoRA by itself.
    """
    cases = cases or singles(len(subspace.ranks))
    correlation = torch.zeros(len(subspace.down), len(subspace.down), dtype=torch.float64)
    guide = torch.zeros(subspace.rank, len(correlation), dtype=torch.float64)
    for weight, gram, case in zip(weights, statistics.grams, cases, strict=True):
        correlation.add_(gram, alpha=weight)
        for block in (subspace.blocks[task] for task in case.speakers):
            guide[block] += gram[block] * weight
    if correction is not None:
        for weight, gram in zip(weights, correction.grams, strict=True):
            correlation.add_(gram, alpha=weight)
    tokens = sum(w * n for w, n in zip(weights, statistics.tokens, strict=True))
    seen = [n for n in statistics.coverage if n]
    counted = [
        case for case, n, w in zip(cases, statistics.tokens, weights, strict=True) if _counts(case, subspace, n * w)
    ]
    prior = torch.zeros(*guide.shape, dtype=torch.float64)
    for task, block in enumerate(subspace.blocks):
        said = sum(task in case.speakers for case in counted)
        prior[block, block].fill_diagonal_(ridge.prior * said / max(len(counted), 1))
    penalties = ridge.penalties(correlation, subspace, tokens, sum(seen) / max(len(seen), 1))
    return NormalEquations(correlation, guide, penalties, prior, f"{site} saw {sum(statistics.tokens)} tokens")


def _counts(case: Case, subspace: Subspace, tokens: float) -> bool:
    """Whether the mean over cases has this one: each LoRA that is there by itself, and whatever was seen."""
    return bool(tokens) or (len(case.speakers) == 1 and bool(subspace.ranks[case.speakers[0]]))


def solve_router(equations: NormalEquations) -> Tensor:
    """R = (Q + R0 D) (G + D)^-1, (rank, R).

    Raises:
        SolveError: G + D is not positive definite.
    """
    target = equations.guide + equations.prior * equations.penalties
    return torch.cholesky_solve(target.mT, equations.factor).mT


def solve_up(equations: NormalEquations, scaled: Subspace, correction: Correction, weights: Sequence[float]) -> Tensor:
    """The routed `up`, (out, R), that also makes up for what the merge did to its own inputs.

    M minimizes  sum |M z - up z_S|^2  +  sum |M z' - t|^2  +  |(M - up R0) D^(1/2)|^2,  see Correction.

    Raises:
        SolveError: the sum of both correlations with D is not positive definite.
    """
    target = scaled.up.double() @ (equations.guide + equations.prior * equations.penalties)
    for weight, found in zip(weights, correction.targets, strict=True):
        if found.numel():
            target += weight * found.double()
    return torch.cholesky_solve(target.mT, equations.factor).mT


def route(subspace: Subspace, router: Tensor) -> LowRankUpdate:
    """The merged update (down, up R): the same joint `down`, a routed `up`."""
    return LowRankUpdate(subspace.down, subspace.up.double() @ router)
