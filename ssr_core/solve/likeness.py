"""Likeness: LoRAs that are nearly the same, such as several epochs of one training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from ..lora.site import Site
from ..lora.subspace import Subspace

SAME = 0.5  # cosine from which on two LoRAs are of one training; those of different ones are near 0


@dataclass(frozen=True)
class Likeness:
    """Two LoRAs whose updates point the same way."""

    one: int
    other: int
    cosine: float

    def advice(self, names: tuple[str, ...]) -> str:
        """What it means, and what to do."""
        return (
            f"Next: keep one of {names[self.one]} and {names[self.other]}. They are {self.cosine:.0%} alike, as epochs "
            "of one training are: the same subject, so nothing tells them apart, and their merge is no more than their "
            "mean. If that is what you want, load both at strength 0.5."
        )


def alike(subspaces: Mapping[Site, Subspace]) -> tuple[Likeness, ...]:
    """Every two LoRAs that are the same subject, the most alike first."""
    cosines = cosines_of(subspaces)
    found = [Likeness(one, other, float(cosines[one, other])) for one, other in _pairs(cosines)]
    return tuple(sorted((pair for pair in found if pair.cosine > SAME), key=lambda pair: -pair.cosine))


def cosines_of(subspaces: Mapping[Site, Subspace]) -> Tensor:
    """(K, K) between the LoRAs' updates as vectors of all their weights; no dense update is formed."""
    products: Tensor | None = None
    for space in subspaces.values():
        down = space.down[: space.rank].flatten(1).double().cpu()
        both = space.energy * (down @ down.mT)  # its block (i, j) sums up to <up_i down_i, up_j down_j>
        found = torch.stack(
            [torch.stack([both[rows, columns].sum() for columns in space.blocks]) for rows in space.blocks]
        )
        products = found if products is None else products + found
    if products is None:
        return torch.zeros(0, 0, dtype=torch.float64)
    norms = products.diagonal().clamp_min(torch.finfo(torch.float64).tiny).sqrt()
    return products / norms / norms[:, None]


def _pairs(cosines: Tensor) -> Iterator[tuple[int, int]]:
    return combinations(range(len(cosines)), 2)
