"""Placed: factors of an update where a layer computes, in its precision."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

Place = tuple[torch.device, torch.dtype]  # where a layer computes, and in which precision


@dataclass(frozen=True, eq=False)
class Placed:
    """A `down` where a layer computes, in its layout and precision."""

    down: Tensor  # (rank, in, *kernel); twice as many rows where half precision alone would not hold them
    rank: int


@dataclass(frozen=True, eq=False)
class PlacedUp:
    """An `up` where a layer computes: `scale` times `matrix`."""

    matrix: Tensor  # (out, rank)
    scale: float

    @classmethod
    def of(cls, up: Tensor, where: Place, strength: float = 1.0) -> PlacedUp:
        device, dtype = where
        if dtype != torch.float16:
            return cls(sent(up.to(dtype), device), strength)
        # the smallest values of many LoRAs are below what float16 has in full: brought near 1, they are not
        power = 2.0 ** math.frexp(float(up.abs().max()))[1]
        return cls(sent((up.float() / power).to(dtype), device), strength * power)


def sent(tensor: Tensor, device: torch.device, copy: bool = False) -> Tensor:
    """On the device; the host does not wait for it where it need not."""
    unhurried = device.type == "cuda"  # elsewhere it may be read before it has arrived
    return tensor.to(device, non_blocking=unhurried, copy=copy)
