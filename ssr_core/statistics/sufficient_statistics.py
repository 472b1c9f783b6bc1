"""Sufficient statistics of one site: what the model's activations leave behind in the joint subspace."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..errors import StatisticsError
from ..lora.subspace import Subspace
from .grams import Grams


@dataclass(frozen=True, eq=False)
class SufficientStatistics:
    """One Gram matrix per task. G and Q of the paper, residuals and re-weighting are all read off it.

    Sums, never means: so statistics of two runs, prompts or machines add up exactly.
    """

    grams: Grams  # given as such or as a tensor (K, R, R)
    tokens: tuple[int, ...]  # (K,)
    fingerprint: str  # of the subspace they were measured in
    samples: tuple[int, ...] = ()  # (K,) images and steps that the tokens come from; their number if nothing is known
    levels: tuple[frozenset[float], ...] = ()  # (K,) noise levels they were seen at; empty if nothing is known

    def __post_init__(self) -> None:
        if isinstance(self.grams, Tensor):
            object.__setattr__(self, "grams", Grams.of(self.grams))
        object.__setattr__(self, "samples", self.samples or self.tokens)
        object.__setattr__(self, "levels", self.levels or (frozenset(),) * len(self.tokens))

    @property
    def gram(self) -> Tensor:
        """(K, R, R) float64; gram[k] = sum of z z^T over task k's tokens, z = down @ x. Unpacked at every call."""
        return self.grams.dense()

    @property
    def has_levels(self) -> bool:
        return any(self.levels)

    @property
    def coverage(self) -> tuple[int, ...]:
        """(K,) how many different situations were seen: noise levels, or samples where the levels are not known."""
        return tuple(len(levels) or samples for levels, samples in zip(self.levels, self.samples, strict=True))

    @classmethod
    def empty(cls, subspace: Subspace) -> SufficientStatistics:
        tasks = len(subspace.ranks)
        return cls(Grams.zeros(tasks, len(subspace.down)), (0,) * tasks, subspace.fingerprint)

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
        return SufficientStatistics(self.grams + other.grams, tokens, self.fingerprint, samples, levels)

    def without(self, task: int, subspace: Subspace) -> SufficientStatistics:
        """What would have been measured had task `task` never been there. `subspace` is the one they belong to."""
        kept = [k for k in range(len(self.tokens)) if k != task]
        return SufficientStatistics(
            self.grams.chosen(kept, subspace.rows_without(task)),
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
        if not self.grams.is_finite():
            raise StatisticsError(not_finite(site))


def not_finite(site: object) -> str:
    return (
        f"{site}: activations were NaN or infinite while collecting. "
        "Check that the model makes an image with each LoRA alone, and try another dtype."
    )
