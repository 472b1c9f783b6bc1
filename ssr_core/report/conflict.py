"""Conflict: where LoRAs write over each other, how much, and what routing leaves of it, before anything is merged.

All of it are sums over tokens of squared outputs, read off the statistics. Refinement, which comes after a first merge,
is not looked at.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..errors import StatisticsError
from ..lora.site import Site
from ..lora.subspace import Subspace
from ..parallel import each
from ..solve.diagnostics import effects, spoken
from ..solve.likeness import Likeness, alike
from ..solve.rank import Directions
from ..solve.router import normal_equations, solve_router
from ..solve.settings import MergeSettings
from ..solve.summary import Summary
from ..solve.weights import task_weights
from ..statistics.calibration import Calibration
from ..statistics.case import Case, singles


@dataclass(frozen=True, eq=False)
class SiteConflict:
    """What K LoRAs do to each other at one site, float64. Row i is what happens on the tokens of case i, of C."""

    site: Site
    plain: Tensor  # (C, K) [i, j] = sum |up_j z_j|^2, what LoRA j writes in a plain stack, if it speaks its own effect
    routed: Tensor  # (C, K) the same of what is routed to LoRA j; if it speaks, what its own part is off by
    stack: Tensor  # (C,) squared distance of the plain stack from the LoRAs that speak alone
    merge: Tensor  # (C,) that of the routed merge
    effect: Tensor  # (C,) sum |up z_S|^2 over the case's own tokens; of silence what others do to as many tokens
    spectrum: tuple[float, ...]  # share of the merge's effect along each direction, largest first
    coverage: int  # noise levels, or samples, of the LoRA that saw the fewest


@dataclass(frozen=True, eq=False)
class Conflict:
    """What K LoRAs do to each other."""

    names: tuple[str, ...]
    strengths: tuple[float, ...]
    sites: tuple[SiteConflict, ...]
    cases: tuple[Case, ...] = ()  # (C,) the first K are each LoRA by itself; given empty, there are no others
    alike: tuple[Likeness, ...] = ()  # LoRAs that are the same subject

    def __post_init__(self) -> None:
        object.__setattr__(self, "cases", self.cases or singles(len(self.names)))

    @property
    def summary(self) -> Summary:
        """What a merge would keep, and what to do next."""
        stack, merge = (tuple(self.error(kind).tolist()) for kind in ("stack", "merge"))
        return Summary(self.names, self.cases, stack, merge, self.coverage, self.alike, made=False)

    @property
    def coverage(self) -> int:
        """Noise levels, or samples, of the LoRA that saw the fewest."""
        return min(one.coverage for one in self.sites)

    @property
    def labels(self) -> list[str]:
        """(C,) of the cases."""
        return [case.label(self.names) for case in self.cases]

    @cached_property
    def blocks(self) -> Mapping[str, tuple[SiteConflict, ...]]:
        """The sites by block of the model, in the order of their numbers."""
        grouped: dict[str, list[SiteConflict]] = {}
        for site in sorted(self.sites, key=lambda one: _natural(one.site.module)):
            grouped.setdefault(block_of(site.site.module), []).append(site)
        return {block: tuple(sites) for block, sites in grouped.items()}

    @cached_property
    def effect(self) -> Tensor:
        """(C,) the whole effect on each case's own tokens."""
        return sum((one.effect for one in self.sites), torch.zeros(len(self.cases), dtype=torch.float64))

    def cross_talk(self, kind: str) -> Tensor:
        """(C, K) [i, j] = what LoRA j writes on tokens of case i, relative to what belongs there: "plain", "routed"."""
        total = sum(getattr(one, kind) for one in self.sites)
        return _relative(total, self.effect[:, None])

    def error(self, kind: str) -> Tensor:
        """(C,) 0 = as the LoRAs that speak alone, 1 = as if they were not there. "stack" or "merge"."""
        return _relative(sum(getattr(one, kind) for one in self.sites), self.effect)

    def error_by_block(self, kind: str) -> dict[str, Tensor]:
        """(C,) per block: relative to the case's own effect there; NaN where it has none."""
        return {
            block: _relative(sum(getattr(one, kind) for one in sites), sum(one.effect for one in sites))
            for block, sites in self.blocks.items()
        }

    def lost_at(self, rank: int) -> float:
        """The mean share of a layer's effect that is lost if it is cut to `rank`."""
        return sum(sum(one.spectrum[rank:]) for one in self.sites) / len(self.sites)

    @property
    def rank(self) -> int:
        """Of the layer that needs the most directions."""
        return max(sum(share > 1e-9 for share in one.spectrum) for one in self.sites)

    def competing(self, one: int, other: int, share: float = 0.6) -> list[str]:
        """The fewest blocks that hold `share` of what LoRA `other` writes on LoRA `one`'s tokens in a plain stack."""
        sums = {block: float(sum(s.plain[one, other] for s in sites)) for block, sites in self.blocks.items()}
        return most_of(sums, share)


def find_conflict(
    calibration: Calibration,
    settings: MergeSettings | None = None,
    on_site: Callable[[int, int], None] = lambda done, total: None,
) -> Conflict:
    """Compare the plain stack with a routed merge at every site. Nothing is merged, nothing cut.

    Args:
        settings: strengths, weights and ridge of the merge that is looked at.
        on_site: called with (done, total) before each site; may raise to stop.

    Raises:
        SSRError: settings that cannot be meant.
        StatisticsError: there is one LoRA only, or nothing was measured.
        SolveError: a correlation matrix is singular.
    """
    settings = settings or MergeSettings()
    settings.check(len(calibration.loras))
    calibration.check_measured()
    if not calibration.statistics:
        raise StatisticsError("There is only one LoRA, so none disturbs another.")
    strengths = settings.strengths or tuple(lora.strength for lora in calibration.loras)
    weights = task_weights(calibration, settings)

    def at(site: Site) -> SiteConflict:
        scaled = calibration.subspaces[site].scaled(strengths)
        return _at_site(site, scaled, calibration, weights[site], settings)

    sites: list[SiteConflict] = []
    for found in each(at, list(calibration.statistics)):
        on_site(len(sites), len(calibration.statistics))
        sites.append(found)
    return Conflict(calibration.names, strengths, tuple(sites), calibration.cases, alike(calibration.subspaces))


def _at_site(
    site: Site, scaled: Subspace, calibration: Calibration, weights: Sequence[float], settings: MergeSettings
) -> SiteConflict:
    statistics = calibration.statistics[site]
    statistics.check(scaled, site)
    equations = normal_equations(statistics, scaled, weights, settings.ridge, site, cases=calibration.cases)
    router, energy = solve_router(equations), scaled.energy
    whole = torch.eye(*router.shape, dtype=torch.float64)
    plain, routed, stack, merge = [], [], [], []
    for gram, case in zip(statistics.grams, calibration.cases, strict=True):
        rows = spoken(scaled, case)
        alone = torch.zeros_like(whole)
        alone[rows] = whole[rows]
        written = energy * gram[: scaled.rank, : scaled.rank]
        plain.append(_by_lora(written, scaled))
        others = whole - alone
        stack.append((energy * (others @ gram @ others.mT)).sum())
        off = energy * ((router - alone) @ gram @ (router - alone).mT)
        routed.append(_by_lora(off, scaled))
        merge.append(off.sum())
    spectrum = Directions.of(router.mT @ energy @ router, equations.factor).spectrum
    matrices, sums = (torch.stack(plain), torch.stack(routed)), (torch.stack(stack), torch.stack(merge))
    found = torch.tensor(effects(statistics, scaled, calibration.cases), dtype=torch.float64)
    effect = _usual(found, statistics.tokens, calibration.cases)
    return SiteConflict(site, *matrices, *sums, effect, spectrum, min(statistics.coverage[: len(scaled.ranks)]))


def _usual(effect: Tensor, tokens: Sequence[int], cases: Sequence[Case]) -> Tensor:
    """Effects with that of silence filled in: what the others have on average on as many tokens."""
    silent, counts = torch.tensor([case.is_silence for case in cases]), torch.tensor(tokens, dtype=torch.float64)
    heard = ~silent & (counts > 0)
    mean = (effect[heard] / counts[heard]).mean() if heard.any() else effect.new_zeros(())
    return torch.where(silent, mean * counts, effect)


def _by_lora(products: Tensor, scaled: Subspace) -> Tensor:
    """(K,) the sum of |up_j c_j|^2 for each LoRA j's own part of c, from up^T up * c c^T, (rank, rank)."""
    return torch.stack([products[block, block].sum() for block in scaled.blocks])


def block_of(module: str) -> str:
    """A module's name up to and with its first number, or its first part where it has none: double_blocks.3."""
    parts = module.removeprefix("diffusion_model.").split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), 0)
    return ".".join(parts[: number + 1])


def _natural(name: str) -> list[tuple[int, str]]:
    """To sort by: numbers by their value."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _relative(sums: Any, effect: Any) -> Tensor:
    """NaN where there is no effect."""
    found: Tensor = torch.where(effect > 0, sums / effect, math.nan)
    return found


def most_of(sums: Mapping[str, float], share: float) -> list[str]:
    """The fewest names whose sums make up `share` of all, in their own order."""
    found, total = set(), 0.0
    for name in sorted(sums, key=lambda name: -sums[name]):
        found.add(name)
        total += sums[name]
        if total >= share * sum(sums.values()):
            break
    return [name for name in sums if name in found]
