"""Judge: how far a merge is from what its LoRAs do, on points that it does not learn from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import SolveError
from ..measure.placed import sent
from ..solve.weights import case_weights
from ..statistics.case import Case
from .point import Point


@dataclass(frozen=True)
class Evaluation:
    """Errors on the held-out points: 0 = the LoRAs that a case asks for, 1 = the model without any."""

    step: int
    error: float  # of all cases, by their weights
    cases: tuple[float, ...]  # (C,) nan where nothing was held out


class Judge:
    """The held-out points."""

    def __init__(
        self, network: nn.Module, held_out: Sequence[Point], device: torch.device, cases: Sequence[Case]
    ) -> None:
        """The model has no LoRA on it yet: what it answers is how far each case's LoRAs move it."""
        self._network, self._points, self._device, self._cases = network, held_out, device, cases
        loras = 1 + max((task for case in cases for task in case.speakers), default=0)
        self._weights = torch.tensor(case_weights(cases, [1.0] * loras), dtype=torch.float64)
        found = self._means()
        if found.isinf().any() or found.isnan()[[point.case for point in held_out]].any():
            raise SolveError("The model's answers are not finite, with its LoRAs or without, so nothing can be learnt.")
        there = found > 0
        # silence, or LoRAs at strength 0, have no effect of their own
        self._effects = torch.where(there, found, found[there].mean() if there.any() else 1.0)

    def evaluate(self, step: int) -> Evaluation:
        errors = self._means() / self._effects
        known = ~errors.isnan()
        error = float((errors[known] * self._weights[known]).sum() / self._weights[known].sum())
        return Evaluation(step, error if known.any() and math.isfinite(error) else math.inf, tuple(errors.tolist()))

    def shares(self, points: Sequence[Point]) -> list[float]:
        """(C,) what the distance at a point counts, so that each case counts by its weight."""
        counts = torch.zeros_like(self._weights)
        for point in points:
            counts[point.case] += 1
        units = self._weights.sum() * self._units() * counts.clamp_min(1) / len(points)
        shares: list[float] = (self._weights / units).tolist()
        return shares

    def _units(self) -> Tensor:
        """(C,) what an error is large or small beside: a combination's, the effect of the weakest LoRA in it.

        A style writes all over the picture; beside its effect, a face that is gone is a small error.
        """
        alone = {case.speakers[0]: self._effects[at] for at, case in enumerate(self._cases) if len(case.speakers) == 1}
        units = self._effects.clone()
        for at, case in enumerate(self._cases):
            for effect in (alone[task] for task in case.speakers if task in alone):
                units[at] = torch.minimum(units[at], effect)
        return units

    @torch.no_grad()
    def _means(self) -> Tensor:
        """(C,) of the held-out points' distances; nan where a case has none."""
        sums = torch.zeros(2, len(self._weights), dtype=torch.float64)
        for point in self._points:
            sums[0, point.case] += float(distance(point, self._network, self._device))
            sums[1, point.case] += 1
        return sums[0] / sums[1]


def distance(point: Point, network: nn.Module, device: torch.device) -> Tensor:
    """Mean squared difference of what the model answers now from what it answered with the case's LoRAs."""
    answer = point.answer(network, device)
    pairs = zip(answer, point.target, strict=True)
    squares = [(ours.float() - sent(target, device).float()).square().sum() for ours, target in pairs]
    return torch.stack(squares).sum() / sum(target.numel() for target in point.target)
