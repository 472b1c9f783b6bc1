"""Diagnostics: what a merge keeps of each LoRA, read off the statistics alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..lora.subspace import Subspace
from ..statistics.case import Case, singles
from ..statistics.sufficient_statistics import SufficientStatistics


@dataclass(frozen=True)
class Residual:
    """Of one case at one site: sums over its tokens of squared output differences."""

    base: float  # |up z_S|^2: the distance from the base model, which is the whole effect of the LoRAs that speak
    stack: float  # distance of the plain stack from these alone
    merge: float  # distance of the merge from these alone


def residuals(
    statistics: SufficientStatistics,
    scaled: Subspace,
    router: Tensor,
    own: tuple[Tensor, Tensor] | None = None,
    cases: Sequence[Case] = (),
) -> tuple[Residual, ...]:
    """(C,) how far base, plain stack and merge are from the LoRAs of each case alone, on that case's own tokens.

    Args:
        scaled: the subspace with each task at its strength.
        router: (rank, R), as it is in the result: blended and truncated.
        own: basis (out, rank) that the router writes to instead of the LoRAs' `up`, and basis^T basis.
        cases: (C,) who speaks; given empty, each LoRA by itself.
    """
    cases = cases or singles(len(scaled.ranks))
    energy = scaled.energy
    if own is not None:  # both side by side, so that they can be compared
        router = torch.cat([router.new_zeros(scaled.rank, router.shape[1]), router])
        basis, own_energy = own
        shared = scaled.up.mT.to(basis) @ basis
        energy = torch.cat([torch.cat([energy, shared], 1), torch.cat([shared.mT, own_energy], 1)])
    plain = torch.eye(*router.shape, dtype=torch.float64)
    plain[scaled.rank :] = 0
    found = []
    for base, gram, case in zip(effects(statistics, scaled, cases), statistics.grams, cases, strict=True):
        rows = spoken(scaled, case)
        alone = torch.zeros_like(plain)
        alone[rows] = plain[rows]
        stack = plain[: scaled.rank] - alone[: scaled.rank]
        found.append(Residual(base, _squared(scaled.energy, stack, gram), _squared(energy, router - alone, gram)))
    return tuple(found)


def effects(statistics: SufficientStatistics, scaled: Subspace, cases: Sequence[Case] = ()) -> list[float]:
    """(C,) the whole effect of the LoRAs that speak: the sum over the case's own tokens of |up z_S|^2."""
    found = []
    for gram, case in zip(statistics.grams, cases or singles(len(scaled.ranks)), strict=True):
        rows = spoken(scaled, case)
        found.append(float((scaled.energy[rows][:, rows] * gram[rows][:, rows]).sum()))
    return found


def spoken(space: Subspace, case: Case) -> Tensor:
    """Indices of the rows of the LoRAs that speak."""
    rows = torch.arange(space.rank)
    return torch.cat([rows[:0], *(rows[space.blocks[task]] for task in case.speakers)])


def _squared(energy: Tensor, difference: Tensor, gram: Tensor) -> float:
    """sum over tokens |up difference z|^2"""
    return float((energy * (difference @ gram @ difference.mT)).sum())
