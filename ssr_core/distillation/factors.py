"""Factors: low-rank updates that stand beside a frozen model's weights, some of which learn."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..lora.low_rank_update import LowRankUpdate
from ..measure.placed import Place


class Fixed:
    """The factors of an update that stays as it is."""

    def __init__(self, update: LowRankUpdate) -> None:
        self._update = LowRankUpdate(update.down.float(), update.up.float()).balanced()
        self._placed: dict[Place, tuple[Tensor, Tensor]] = {}

    def placed(self, where: Place) -> tuple[Tensor, Tensor]:
        """`down` (r, in, *kernel) and `up` (out, r) where a layer computes; put there once."""
        if where not in self._placed:
            device, dtype = where
            self._placed[where] = (self._update.down.to(device, dtype), self._update.up.to(device, dtype))
        return self._placed[where]


class Learning:
    """The factors of an update that learns.

    They begin as the halves of its singular value decomposition, so that both have the same share in it, and are kept
    in units of their own size: one learning rate then means the same for every layer of every model.
    """

    def __init__(self, update: LowRankUpdate, device: torch.device, only_up: bool = False) -> None:
        down, up = balanced_halves(update)
        self._in_shape = update.in_shape
        self._scales = (_size(down), _size(up))
        self.down = nn.Parameter((down / self._scales[0]).to(device), requires_grad=not only_up)
        self.up = nn.Parameter((up / self._scales[1]).to(device))

    def parameters(self) -> Iterator[nn.Parameter]:
        return (factor for factor in (self.down, self.up) if factor.requires_grad)

    def placed(self, where: Place) -> tuple[Tensor, Tensor]:
        """As of Fixed; gradients flow back."""
        device, dtype = where
        down, up = (self.down * self._scales[0]).to(device, dtype), (self.up * self._scales[1]).to(device, dtype)
        return down.reshape(-1, *self._in_shape), up

    @torch.no_grad()
    def update(self) -> LowRankUpdate:
        """As it is now, in host memory."""
        down, up = (self.down * self._scales[0]).cpu(), (self.up * self._scales[1]).cpu()
        return LowRankUpdate(down.reshape(-1, *self._in_shape), up)

    @torch.no_grad()
    def return_to(self, update: LowRankUpdate) -> None:
        """To what update() gave before."""
        self.down.copy_(update.down.flatten(1) / self._scales[0])
        self.up.copy_(update.up / self._scales[1])


def balanced_halves(update: LowRankUpdate) -> tuple[Tensor, Tensor]:
    """`down` (r, in) and `up` (out, r) of the same update with down down^T = up^T up, diagonal; r as before."""
    left, upper = torch.linalg.qr(update.up.double())
    right, lower = torch.linalg.qr(update.down.double().flatten(1).mT)
    u, values, v = torch.linalg.svd(upper @ lower.mT, full_matrices=False)
    root = values.sqrt()
    return ((right @ v.mT) * root).mT.float(), ((left @ u) * root).float()


def _size(factor: Tensor) -> float:
    """Root mean square; 1 where all is zero."""
    return float(factor.square().mean().sqrt()) or 1.0
