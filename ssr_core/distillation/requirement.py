"""Requirement of a distillation: the memory that it takes beside the model, told before it starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..lora.low_rank_update import LowRankUpdate
from ..lora.site import Site
from .point import Point, memory_of

FLOAT32 = 4
LEARNING = 2  # of each number that learns: its gradient, and the mean of those before


@dataclass(frozen=True)
class DistillationRequirement:
    """Bytes beside the model's weights."""

    device: int  # where the model computes, at the peak
    points: int  # in host memory, of the points
    results: int  # in host memory, of the best step so far and the one that may take its place

    @classmethod
    def of(
        cls,
        updates: Mapping[Site, LowRankUpdate],
        activations: int,
        points: Sequence[Point] = (),
        only_up: bool = False,
    ) -> DistillationRequirement:
        """Of distilling into `updates`.

        Args:
            activations: what footprint() found.
            points: all, those that are held out, too.
        """
        ups = sum(update.up.numel() for update in updates.values())
        all_of_them = ups + sum(update.down.numel() for update in updates.values())
        learning = FLOAT32 * (ups if only_up else all_of_them)
        kept = FLOAT32 * all_of_them
        return cls(kept + LEARNING * learning + activations, memory_of(points), 2 * kept)

    @property
    def host(self) -> int:
        """Where the model computes elsewhere."""
        return self.points + self.results
