"""Split: the merge as one LoRA for each that it is made of, to be loaded together or one by one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..errors import SSRError
from ..statistics.calibration import Calibration
from .diagnostics import effects
from .merge import Merge, OnSite, merge_of
from .problem import Problem
from .settings import MergeSettings


@dataclass(frozen=True, eq=False)
class Split:
    """K LoRAs that add up to the merge. `str(split)` is what a person wants to know of them."""

    parts: tuple[Merge, ...]  # (K,) in the order of the LoRAs
    belongs: tuple[float, ...]  # (K,) sum of |up z_S|^2 over the tokens of all cases in which this LoRA is silent

    @property
    def names(self) -> tuple[str, ...]:
        return self.parts[0].report.names

    def off_alone(self, task: int) -> float:
        """How far the part is by itself from its LoRA, on its own prompts: 0 = the same, 1 = as if it were missing."""
        return self.parts[task].report.error(task)

    def added(self, task: int, kind: str = "merge") -> float:
        """What it adds where it should be silent, relative to what belongs there: "stack" as it was, "merge" now."""
        report = self.parts[task].report
        silent = [number for number, case in enumerate(report.cases) if task not in case.speakers]
        found = sum(getattr(site.residuals[number], kind) for site in report.routed for number in silent)
        return found / self.belongs[task] if self.belongs[task] else math.nan

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        width = max(4, *map(len, self.names))
        yield f"{len(self.parts)} LoRAs that add up to the merge. Each can be loaded, scheduled and masked by itself."
        yield f"{'LoRA':<{width}}  strength  off alone  adds to others, before  after"
        for task, (name, part) in enumerate(zip(self.names, self.parts, strict=True)):
            before, after = self.added(task, "stack"), self.added(task)
            yield (
                f"{name:<{width}}  {part.report.strengths[task]:>8.2f}  {self.off_alone(task):>9.3f}  "
                f"{before:>22.3f}  {after:>5.3f}"
            )
        yield (
            "Off alone: its distance from its LoRA on its own prompts, 0 = the same, 1 = as if it were missing. "
            "Adds to others: what it writes on prompts of the others, relative to what belongs there."
        )
        energies = [site.energy for part in self.parts for site in part.report.sites]
        if min(energies) < 1 - 1e-9:
            yield (
                f"Cut to their rank the parts keep {sum(energies) / len(energies):.1%} of their effect on average, at "
                f"least {min(energies):.1%} in a layer. A merge is cut like this, too."
            )


def split(
    calibration: Calibration,
    settings: MergeSettings | None = None,
    on_site: OnSite = lambda done, total: None,
) -> Split:
    """The merge as a sum of K LoRAs, each with what it is that its LoRA contributes.

    At rank 0 each is as large as its LoRA. Without corrections nothing is lost by that; what corrections add is cut
    where it matters least, and kept at a rank as large as the layers.

    Args:
        on_site: called with (done, total) before each site of each part; may raise to stop.

    Raises:
        SSRError: there is one LoRA only, or settings cannot be meant.
        StatisticsError, SolveError: as merge() does.
    """
    settings = settings or MergeSettings()
    settings.check(len(calibration.loras))
    if len(calibration.loras) < 2:
        raise SSRError(f"{calibration.names[0]} is the only LoRA, so there is nothing to split.")
    problems = [Problem(calibration, settings, writer) for writer in range(len(calibration.loras))]
    steps = [len(problem.looked) + len(problem.sites) for problem in problems]
    parts: list[Merge] = []

    def told(done: int, _: int) -> None:
        on_site(sum(steps[: len(parts)]) + done, sum(steps))

    for problem in problems:
        parts.append(merge_of(problem, told))
    return Split(tuple(parts), _belongs(calibration, parts))


def _belongs(calibration: Calibration, parts: Sequence[Merge]) -> tuple[float, ...]:
    """(K,) what those that speak write where a LoRA is silent, at the sites that it is routed at."""
    found = [0.0] * len(parts)
    for task, part in enumerate(parts):
        for site in (one.site for one in part.report.routed):
            scaled = calibration.subspaces[site].scaled(part.report.strengths)
            written = effects(calibration.statistics[site], scaled, calibration.cases)
            found[task] += sum(
                one for one, case in zip(written, calibration.cases, strict=True) if task not in case.speakers
            )
    return tuple(found)
