"""Report: what a merge did, site by site, and as a text that a person can read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..lora.site import Site
from ..statistics.case import Case, singles, unheard
from .diagnostics import Residual
from .likeness import Likeness
from .summary import FEW_LEVELS, Summary

UNMEASURED = (
    "Merged from the weights alone: the model was not run, so nobody knows what the LoRAs really add to each other's "
    "prompts.\nNext: calibrate, with four steps or more and some prompts of each LoRA; on small models that left half "
    "of the error."
)
RANKS = (4, 8, 16, 32, 64, 128, 256)  # at which the report tells what would be lost


@dataclass(frozen=True)
class SiteReport:
    """What happened at one site."""

    site: Site
    ranks: tuple[int, ...]  # (K,) of the inputs
    rank: int  # of the result
    tokens: tuple[int, ...] = ()  # (C,); empty where nothing was measured
    residuals: tuple[Residual, ...] = ()  # (C,)
    condition: float = math.nan  # of the correlation matrix with its ridge: a lower bound, from its pivots
    energy: float = 1.0  # share of the update's effect that truncation kept
    coverage: tuple[int, ...] = ()  # (C,) noise levels seen, or samples where levels are not known
    has_levels: bool = True  # which of the two
    spectrum: tuple[float, ...] = ()  # share of the effect along each direction, largest first; empty if not computed

    @property
    def is_shared(self) -> bool:
        return sum(rank > 0 for rank in self.ranks) > 1

    @property
    def joint_rank(self) -> int:
        return sum(self.ranks)

    def error(self, kind: str) -> float:
        """Relative error over all cases, `kind` being "stack" or "merge"; 0 = as asked for, 1 = the base model."""
        return _ratio(self.residuals, kind)


@dataclass(frozen=True)
class Report:
    """What a merge did, site by site. `str(report)` is the text: what to know first, then the table."""

    names: tuple[str, ...]
    strengths: tuple[float, ...]
    sites: tuple[SiteReport, ...]
    notes: tuple[str, ...] = ()  # lines of the host: parts that were carried, keys that did not match
    cases: tuple[Case, ...] = ()  # (C,) the first K are each LoRA by itself; given empty, there are no others
    alike: tuple[Likeness, ...] = ()  # LoRAs that are the same subject
    measured: bool = True  # False: errors are only expected, from the LoRAs' weights
    refined: bool = False  # whether errors are those before the corrections, which lower them

    def __post_init__(self) -> None:
        object.__setattr__(self, "cases", self.cases or singles(len(self.names)))

    def with_notes(self, *notes: str) -> Report:
        return replace(self, notes=(*self.notes, *notes))

    @property
    def shared(self) -> tuple[SiteReport, ...]:
        return tuple(site for site in self.sites if site.is_shared)

    @property
    def routed(self) -> tuple[SiteReport, ...]:
        return tuple(site for site in self.sites if site.residuals)

    def error(self, case: int, kind: str = "merge") -> float:
        """Of one case over all routed sites: 0 = as its LoRAs alone, 1 = as if they were not there. "merge" or "stack".

        Silence has no effect to compare with; what is added to it is told relative to what others do to as many tokens.
        """
        found = [site.residuals[case] for site in self.routed]
        if not self.cases[case].is_silence:
            return _ratio(found, kind)
        usual = sum(_effect_per_token(site) * site.tokens[case] for site in self.routed)
        return sum(getattr(one, kind) for one in found) / usual if usual > 0 else math.nan

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

    @property
    def summary(self) -> Summary:
        """What is kept, and what to do next."""
        numbers = range(len(self.cases))
        stack, merge = (tuple(self.error(number, kind) for number in numbers) for kind in ("stack", "merge"))
        seen = self._coverage or FEW_LEVELS  # it is not known of statistics of old
        return Summary(self.names, self.cases, stack, merge, seen, self.alike, refined=self.refined)

    def __str__(self) -> str:
        return f"{self.summary if self.measured else UNMEASURED}\n\n{self.details}"

    @property
    def details(self) -> str:
        """The text without its summary."""
        return "\n".join([*self._table(), *self._remarks(), *self.notes])

    @property
    def _coverage(self) -> int:
        """Noise levels or samples that LoRAs were seen at; combinations have prompts of their own number."""
        by_itself = slice(len(self.names))
        return max((count for site in self.routed for count in site.coverage[by_itself]), default=0)

    def _table(self) -> list[str]:
        labels = [case.label(self.names) for case in self.cases]
        width = max(4, *map(len, labels))
        lines = [f"{'':<{width}}  plain stack  this merge  strength   tokens"]
        for number, label in enumerate(labels):
            strength = f"{self.strengths[number]:.2f}" if number < len(self.names) else ""
            tokens = max((site.tokens[number] for site in self.routed), default=0)
            stack = "reference" if self._is_stack(number) else _figure(self.error(number, "stack"))
            lines.append(
                f"{label:<{width}}  {stack:>11}  {_figure(self.error(number)):>10}  {strength:>8} {tokens:>8}".rstrip()
            )
        where = "on the calibration tokens" if self.measured else "as the weights alone let one expect it"
        lines.append(f"Error {where}: 0 = these LoRAs alone, 1 = as if they were not there.")
        if self.refined:
            lines.append("That of this merge is told as it is before refinement, which lowers it.")
        return lines

    def _is_stack(self, case: int) -> bool:
        """Whether what a case asks for is all LoRAs: they stacked are what it is compared with."""
        return 1 < len(self.names) == len(self.cases[case].speakers)

    def _remarks(self) -> list[str]:
        shared = f"{len(self.shared)} of them shared by two or more"
        remarks = [f"{len(self.names)} LoRAs, {len(self.sites)} sites, {shared}."]
        remarks += self._of_calibration() if self.measured else []
        if dropped := [site for site in self.sites if not site.rank]:
            remarks.append(f"{_count(dropped)} left out as asked: {_some(dropped)}.")
        if worse := self.worse_than_stack():
            remarks.append(f"{_count(worse)} fit worse than the plain stack: {_some(worse)}.")
        if line := self._few_levels():
            remarks.append(line)
        if line := self._error_against_rank():
            remarks.append(line)
        kept = [site.energy for site in self.sites if site.energy < 1]
        if kept:
            mean = sum(kept) / len(kept)
            remarks.append(f"Truncation kept {mean:.1%} of the effect on average, at least {min(kept):.1%}.")
        return remarks

    def _of_calibration(self) -> list[str]:
        """What it did not hear, or too little."""
        remarks = [line] if (line := apart(self.names, self.cases)) else []
        if unseen := [site for site in self.routed if sum(site.tokens) == 0]:
            remarks.append(f"{_count(unseen)} saw no token and got the sum of the LoRAs: {_some(unseen)}.")
        if short := [site for site in self.short_of_tokens() if sum(site.tokens)]:
            remarks.append(
                f"{_count(short)} saw fewer tokens than their joint rank, so the ridge decides there more than the "
                f"data: {_some(short)}. More steps or prompts help."
            )
        return remarks

    def _few_levels(self) -> str:
        seen = self._coverage
        if not (self.measured and 0 < seen < FEW_LEVELS):
            return ""
        what, more = ("noise level", "steps") if self.routed[0].has_levels else ("sample", "prompts")
        return (
            f"The LoRAs were seen at {seen} {what}{'s' * (seen > 1)} only, so the merge leans towards their mean. "
            f"Collect with {FEW_LEVELS} {more} or more."
        )

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


def _effect_per_token(site: SiteReport) -> float:
    """The mean over the cases in which somebody speaks."""
    found = [one.base / count for one, count in zip(site.residuals, site.tokens, strict=True) if count and one.base > 0]
    return sum(found) / len(found) if found else 0.0


def apart(names: Sequence[str], cases: Sequence[Case], most: int = 3) -> str:
    """A warning of LoRAs that were never heard together; empty if there are none."""
    pairs = [f"{names[a]} and {names[b]}" for a, b in unheard(cases, len(names))]
    if not pairs:
        return ""
    listed = ", ".join(pairs[:most]) + (", ..." if len(pairs) > most else "")
    return (
        f"Never heard together: {listed}. A prompt that asks for both may get only one of them, or neither in "
        "full. Give prompts that ask for both (SSR Add Combination, or `combinations`), and collect again."
    )
