"""Diagnostics: what a merge keeps of each LoRA, read off the statistics alone, and a report a person can read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..lora.site import Site
from ..lora.subspace import Subspace
from ..statistics.sufficient_statistics import SufficientStatistics

FEW_LEVELS = 4  # noise levels; with fewer the prior decides more than a person would expect
RANKS = (4, 8, 16, 32, 64, 128, 256)  # at which the report tells what would be lost


@dataclass(frozen=True)
class Residual:
    """Of one task at one site: sums over its tokens of squared output differences."""

    base: float  # |up_k z_k|^2: the distance from the base model, which is the LoRA's whole effect
    stack: float  # distance of the plain stack from the LoRA alone
    merge: float  # distance of the merge from the LoRA alone


def residuals(
    statistics: SufficientStatistics, scaled: Subspace, router: Tensor, own: tuple[Tensor, Tensor] | None = None
) -> tuple[Residual, ...]:
    """(K,) how far base, plain stack and merge are from each LoRA alone, on that LoRA's own tokens.

    Args:
        scaled: the subspace with each task at its strength.
        router: (rank, R), as it is in the result: blended and truncated.
        own: basis (out, rank) that the router writes to instead of the LoRAs' `up`, and basis^T basis.
    """
    energy = scaled.energy
    if own is not None:  # both side by side, so that they can be compared
        router = torch.cat([router.new_zeros(scaled.rank, router.shape[1]), router])
        basis, own_energy = own
        shared = scaled.up.mT.to(basis) @ basis
        energy = torch.cat([torch.cat([energy, shared], 1), torch.cat([shared.mT, own_energy], 1)])
    plain = torch.eye(*router.shape, dtype=torch.float64)
    plain[scaled.rank :] = 0
    found = []
    for base, gram, block in zip(effects(statistics, scaled), statistics.grams, scaled.blocks, strict=True):
        alone = torch.zeros_like(plain)
        alone[block] = plain[block]
        stack = plain[: scaled.rank] - alone[: scaled.rank]
        found.append(Residual(base, _squared(scaled.energy, stack, gram), _squared(energy, router - alone, gram)))
    return tuple(found)


def effects(statistics: SufficientStatistics, scaled: Subspace) -> list[float]:
    """(K,) the whole effect of each LoRA: the sum over its own tokens of |up_k z_k|^2."""
    return [
        float((scaled.energy[block, block] * gram[block, block]).sum())
        for gram, block in zip(statistics.grams, scaled.blocks, strict=True)
    ]


def _squared(energy: Tensor, difference: Tensor, gram: Tensor) -> float:
    """sum over tokens |up difference z|^2"""
    return float((energy * (difference @ gram @ difference.mT)).sum())


@dataclass(frozen=True)
class SiteReport:
    """What happened at one site."""

    site: Site
    ranks: tuple[int, ...]  # (K,) of the inputs
    rank: int  # of the result
    tokens: tuple[int, ...] = ()  # (K,); empty where nothing was measured
    residuals: tuple[Residual, ...] = ()  # (K,)
    condition: float = math.nan  # of the correlation matrix with its ridge: a lower bound, from its pivots
    energy: float = 1.0  # share of the update's effect that truncation kept
    coverage: tuple[int, ...] = ()  # (K,) noise levels seen, or samples where levels are not known
    has_levels: bool = True  # which of the two
    spectrum: tuple[float, ...] = ()  # share of the effect along each direction, largest first; empty if not computed

    @property
    def is_shared(self) -> bool:
        return sum(rank > 0 for rank in self.ranks) > 1

    @property
    def joint_rank(self) -> int:
        return sum(self.ranks)

    def error(self, kind: str) -> float:
        """Relative error over all tasks, `kind` being "stack" or "merge"; 0 = each LoRA alone, 1 = the base model."""
        return _ratio(self.residuals, kind)


@dataclass(frozen=True)
class Report:
    """What a merge did, site by site. `str(report)` is the summary."""

    names: tuple[str, ...]
    strengths: tuple[float, ...]
    sites: tuple[SiteReport, ...]
    notes: tuple[str, ...] = ()  # lines of the host: parts that were carried, keys that did not match

    def with_notes(self, *notes: str) -> Report:
        return replace(self, notes=(*self.notes, *notes))

    @property
    def shared(self) -> tuple[SiteReport, ...]:
        return tuple(site for site in self.sites if site.is_shared)

    @property
    def routed(self) -> tuple[SiteReport, ...]:
        return tuple(site for site in self.sites if site.residuals)

    def error(self, task: int, kind: str = "merge") -> float:
        """Of one LoRA over all routed sites: 0 = as the LoRA alone, 1 = as if it were not there. "merge" or "stack"."""
        return _ratio([site.residuals[task] for site in self.routed], kind)

    def lost_at(self, rank: int) -> float:
        """The mean share of a layer's effect that is lost if it is cut to `rank`; NaN if that is not known."""
        tails = [sum(site.spectrum[rank:]) for site in self.routed if site.spectrum]
        return sum(tails) / len(tails) if tails else math.nan

    def worse_than_stack(self) -> tuple[SiteReport, ...]:
        """But for what a cut of the rank may do to a site that is a stack."""
        return tuple(site for site in self.routed if site.rank and site.error("merge") > 1.01 * site.error("stack"))

    def short_of_tokens(self) -> tuple[SiteReport, ...]:
        """Sites with fewer tokens than joint rank: the ridge decides there more than the data."""
        return tuple(site for site in self.routed if sum(site.tokens) < site.joint_rank)

    def __str__(self) -> str:
        return "\n".join([*self._table(), *self._remarks(), *self.notes])

    def _table(self) -> list[str]:
        width = max(4, *(len(name) for name in self.names))
        lines = [
            f"{len(self.names)} LoRAs, {len(self.sites)} sites, {len(self.shared)} of them shared by two or more",
            f"{'LoRA':<{width}}  strength   tokens  plain stack  this merge",
        ]
        for task, (name, strength) in enumerate(zip(self.names, self.strengths, strict=True)):
            tokens = max((site.tokens[task] for site in self.routed), default=0)
            errors = "".join(f"{_figure(self.error(task, kind)):>13}" for kind in ("stack", "merge"))
            lines.append(f"{name:<{width}}  {strength:>8.2f} {tokens:>8}{errors}")
        lines.append("Error on the calibration tokens: 0 = the LoRA alone, 1 = as if it were not there.")
        return lines

    def _remarks(self) -> list[str]:
        remarks = []
        if unseen := [site for site in self.routed if sum(site.tokens) == 0]:
            remarks.append(f"{_count(unseen)} saw no token and got the mean of the LoRAs: {_some(unseen)}.")
        if short := [site for site in self.short_of_tokens() if sum(site.tokens)]:
            remarks.append(
                f"{_count(short)} saw fewer tokens than their joint rank, so the ridge decides there more than the "
                f"data: {_some(short)}. More steps or prompts help."
            )
        if dropped := [site for site in self.sites if not site.rank]:
            remarks.append(f"{_count(dropped)} left out as asked: {_some(dropped)}.")
        if worse := self.worse_than_stack():
            remarks.append(f"{_count(worse)} fit worse than the plain stack: {_some(worse)}.")
        seen = max((count for site in self.routed for count in site.coverage), default=0)
        if 0 < seen < FEW_LEVELS:
            what, more = ("noise level", "steps") if self.routed[0].has_levels else ("sample", "prompts")
            remarks.append(
                f"The LoRAs were seen at {seen} {what}{'s' * (seen > 1)} only, so the merge leans towards their mean. "
                f"Collect with {FEW_LEVELS} {more} or more."
            )
        if line := self._error_against_rank():
            remarks.append(line)
        kept = [site.energy for site in self.sites if site.energy < 1]
        if kept:
            mean = sum(kept) / len(kept)
            remarks.append(f"Truncation kept {mean:.1%} of the effect on average, at least {min(kept):.1%}.")
        return remarks

    def _error_against_rank(self) -> str:
        most = max((sum(share > 1e-6 for share in site.spectrum) for site in self.routed), default=0)
        ranks = [rank for rank in RANKS if rank < most]
        if not ranks:
            return ""
        listed = ", ".join(f"{rank}: {self.lost_at(rank):.1%}" for rank in ranks)
        return f"Effect lost if every layer is cut to rank {listed}."


def _ratio(residuals_: Sequence[Residual], kind: str) -> float:
    base = sum(r.base for r in residuals_)
    return sum(getattr(r, kind) for r in residuals_) / base if base > 0 else math.nan


def _figure(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"


def _count(sites: Sequence[SiteReport]) -> str:
    return "1 site" if len(sites) == 1 else f"{len(sites)} sites"


def _some(sites: Sequence[SiteReport], most: int = 3) -> str:
    return ", ".join(str(site.site) for site in sites[:most]) + (", ..." if len(sites) > most else "")
