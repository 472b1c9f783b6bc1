"""Points: the model's calls while it samples the prompts of a calibration again, with each case's LoRAs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...ssr_core import Branch, Case, Point, PointRecorder
from ..calibrating.diffusion_model import prepared
from ..calibrating.runs import Run
from ..calibrating.sampling import OnStep, begin, sample
from ..reading.loaded_lora import LoadedLora

LEARNT, JUDGED = 1000, 2000  # added to the calibration's seed: the same prompts from other noise are further points
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
        for kind, found in points.items():
            one = run if kind == LEARNT else replace(run, prompts=run.prompts[len(run.prompts) // 2 :][:1])
            one = replace(one, sampling=replace(one.sampling, seed=one.sampling.seed_of(kind)))
            recorder = PointRecorder(cases.index(run.case.case))
            teacher = Teacher(speaking, modules, recorder)
            begun = begin(patcher, one, dict(latent), on_step, before) if one.unseen else ()
            sample(prepared(patcher, speaking), one, teacher, dict(latent), on_step, begun)
            every = 1 if kind == LEARNT else -(-len(recorder.points) // KEPT)
            found += recorder.points[::every]
    return Lesson(cases, tuple(points[LEARNT]), tuple(points[JUDGED]))


def steps_of(runs: Sequence[tuple[Run, Mapping[str, Any]]]) -> int:
    """How many sampling steps `record` takes."""
    return sum((run.steps + run.unseen) * (len(run.prompts) + 1) // len(run.prompts) for run, _ in runs)
