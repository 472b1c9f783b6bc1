"""Sufficient statistics of one site: what the model's activations leave behind in the joint subspace."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

from torch import Tensor

from ..errors import StatisticsError
from ..lora.subspace import Subspace
from .grams import Grams


@dataclass(frozen=True, eq=False)
class SufficientStatistics:
    """One Gram matrix per case, C of them. G and Q of the paper, residuals and re-weighting are all read off it.

    Sums, never means: so statistics of two runs, prompts or machines add up exactly.
    """

    grams: Grams  # given as such or as a tensor (C, R, R)
    tokens: tuple[int, ...]  # (C,)
    fingerprint: str  # of the subspace they were measured in
    samples: tuple[int, ...] = ()  # (C,) images and steps that the tokens come from; their number if nothing is known
    levels: tuple[frozenset[float], ...] = ()  # (C,) noise levels they were seen at; empty if nothing is known

    def __post_init__(self) -> None:
        if isinstance(self.grams, Tensor):
            object.__setattr__(self, "grams", Grams.of(self.grams))
        object.__setattr__(self, "samples", self.samples or self.tokens)
        object.__setattr__(self, "levels", self.levels or (frozenset(),) * len(self.tokens))

    @property
    def gram(self) -> Tensor:
        """(C, R, R) float64; gram[c] = sum of z z^T over case c's tokens, z = down @ x. Unpacked at every call."""
        return self.grams.dense()

    @property
    def has_levels(self) -> bool:
        return any(self.levels)

    @property
    def coverage(self) -> tuple[int, ...]:
        """(C,) how many different situations were seen: noise levels, or samples where the levels are not known."""
        return tuple(len(levels) or samples for levels, samples in zip(self.levels, self.samples, strict=True))

    @classmethod
    def empty(cls, subspace: Subspace) -> SufficientStatistics:
        cases = len(subspace.ranks)  # one for each LoRA, at least
        return cls(Grams.zeros(cases, len(subspace.down)), (0,) * cases, subspace.fingerprint)

    def __add__(self, other: SufficientStatistics) -> SufficientStatistics:
        """The statistics of both runs together. Cases that one of them does not have yet saw nothing there."""
        if self.fingerprint != other.fingerprint:
            raise StatisticsError(
                "These statistics were measured with other LoRAs (or in another order) and cannot be added; "
                "collect them again with the same LoRAs."
            )
        tokens = tuple(a + b for a, b in zip_longest(self.tokens, other.tokens, fillvalue=0))
        samples = tuple(a + b for a, b in zip_longest(self.samples, other.samples, fillvalue=0))
        unknown = frozenset[float]()
        levels = tuple(a | b for a, b in zip_longest(self.levels, other.levels, fillvalue=unknown))
        return SufficientStatistics(self.grams + other.grams, tokens, self.fingerprint, samples, levels)

    def padded(self, cases: int) -> SufficientStatistics:
        """With so many cases; those that are new saw nothing."""
        new = cases - len(self.tokens)
        return SufficientStatistics(
            *(self.grams.padded(cases), self.tokens + (0,) * new, self.fingerprint),
            *(self.samples + (0,) * new, self.levels + (frozenset(),) * new),
        )

    def chosen(self, cases: Sequence[int | None], rows: Tensor, fingerprint: str) -> SufficientStatistics:
        """Of these cases (None: one that saw nothing) and of these rows, in the subspace with that fingerprint."""
        return SufficientStatistics(
            self.grams.chosen(cases, rows),
            tuple(0 if case is None else self.tokens[case] for case in cases),
            fingerprint,
            tuple(0 if case is None else self.samples[case] for case in cases),
            tuple(frozenset() if case is None else self.levels[case] for case in cases),
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
