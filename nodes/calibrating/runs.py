"""Runs: what is sampled to calibrate, in which order, and how."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from .case_prompts import CasePrompts

SURVEY_STEPS = 4
REFINE = 1
TOKENS = 1024  # of each layer and step: over a calibration, a hundred for each direction that is measured
REFINE_STEPS = 3  # with fewer, a correction fits the few noise levels seen and is off at the others
LAST = 10000  # a step that no schedule has


@dataclass(frozen=True)
class Sampling:
    """How calibration images are sampled."""

    seed: int
    steps: int
    sampler: str
    scheduler: str
    cfg: float = 1.0
    negative: tuple[Any, ...] = ()  # CONDITIONING; counts only with a cfg above 1, as in any sampling
    tokens: int = 0  # of each layer and step that are counted at most; 0 = all
    start: int = 0  # the first step that is looked at; those before it are sampled unseen
    stop: int = LAST  # the step before which sampling ends

    @property
    def end(self) -> int:
        return min(self.stop, self.steps)

    @property
    def seen(self) -> int:
        """How many steps are looked at."""
        return self.end - self.start

    def seed_of(self, prompt: int) -> int:
        """Of the noise of the prompt with this number; the same for every LoRA."""
        return (self.seed + prompt) % 2**64


class Kind(Enum):
    """What a run is for, in the order in which they come."""

    SURVEY = "looking"  # for directions in which the layers' inputs vary
    MEASURE = "measuring"
    REFINE = "refining"  # comparing a first merge with the LoRA alone


@dataclass(frozen=True)
class Run:
    """One recording: some prompts of one case."""

    index: int  # of the case
    case: CasePrompts
    prompts: list[Any]
    sampling: Sampling
    kind: Kind

    @property
    def steps(self) -> int:
        return len(self.prompts) * self.sampling.seen

    @property
    def unseen(self) -> int:
        """Steps that are sampled before those that are looked at, once for all runs of the case."""
        once = self.case.latent is None and self.kind is Kind.MEASURE
        return len(self.prompts) * self.sampling.start if once else 0

    def reordered(self, order: Sequence[int]) -> Run:
        """With the LoRAs in another order: the new k-th is the old order[k]."""
        return replace(self, case=replace(self.case, case=self.case.case.reordered(order)))


def plan(cases: Sequence[CasePrompts], sampling: Sampling, context: int, refine: int) -> list[Run]:
    """All prompts of every case, once more for each refinement; before, for context rows, a look at each first one.

    Pairs that nobody asked for are not refined: they would take three times as long and most of the memory, for little.
    Refinements take half of the steps, as each is seen twice: on small models one LoRA at a time is then 3 to 5 % worse
    and two at once 2 to 3 % better (benchmarks/speed).
    """
    short = half = sampling
    if sampling.seen == sampling.steps:
        short = replace(sampling, steps=min(sampling.steps, SURVEY_STEPS))
        half = replace(sampling, steps=max(REFINE_STEPS, -(-sampling.steps // 2)))
    looks = [
        Run(i, one, one.conditioning[:1], short, Kind.SURVEY)
        for i, one in enumerate(cases)
        if context and not one.case.is_combination  # what they see is in what the LoRAs see by themselves
    ]
    measuring = [Run(i, one, one.conditioning, sampling, Kind.MEASURE) for i, one in enumerate(cases)]
    refine = refine if sampling.seen >= REFINE_STEPS else 0
    refined = [run for run in measuring if not run.case.is_glued]
    return looks + measuring + refine * [replace(run, sampling=half, kind=Kind.REFINE) for run in refined]
