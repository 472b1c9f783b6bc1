"""Choice: which tokens of a forward pass are counted where not all are."""

from __future__ import annotations

import torch
from torch import Tensor

from .placed import sent

SETS = 16  # that a layer takes in turn: as good as a new one each time, and drawing one would wait for the device


class Choice:
    """Random sets of token indices, drawn once and kept where the model computes."""

    def __init__(self, limit: int, seed: int) -> None:
        """At most `limit` tokens of a pass; 0 = all."""
        self.limit = limit
        self._generator = torch.Generator().manual_seed(seed)
        self._sets: dict[tuple[int, torch.device], list[Tensor]] = {}

    def of(self, tokens: int, device: torch.device, turn: int) -> Tensor | None:
        """Indices of the tokens that are counted, each as likely as any other; None for all."""
        if not self.limit or tokens <= self.limit:
            return None
        known = self._sets.get((tokens, device))
        if known is None:
            drawn = (torch.randperm(tokens, generator=self._generator)[: self.limit] for _ in range(SETS))
            # in order: reading scattered rows is slower
            ordered = torch.stack([indices.sort().values for indices in drawn])
            known = self._sets[tokens, device] = list(sent(ordered, device))
        return known[turn % SETS]
