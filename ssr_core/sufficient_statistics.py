"""Sufficient statistics of one site: what the model's activations leave behind in the joint subspace."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import StatisticsError
from .subspace import Subspace


@dataclass(frozen=True, eq=False)
class SufficientStatistics:
    """One Gram matrix per task. G and Q of the paper, residuals and re-weighting are all read off it.

    Sums, never means, in float64: so statistics of two runs, prompts or machines add up exactly.
    """

    gram: Tensor  # (K, R, R) float64; gram[k] = sum of z z^T over task k's tokens, z = down @ x
    tokens: tuple[int, ...]  # (K,)
    fingerprint: str  # of the subspace they were measured in
    samples: tuple[int, ...] = ()  # (K,) images and steps that the tokens come from; their number if nothing is known
    levels: tuple[frozenset[float], ...] = ()  # (K,) noise levels they were seen at; empty if nothing is known

    def __post_init__(self) -> None:
        object.__setattr__(self, "samples", self.samples or self.tokens)
        object.__setattr__(self, "levels", self.levels or (frozenset(),) * len(self.tokens))

    @property
    def has_levels(self) -> bool:
        return any(self.levels)

    @property
    def coverage(self) -> tuple[int, ...]:
        """(K,) how many different situations were seen: noise levels, or samples where the levels are not known."""
        return tuple(len(levels) or samples for levels, samples in zip(self.levels, self.samples, strict=True))

    @classmethod
    def empty(cls, subspace: Subspace) -> SufficientStatistics:
        size = subspace.down.shape[0]
        gram = torch.zeros(len(subspace.ranks), size, size, dtype=torch.float64)
        return cls(gram, (0,) * len(subspace.ranks), subspace.fingerprint)

    def __add__(self, other: SufficientStatistics) -> SufficientStatistics:
        """The statistics of both runs together."""
        if self.fingerprint != other.fingerprint:
            raise StatisticsError(
                "These statistics were measured with other LoRAs (or in another order) and cannot be added; "
                "collect them again with the same LoRAs."
            )
        tokens = tuple(a + b for a, b in zip(self.tokens, other.tokens, strict=True))
        samples = tuple(a + b for a, b in zip(self.samples, other.samples, strict=True))
        levels = tuple(a | b for a, b in zip(self.levels, other.levels, strict=True))
        return SufficientStatistics(self.gram + other.gram, tokens, self.fingerprint, samples, levels)

    def without(self, task: int, subspace: Subspace) -> SufficientStatistics:
        """What would have been measured had task `task` never been there. `subspace` is the one they belong to."""
        rows = subspace.rows_without(task)
        kept = [k for k in range(len(self.tokens)) if k != task]
        return SufficientStatistics(
            self.gram[kept][:, rows][:, :, rows],
            tuple(self.tokens[k] for k in kept),
            subspace.without(task).fingerprint,
            tuple(self.samples[k] for k in kept),
            tuple(self.levels[k] for k in kept),
        )

    def check(self, subspace: Subspace, site: object) -> None:
        """Raise StatisticsError unless these were measured in `subspace` and are finite."""
        if self.fingerprint != subspace.fingerprint:
            raise StatisticsError(
                f"{site}: the statistics were measured with other LoRAs than those to be merged; collect them again."
            )
        if not torch.isfinite(self.gram).all():
            raise StatisticsError(not_finite(site))


class Accumulator:
    """Sums z z^T of one task at one site. The only thing here that changes; it lives as long as one run.

    The sum stays on the device of z, so that adding to it neither copies nor waits.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self.samples = 0
        self._gram: Tensor | None = None

    def update(self, z: Tensor) -> None:
        """Add tokens. z: (tokens, R)."""
        # float64 throughout where it is cheap; elsewhere the product in float32 and only the sum in float64
        z = z.double() if z.device.type == "cpu" else z.float()
        product = (z.mT @ z).to(torch.float32 if z.device.type == "mps" else torch.float64)
        # not in place: the sum may have begun in inference mode, and go on outside of it
        self._gram = product if self._gram is None else self._gram + product
        self.tokens += z.shape[0]

    def compute(self, task: int, subspace: Subspace, levels: frozenset[float] = frozenset()) -> SufficientStatistics:
        """The sums so far, as statistics in which only task `task` was seen, at these noise levels."""
        empty = SufficientStatistics.empty(subspace)
        if self._gram is None:
            return empty
        gram = empty.gram.clone()
        summed = self._gram.to("cpu", torch.float64)
        gram[task] = (summed + summed.mT) / 2  # products are symmetric only to rounding
        tokens, samples = (
            tuple(count if k == task else 0 for k in range(len(subspace.ranks)))
            for count in (self.tokens, self.samples or self.tokens)
        )
        seen = tuple(levels if k == task else frozenset[float]() for k in range(len(subspace.ranks)))
        return SufficientStatistics(gram, tokens, subspace.fingerprint, samples, seen)


def not_finite(site: object) -> str:
    return (
        f"{site}: activations were NaN or infinite while collecting. "
        "Check that the model makes an image with each LoRA alone, and try another dtype."
    )
