"""Points: the model's calls while it samples the prompts of a calibration again, with each case's LoRAs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...ssr_core import Branch, Case, Point, PointRecorder
from ..calibrating.diffusion_model import prepared
from ..calibrating.runs import REFINE_STEPS, Run
from ..calibrating.sampling import OnStep, begin, sample
from ..reading.loaded_lora import LoadedLora

LEARNT, JUDGED = 1000, 2000  # added to the calibration's seed: the same prompts from other noise are further points
FEWEST = 32  # points of each case to learn from, however briefly it was measured
STEPS = 8  # where it was measured at so few that most noise levels were never seen
KEPT = 4  # held-out points of each case


class Teacher:
    """What is on the model while a case is sampled: its LoRAs, and who writes down the calls."""

    def __init__(self, speaking: Sequence[LoadedLora], modules: Collection[str], recorder: PointRecorder) -> None:
        """`modules`: the merge's own; what was dropped from it is not to come back through the others."""
        self._branch = Branch.of([lora.lora for lora in speaking], modules)
        self._recorder = recorder

    def at(self, level: float) -> None:
        """Noise levels are of no interest here."""

    def attach(self, model: Any) -> None:
        self._branch.attach(model)
        self._recorder.attach(model.diffusion_model)

    def detach(self) -> None:
        self._branch.detach()
        self._recorder.detach()


@dataclass(frozen=True, eq=False)
class Lesson:
    """What a merge is polished on: the teachers' calls, in cases that are numbered here."""

    cases: tuple[Case, ...]
    points: tuple[Point, ...]
    held_out: tuple[Point, ...]

    @property
    def bytes(self) -> int:
        return sum(point.bytes() for point in (*self.points, *self.held_out))


def record(
    patcher: Any,
    loaded: Sequence[LoadedLora],
    modules: Collection[str],
    runs: Sequence[tuple[Run, Mapping[str, Any]]],
    on_step: OnStep,
    on_run: Callable[[int, int], None],
    before: Any = None,
) -> Lesson:
    """Sample every prompt of every case again, from new noise; and a middle one of each once more, to judge by.

    Args:
        modules: the merge's own; what was dropped from it shall not come back through the others.
        runs: each with its latent.
        before: the model that samples the steps before the first that is looked at.
    """
    cases = tuple(dict.fromkeys(run.case.case for run, _ in runs))
    points: dict[int, list[Point]] = {LEARNT: [], JUDGED: []}
    for number, (run, latent) in enumerate(runs):
        on_run(number, len(runs))
        speaking = [loaded[task] for task in run.case.case.speakers]
        for kind, one in _noised(run):
            found = points[kind]
            recorder = PointRecorder(cases.index(run.case.case))
            teacher = Teacher(speaking, modules, recorder)
            begun = begin(patcher, one, dict(latent), on_step, before) if one.unseen else ()
            sample(prepared(patcher, speaking), one, teacher, dict(latent), on_step, begun)
            every = 1 if kind == LEARNT else -(-len(recorder.points) // KEPT)
            found += recorder.points[::every]
    return Lesson(cases, tuple(points[LEARNT]), tuple(points[JUDGED]))


def steps_of(runs: Sequence[tuple[Run, Mapping[str, Any]]]) -> int:
    """How many sampling steps `record` takes."""
    return sum(one.steps + one.unseen for run, _ in runs for _, one in _noised(run))


def _noised(run: Run) -> Iterator[tuple[int, Run]]:
    """What is sampled of one case, and whether it is learnt from or judged by: once more all of it, or more often."""
    sampling = run.sampling
    if sampling.seen == sampling.steps < REFINE_STEPS:
        sampling = replace(sampling, steps=STEPS)
    for again in range(-(-FEWEST // (len(run.prompts) * sampling.seen))):
        seed = sampling.seed_of(LEARNT + again * len(run.prompts))  # each prompt has the next one
        yield LEARNT, replace(run, sampling=replace(sampling, seed=seed))
    middle = run.prompts[len(run.prompts) // 2 :][:1]
    yield JUDGED, replace(run, sampling=replace(sampling, seed=sampling.seed_of(JUDGED)), prompts=middle)
