"""Points: the model's calls while it samples the prompts of a calibration again, with each case's LoRAs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, pairwise
from typing import Any

from ...ssr_core import Branch, Case, Point, PointRecorder, memory_of
from ..calibrating.diffusion_model import prepared
from ..calibrating.runs import REFINE_STEPS, Run
from ..calibrating.sampling import OnStep, begin, sample
from ..reading.loaded_lora import LoadedLora

LEARNT, JUDGED = 1000, 2000  # added to the calibration's seed: the same prompts from other noise are further points
FEWEST = 32  # points of each case to learn from, however briefly it was measured
MOST = 2  # times that each prompt is sampled to have a point for each that is learnt from; more brings little
STEPS = 8  # where it was measured at so few that most noise levels were never seen
KEPT = 4  # held-out steps of each case

Step = list[Point]  # one with a negative prompt may call the model twice


class Notes:
    """The points of each prompt, step by step.

    Where they take more than `room` bytes, half of each prompt's steps are dropped, and the next prompt keeps the other
    half, so that all noise levels stay.
    """

    def __init__(self, room: float) -> None:
        self._room = room
        self._halvings = 0
        self._prompts: list[list[Step]] = []

    @property
    def every(self) -> int:
        """Of so many steps one is kept."""
        return int(2**self._halvings)

    @property
    def points(self) -> list[Point]:
        return [point for steps in self._prompts for point in chain(*steps)]

    def add(self, steps: list[Step]) -> None:
        """What one prompt was sampled with."""
        number = len(self._prompts)
        for halving in range(self._halvings):
            steps = _half(steps, number, halving)
        self._prompts.append(steps)
        while memory_of(self.points) > self._room and any(len(kept) > 1 for kept in self._prompts):
            self._prompts = [_half(kept, number, self._halvings) for number, kept in enumerate(self._prompts)]
            self._halvings += 1


def _half(steps: list[Step], prompt: int, halving: int) -> list[Step]:
    return steps[(prompt >> halving) & 1 :: 2] or steps


class Teacher:
    """What is on the model while a case is sampled: its LoRAs, and who writes down the calls."""

    def __init__(
        self, case: int, speaking: Sequence[LoadedLora], modules: Collection[str], note: Callable[[list[Step]], None]
    ) -> None:
        """
        Args:
            modules: the merge's own; what was dropped from it is not to come back through the others.
            note: given the steps of each prompt when it has been sampled.
        """
        self._branch = Branch.of([lora.lora for lora in speaking], modules)
        names = " + ".join(lora.task.name for lora in speaking) or "no LoRA"
        self._recorder, self._note = PointRecorder(case, names), note
        self._begins: list[int] = []  # of the recorder's points, the first of each step

    def at(self, level: float) -> None:
        """A step begins."""
        self._begins.append(len(self._recorder.points))

    def attach(self, model: Any) -> None:
        self._branch.attach(model)
        self._recorder.attach(model.diffusion_model)

    def detach(self) -> None:
        self._branch.detach()
        self._recorder.detach()
        points, self._recorder.points = self._recorder.points, []
        begins, self._begins = self._begins, []
        steps = [points[begin:end] for begin, end in pairwise([*begins, len(points)])]
        if steps:
            self._note([step for step in steps if step])  # a cache may have spared the model a step


@dataclass(frozen=True, eq=False)
class Lesson:
    """What a merge is polished on: the teachers' calls, in cases that are numbered here."""

    cases: tuple[Case, ...]
    points: tuple[Point, ...]
    held_out: tuple[Point, ...]
    every: int = 1  # of so many steps of each prompt, one is among `points`

    @property
    def all(self) -> tuple[Point, ...]:
        return (*self.points, *self.held_out)


def record(
    patcher: Any,
    loaded: Sequence[LoadedLora],
    modules: Collection[str],
    runs: Sequence[tuple[Run, Mapping[str, Any]]],
    on_step: OnStep,
    on_run: Callable[[int, int], None],
    wanted: int,
    before: Any = None,
    room: float = float("inf"),
) -> Lesson:
    """Sample every prompt of every case again, from new noise; and a middle one of each once more, to judge by.

    Args:
        modules: the merge's own; what was dropped from it shall not come back through the others.
        runs: each with its latent.
        wanted: how many points will be learnt from, over all steps.
        before: the model that samples the steps before the first that is looked at.
        room: bytes that the points to learn from may take; where all of them take more, fewer steps are kept.
    """
    cases = tuple(dict.fromkeys(run.case.case for run, _ in runs))
    notes = Notes(room)
    held_out: list[Point] = []
    times = _times(runs, wanted)

    def judge_by(steps: list[Step]) -> None:
        held_out.extend(chain(*steps[:: -(-len(steps) // KEPT)]))

    for number, (run, latent) in enumerate(runs):
        on_run(number, len(runs))
        speaking = [loaded[task] for task in run.case.case.speakers]
        for kind, one in _noised(run, times):
            note = notes.add if kind == LEARNT else judge_by
            teacher = Teacher(cases.index(run.case.case), speaking, modules, note)
            begun = begin(patcher, one, dict(latent), on_step, before) if one.unseen else ()
            sample(prepared(patcher, speaking), one, teacher, dict(latent), on_step, begun)
    return Lesson(cases, tuple(notes.points), tuple(held_out), notes.every)


def steps_of(runs: Sequence[tuple[Run, Mapping[str, Any]]], wanted: int) -> int:
    """How many sampling steps `record` takes."""
    times = _times(runs, wanted)
    return sum(one.steps + one.unseen for run, _ in runs for _, one in _noised(run, times))


def _times(runs: Sequence[tuple[Run, Mapping[str, Any]]], wanted: int) -> int:
    return min(MOST, -(-wanted // sum(run.steps for run, _ in runs)))


def _noised(run: Run, times: int) -> Iterator[tuple[int, Run]]:
    """What is sampled of one case, and whether it is learnt from or judged by.

    Args:
        times: so often each prompt is, and more often where it was measured briefly.
    """
    sampling = run.sampling
    if sampling.seen == sampling.steps < REFINE_STEPS:
        sampling = replace(sampling, steps=STEPS)
    for again in range(max(times, -(-FEWEST // (len(run.prompts) * sampling.seen)))):
        seed = sampling.seed_of(LEARNT + again * len(run.prompts))  # each prompt has the next one
        yield LEARNT, replace(run, sampling=replace(sampling, seed=seed))
    middle = run.prompts[len(run.prompts) // 2 :][:1]
    yield JUDGED, replace(run, sampling=replace(sampling, seed=sampling.seed_of(JUDGED)), prompts=middle)
