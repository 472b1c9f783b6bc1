"""Expansion: a weight update of another form as a low-rank update, exact where it is low-rank and else the nearest."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .low_rank_update import LowRankUpdate

RANK = 128  # at most, unless a caller wants another
EXACT = 1024  # the smaller side of matrices that are decomposed exactly; larger ones by random projections
NEGLIGIBLE = 1e-6  # singular values below this share of the largest are rounding errors


@dataclass(frozen=True, eq=False)
class Expansion:
    """What was made of an update, and how much of it that is."""

    update: LowRankUpdate
    kept: float = 1.0  # share of the squared norm


def nearest(dense: Tensor, rank: int = RANK) -> Expansion:
    """The nearest update of at most `rank` to a weight difference (out, in, *kernel), by singular values."""
    up, values, down = _svd(dense.flatten(1).float(), rank)
    total = float(dense.float().square().sum())
    kept = float(values.square().sum()) / total if total else 1.0
    return Expansion(_update(up * values, down, dense.shape[1:]), min(kept, 1.0))


def kronecker(left: Tensor, right: Tensor, rank: int = RANK) -> Expansion:
    """The nearest update of at most `rank` to left (x) right, as in LoKr; exact where that has no higher rank.

    The singular vectors of a Kronecker product are those of its factors, so it is never formed.

    Args:
        left: (a, b)
        right: (m, n) or (m, n, *kernel); the update is (a m, b n, *kernel).
    """
    left_up, left_values, left_down = _svd(left.float(), rank)
    right_up, right_values, right_down = _svd(right.flatten(1).float(), rank)
    products = torch.outer(left_values, right_values)
    count = max(1, min(rank, int((products > NEGLIGIBLE * products[0, 0]).sum())))
    values, order = products.flatten().topk(count)
    i, j = order // len(right_values), order % len(right_values)
    up = torch.einsum("ap,mp->amp", left_up[:, i], right_up[:, j]).flatten(0, 1)
    down = torch.einsum("pb,pn->pbn", left_down[i], right_down[j]).flatten(1)
    total = float(left.float().square().sum() * right.float().square().sum())
    kept = float(values.square().sum()) / total if total else 1.0
    in_shape = (left.shape[1] * right.shape[1], *right.shape[2:])
    return Expansion(_update(up * values, down, in_shape), min(kept, 1.0))


def hadamard(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], rank: int = RANK) -> Expansion:
    """The elementwise product of two low-rank matrices, as in LoHa: of rank r1 r2 exactly, else the nearest.

    Args:
        first, second: (up, down) of each, (out, r) and (r, in).
    """
    (up1, down1), (up2, down2) = first, second
    if up1.shape[1] * up2.shape[1] > rank:
        return nearest((up1.float() @ down1.float()) * (up2.float() @ down2.float()), rank)
    up = torch.einsum("op,oq->opq", up1.float(), up2.float()).flatten(1)
    down = torch.einsum("pi,qi->pqi", down1.float(), down2.float()).flatten(0, 1)
    return Expansion(LowRankUpdate(down, up))


def _svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """up (out, r), values (r,), down (r, in) with r at most `rank`; always at least one, be it of size zero."""
    if min(matrix.shape) <= max(EXACT, 2 * rank):
        up, values, down = torch.linalg.svd(matrix, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[matrix.device] if matrix.device.type == "cuda" else []):
            torch.manual_seed(0)  # the same LoRA every time
            up, values, right = torch.svd_lowrank(matrix, q=rank + 16, niter=4)
        down = right.mT
    count = max(1, min(rank, int((values > NEGLIGIBLE * values[0]).sum())))
    return up[:, :count], values[:count], down[:count]


def _update(up: Tensor, down: Tensor, in_shape: tuple[int, ...] | torch.Size) -> LowRankUpdate:
    return LowRankUpdate(down.reshape(len(down), *in_shape).contiguous(), up.contiguous())
