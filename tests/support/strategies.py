"""Hypothesis strategies: merges at one layer, of all sizes, the degenerate ones among them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st
from torch import Tensor

from ssr_core import Calibration, LowRankUpdate, MergeSettings, Site, merge
from synthetic import calibration_at, dense_modules, random, random_update

KINDS = ("random", "random", "random", "absent", "zero", "twin")  # of a LoRA beside others


@dataclass(frozen=True)
class Problem:
    """K LoRAs at one linear layer, and the tokens that it sees under each."""

    updates: tuple[LowRankUpdate | None, ...]  # (K,)
    tokens: tuple[Tensor, ...]  # (K,) of (n, in) float64

    @property
    def site(self) -> Site:
        return Site.whole("layer", next(update.out_features for update in self.updates if update is not None))

    def calibration(self) -> Calibration:
        return calibration_at(self.site, self.updates, self.tokens)

    def merged(self, **settings) -> Tensor:
        """The dense merge, (out, in) float64."""
        return merged_dense(self.calibration(), **settings)

    def ordered(self, order: Sequence[int]) -> "Problem":
        return Problem(tuple(self.updates[k] for k in order), tuple(self.tokens[k] for k in order))

    def with_updates(self, updates: Sequence[LowRankUpdate | None]) -> "Problem":
        return replace(self, updates=tuple(updates))


def merged_dense(calibration: Calibration, **settings) -> Tensor:
    return dense_modules(merge(calibration, MergeSettings(**settings)).updates)["layer"]


def dimensions(largest: int = 9) -> st.SearchStrategy[int]:
    return st.integers(1, largest)


def seeds() -> st.SearchStrategy[int]:
    return st.integers(0, 10_000)


@st.composite
def problems(draw: st.DrawFn, least: int = 1, most: int = 4) -> Problem:
    """From `least` to `most` LoRAs; ranks may exceed the layer's sides, tokens may be one or none."""
    out, inputs = draw(dimensions()), draw(dimensions())
    updates: list[LowRankUpdate | None] = []
    for kind in draw(st.lists(st.sampled_from(KINDS), min_size=least, max_size=most)):
        updates.append(_update(draw, kind, out, inputs, updates))
    if all(update is None for update in updates):
        updates[0] = random_update(out, inputs, draw(st.integers(1, 4)), draw(seeds()))
    counts = [draw(st.sampled_from((0, 1, 2, 5, 20))) for _ in updates]
    tokens = [random(n, inputs, seed=draw(seeds())) * draw(st.sampled_from((0.01, 1.0, 30.0))) for n in counts]
    return Problem(tuple(updates), tuple(tokens))


def _update(
    draw: st.DrawFn, kind: str, out: int, inputs: int, before: Sequence[LowRankUpdate | None]
) -> LowRankUpdate | None:
    if kind == "absent":
        return None
    if kind == "twin" and before and before[-1] is not None:
        return before[-1]
    update = random_update(out, inputs, draw(st.integers(1, 12)), draw(seeds()))
    return LowRankUpdate(update.down, torch.zeros_like(update.up)) if kind == "zero" else update


def distance(one: Tensor, other: Tensor, scale: Tensor | None = None) -> float:
    """|one - other| relative to `scale`, or to `other`."""
    scale = other if scale is None else scale
    return float((one - other).norm() / scale.norm().clamp_min(1e-9))
