"""Accumulator: the running sum of z z^T of one case at one site, where its tokens are."""

from __future__ import annotations

import torch
from torch import Tensor

from ..lora.subspace import Subspace
from ..statistics.grams import Grams, pack
from ..statistics.sufficient_statistics import SufficientStatistics

PANEL = 256  # columns that are multiplied at a time: below them, half of the product is not needed


class Accumulator:
    """Sums z z^T. The only thing in this package that changes; it lives as long as one run.

    The sum stays on the device of z and is added to in place: neither a copy to the host nor a wait. Only its upper
    triangle means anything.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self.samples = 0
        self._gram: Tensor | None = None

    def update(self, z: Tensor) -> None:
        """Add tokens. z: (tokens, R), float32 or float64."""
        if self._gram is None:
            self._gram = zeros(z.shape[1], z.shape[1], device=z.device, dtype=sum_dtype(z.device))
        z = z.to(self._gram.dtype)
        for start in range(0, z.shape[1], PANEL):
            columns, rows = slice(start, start + PANEL), slice(0, start + PANEL)
            self._gram[rows, columns].addmm_(z[:, rows].mT, z[:, columns])
        self.tokens += z.shape[0]

    def compute(
        self,
        case: int,
        subspace: Subspace,
        levels: frozenset[float] = frozenset(),
        dtype: torch.dtype = torch.float64,
    ) -> SufficientStatistics:
        """The sums so far, as statistics in which only case `case` was seen, at these noise levels.

        `dtype` is what they are kept in; float32 takes half the memory.
        """
        cases = range(max(len(subspace.ranks), case + 1))
        grams = Grams.zeros(len(cases), len(subspace.down))
        if self._gram is not None:
            grams = grams.replaced(case, pack(self._gram.cpu()).to(dtype))
        tokens = tuple(self.tokens if c == case else 0 for c in cases)
        samples = tuple((self.samples or self.tokens) if c == case else 0 for c in cases)
        seen = tuple(levels if c == case else frozenset[float]() for c in cases)
        return SufficientStatistics(grams, tokens, subspace.fingerprint, samples, seen)


def zeros(*shape: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A sum to add to in place, in inference mode or outside of it, wherever it is begun."""
    with torch.inference_mode(False):
        return torch.zeros(*shape, device=device, dtype=dtype)


def sum_dtype(device: torch.device) -> torch.dtype:
    """Of sums over one run: float64 where it is cheap.

    Elsewhere each addition would be a kernel of its own, or not exist, and the products are in float32 in any case.
    """
    return torch.float64 if device.type == "cpu" else torch.float32
