"""Reduced-rank regression: the best update of a given rank, measured where the model's activations are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from ..lora.low_rank_update import LowRankUpdate

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Truncation:
    """`left` @ `right` is a projection of the joint signal: up @ left and right @ down are the smaller update."""

    left: Tensor  # (R, rank)
    right: Tensor  # (rank, R)
    energy: float  # share of sum |up z|^2 that is kept, 0..1
    spectrum: tuple[float, ...] = ()  # share of it along each direction, largest first, those that were cut included

    @property
    def projection(self) -> Tensor:
        """(R, R)"""
        return self.left @ self.right

    def applied(self, down: Tensor, up: Tensor, router: Tensor | None = None) -> LowRankUpdate:
        """The smaller update of up @ router @ down, in the precision of `up`, float32 at least.

        Args:
            down: (R, in, *kernel)
            up: (out, r)
            router: (r, R) float64; None = identity.
        """
        left = self.left if router is None else router @ self.left
        dtype = torch.promote_types(up.dtype, torch.float32)
        smaller = self.right.to(dtype) @ down.flatten(1).to(dtype)
        larger = up.to(dtype) @ left.to(dtype)
        return LowRankUpdate(smaller.reshape(len(smaller), *down.shape[1:]), larger).balanced()


@dataclass(frozen=True, eq=False)
class Directions:
    """The directions of an update in the order of their effect on the activations."""

    values: Tensor  # (R,) sum over tokens of what each direction writes, squared; largest first
    vectors: Tensor  # (R, R)

    @classmethod
    def of(cls, energy: Tensor, factor: Tensor) -> Directions:
        """By the SVD of up L, with G = L L^T the Gram of z (Eckart-Young in that metric).

        Args:
            energy: up^T up, (R, R) float64.
            factor: L, (R, R) lower triangular, float64.
        """
        values, vectors = torch.linalg.eigh(factor.mT @ energy @ factor)
        return cls(values.flip(0).clamp_min(0), vectors.flip(1))

    @property
    def spectrum(self) -> tuple[float, ...]:
        """Share of the effect along each direction."""
        return tuple((self.values / self.values.sum().clamp_min(torch.finfo(torch.float64).tiny)).tolist())

    def cut(self, factor: Tensor, rank: float, most: int) -> Truncation:
        """To a number of directions, or, between 0 and 1, to those with that share of energy; `most` at most."""
        values, total = self.values, self.values.sum()
        count = _count(values, min(rank, most))
        # the scale is split evenly between the factors, which survives half precision best
        gain = torch.where(values > 0, values, torch.ones_like(values))[:count].sqrt().sqrt()
        left = factor @ self.vectors[:, :count] / gain
        right = torch.linalg.solve_triangular(factor.mT, self.vectors[:, :count], upper=True).mT * gain[:, None]
        kept = float(values[:count].sum() / total) if total > 0 else 1.0
        return Truncation(left, right, kept, self.spectrum)


def truncate(update: LowRankUpdate, factor: Tensor, rank: float) -> tuple[LowRankUpdate, Truncation]:
    """The update of at most `rank` that is nearest on the activations: min sum over tokens |(M - M_rank) z|^2.

    The dense update is never formed.

    Args:
        update: of rank R.
        factor: L, (R, R) lower triangular, float64.
        rank: a number of directions, or, between 0 and 1, the share of energy to keep.
    """
    up = update.up.double()
    found = Directions.of(up.mT @ up, factor).cut(factor, rank, min(update.down[0].numel(), update.out_features))
    return found.applied(update.down, up), found


def spread_ranks(spectra: Mapping[T, Sequence[float]], costs: Mapping[T, int], rank: int) -> dict[T, int]:
    """A rank for each layer, together with no more parameters than `rank` everywhere, that loses the least.

    Layers differ in how many directions they need. The directions with the largest shares for their parameters are
    taken, and every layer keeps at least one.

    Args:
        spectra: the share of a layer's effect along each direction, largest first.
        costs: parameters that a direction takes, in + out.
    """
    ranks = dict.fromkeys(spectra, 1)
    left = (rank - 1) * sum(costs[layer] for layer in spectra)
    wanted = ((share / costs[layer], layer) for layer, shares in spectra.items() for share in shares[1:] if share > 0)
    for _, layer in sorted(wanted, key=lambda pair: -pair[0]):
        if costs[layer] <= left:
            ranks[layer] += 1
            left -= costs[layer]
    return ranks


def isotropic_factor(update: LowRankUpdate) -> Tensor:
    """L for inputs of no preferred direction: the metric of the plain SVD of the dense update."""
    down = update.down.flatten(1).double()
    gram = down @ down.mT
    jitter = 1e-12 * gram.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
    return torch.linalg.cholesky(gram + jitter * torch.eye(update.rank, dtype=torch.float64))


def _count(values: Tensor, rank: float) -> int:
    positive = int((values > values[0] * 1e-14).sum()) if values[0] > 0 else 1
    if rank >= 1:
        return min(int(rank), positive)
    shares = values.cumsum(0) / values.sum().clamp_min(torch.finfo(torch.float64).tiny)
    return min(int((shares < rank).sum()) + 1, positive)
