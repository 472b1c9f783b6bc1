"""MergeSettings: everything that can be chosen after collecting."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

from ..errors import SSRError
from .router import Ridge
from .selection import Rule


@dataclass(frozen=True)
class MergeSettings:
    """None of it needs new statistics."""

    ridge: Ridge = field(default_factory=Ridge)
    rank: float = 0  # 0 = the joint rank, 1 or more = that of the result, between 0 and 1 = energy that each site keeps
    spread: bool = True  # whether sites that need more than `rank` may take from those that need less
    routing: float = 1.0  # 0 = the plain stack, 1 = fully routed
    strengths: tuple[float, ...] | None = None  # (K,) instead of the LoRAs' own
    weights: tuple[float, ...] | None = None  # (K,) how much each task's tokens count
    balanced: bool = True  # whether tasks count the same however strong they are and however many tokens they saw
    corrected: bool = True  # whether corrections count, if there are any
    count_absent: bool = True  # whether tokens of a task count where it has no LoRA, to be left alone there
    rules: tuple[Rule, ...] = ()  # layers that are stacked without routing, or left out

    PAPER: ClassVar[MergeSettings]

    def check(self, tasks: int) -> None:
        """Raise SSRError for a value that cannot be meant."""
        if not 0 <= self.routing <= 1:
            raise SSRError(f"routing is {self.routing}; it goes from 0 (the plain stack) to 1 (fully routed).")
        if not math.isfinite(self.rank) or self.rank < 0 or (self.rank >= 1 and self.rank != int(self.rank)):
            raise SSRError(f"rank is {self.rank}; give 0 (full), a whole number, or a share of energy between 0 and 1.")
        for name, values in (("strengths", self.strengths), ("weights", self.weights)):
            if values is not None and (len(values) != tasks or not all(map(math.isfinite, values))):
                raise SSRError(f"{name} must be {tasks} finite numbers, one per LoRA, not {values}.")
        if self.weights is not None and (min(self.weights) < 0 or max(self.weights) == 0):
            raise SSRError(f"weights are {self.weights}; they must not be negative, nor all zero.")
        penalties = (self.ridge.relative, self.ridge.scarcity, self.ridge.floor, self.ridge.absolute)
        if not all(math.isfinite(p) and p >= 0 for p in penalties):
            raise SSRError(f"ridge is {self.ridge}; its penalties must be finite and not negative.")


MergeSettings.PAPER = MergeSettings(ridge=Ridge.PAPER, balanced=False, corrected=False, count_absent=False)
