"""Polishing: a merge learns from the LoRAs that it is made of, on the prompts that they were measured on."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import comfy.model_management
import comfy.utils
from torch import Tensor

from ...ssr_core import (
    DistillationRequirement,
    DistillationSettings,
    Distilled,
    Evaluation,
    LoraError,
    SSRError,
    StatisticsError,
    distil,
)
from ...ssr_core.files.lora_file import to_state_dict
from ..calibrating.memory import size
from ..calibrating.progress import show_steps
from ..calibrating.runs import Run
from ..calibrating.stats import FEW, Stats
from ..reading.loaded_lora import LoadedLora
from ..reading.patches import read_task
from ..reading.task import Task
from ..writing.lora_model import LoraModel, check_base
from .memory import look_for, needed, room_for_points
from .points import Lesson, record, steps_of
from .training import in_training

NAME = "SSR Polish"


@dataclass(frozen=True, eq=False)
class Polished:
    """What SSR Polish gives."""

    lora: LoraModel
    report: str
    history: tuple[Evaluation, ...]
    labels: tuple[str, ...]  # (C,) of the cases


def polish(
    model: Any,
    stats: Stats,
    lora: Mapping[str, Tensor],
    settings: DistillationSettings,
    tell: Callable[[str], None],
    before: Any = None,
) -> Polished:
    """Distil the LoRAs of `stats` into their merge.

    Args:
        lora: a LORA_MODEL of SSR Solve.
        tell: is told what happens, in words.
        before: the model that samples the steps before the first that was measured.

    Raises:
        StatisticsError: statistics from a file, or of another model.
        LoraError: a merge of other LoRAs, or a model that has it on already.
        SSRError: too little memory, or a model that passes no gradient.
    """
    started = time.perf_counter()
    check_base(lora, model, NAME)
    loras = _at_strengths_of(lora, stats)
    runs = _runs(model, stats, before)
    merged = read_task(Task("the merge", lora, 1.0, []), model).model
    if not merged.updates:
        raise LoraError(f"{NAME}: the merge changes no layer of this model that can be polished.")
    sampled = steps_of(runs, settings.points)
    bar = comfy.utils.ProgressBar(sampled + settings.points)
    lesson = record(
        *(model, loras, {site.module for site in merged.updates}, runs, show_steps(model, sampled, bar)),
        lambda number, total: tell(f"{number + 1} of {total}: sampling, {runs[number][0].case.name}"),
        settings.points,
        before,
        room_for_points(),
    )
    patcher = model.clone()
    patcher.add_patches(dict(merged.patches), 1.0)
    need = needed(patcher, merged.updates, lesson, settings.only_up)
    look_for(need, patcher.load_device, tell)
    watch = _Watch(tell, settings, bar, sampled)
    with watch.interruptible(), in_training(patcher, need.device) as network:
        distilled = distil(
            *(network, network.diffusion_model, merged.updates, lesson.points, lesson.held_out, patcher.load_device),
            *(lesson.cases, settings, watch.on_point, watch.on_evaluation),
        )
    seconds = time.perf_counter() - started
    labels = tuple(case.label([one.task.name for one in loras]) for case in lesson.cases)
    warnings = _warnings(stats)
    report = "\n".join([_report(distilled, lesson, need, labels, settings, seconds), *warnings])
    tell("\n".join([report.splitlines()[0], *warnings]))
    return Polished(_replaced(lora, merged.updates, distilled, settings), report, distilled.history, labels)


class _Watch:
    """Progress, and what is said where somebody stops it."""

    def __init__(self, tell: Callable[[str], None], settings: DistillationSettings, bar: Any, sampled: int) -> None:
        """`sampled`: of ComfyUI's progress bar, the steps that are done by then."""
        self._tell, self._settings = tell, settings
        self._bar, self._sampled = bar, sampled
        self._step = 0
        self._history: list[Evaluation] = []

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Says what to do about it where somebody stops what is inside."""
        try:
            yield
        except comfy.model_management.InterruptProcessingException:
            said = f"Stopped at step {self._step}; nothing is kept. With steps at {max(self._step, 1)} it ends there."
            raise comfy.model_management.InterruptProcessingException(said) from None

    def on_point(self, done: int, total: int) -> None:
        self._step = done // self._settings.batch
        self._bar.update_absolute(self._sampled + done)
        comfy.model_management.throw_exception_if_processing_interrupted()

    def on_evaluation(self, evaluation: Evaluation) -> None:
        self._history.append(evaluation)
        self._tell(
            f"Step {evaluation.step} of {self._settings.steps}: error {evaluation.error:.3f}, "
            f"it was {self._history[0].error:.3f}"
        )


def _runs(model: Any, stats: Stats, before: Any) -> list[tuple[Run, Mapping[str, Any]]]:
    if not stats.sampled:
        raise StatisticsError(
            f"{NAME}: these statistics are from a file, which does not hold the prompts as the model saw them. Connect "
            "SSR Collect Stats instead of SSR Load Stats; it may measure briefly, as the merge is there already."
        )
    kind = type(model.model).__name__
    if kind != stats.model:
        raise StatisticsError(f"{NAME}: the statistics were collected on {stats.model}, but this model is {kind}.")
    if before is not None and not any(run.sampling.start for one in stats.sampled for run in one.runs):
        raise SSRError(f"{NAME}: model_before is connected, but the statistics begin at step 0; disconnect it.")
    return [(run, one.latent) for one in stats.sampled for run in one.runs]


def _warnings(stats: Stats) -> list[str]:
    if few := stats.with_few_prompts:
        return [
            f"Few prompts: {', '.join(few)}. What was learnt is these prompts, and on others it may be worse than "
            f"before, a style above all. Give {FEW} to 8 that differ, or compare with SSR Compare on others."
        ]
    return []


def _at_strengths_of(lora: Mapping[str, Tensor], stats: Stats) -> list[LoadedLora]:
    """The LoRAs of the statistics, as strong as in the merge.

    Raises:
        LoraError: the merge is not one of these.
    """
    metadata = getattr(lora, "metadata", {})
    if "ssr.sources" not in metadata:
        raise LoraError(f"{NAME} takes a merge from SSR Solve, which knows of what it is made; this LoRA is another.")
    sources, known = (json.loads(one["ssr.sources"]) for one in (metadata, stats.provenance))
    names, expected = ([(one.get("file"), one.get("sha256")) for one in each] for each in (sources, known))
    if names != expected:
        raise LoraError(
            f"{NAME}: the merge is of {_listed(names)}, and the statistics are of {_listed(expected)}; connect those "
            "that it was solved from."
        )
    return [
        replace(one, task=replace(one.task, strength=source["strength"]))
        for one, source in zip(stats.loras, sources, strict=True)
    ]


def _listed(names: Sequence[tuple[Any, Any]]) -> str:
    return ", ".join(str(name) for name, _ in names)


def _replaced(
    lora: Mapping[str, Tensor], updates: Mapping[Any, Any], distilled: Distilled, settings: DistillationSettings
) -> LoraModel:
    """The LORA_MODEL with other factors; all else that it changes stays."""
    routed = to_state_dict(updates, "")
    rest = {key: value for key, value in lora.items() if key not in routed}
    known = {**asdict(settings), "error": [distilled.start.error, distilled.best.error], "kept": distilled.best.step}
    metadata = {**getattr(lora, "metadata", {}), "ssr.polish": json.dumps(known)}
    return LoraModel({**to_state_dict(distilled.updates, ""), **rest}, metadata)


def _report(
    distilled: Distilled,
    lesson: Lesson,
    need: DistillationRequirement,
    labels: Sequence[str],
    settings: DistillationSettings,
    seconds: float,
) -> str:
    start, best = distilled.start, distilled.best
    kept = f"kept that of step {best.step} of {settings.steps}"
    lines = [
        f"Error on held-out points: {start.error:.3f} -> {best.error:.3f}, {kept}, {seconds:.0f} s.",
        "0 = the LoRAs asked for, 1 = the model without any. Held out is the noise, not the prompt.",
        f"{len(lesson.points)} points to learn from, {len(lesson.held_out)} to judge by.",
        f"Memory: {size(need.device)} beside the model, and {size(need.host)} for points and results.",
    ]
    if lesson.every > 1:
        lines.append(f"Of each prompt one step in {lesson.every} was kept: all of them take too much memory.")
    if distilled.returns and not distilled.stopped:
        lines.append(
            f"The error rose, so it went on from the best step at a lower learning rate ({distilled.returns} x)."
        )
    if distilled.stopped:
        lines.append(f"Stopped early: {distilled.stopped}. A lower learning rate may go further.")
    width = max(map(len, labels))
    lines.append(f"{'':{width}}  {'merge':>8}  {'polished':>8}")
    for label, before, after in zip(labels, start.cases, best.cases, strict=True):
        lines.append(f"{label:{width}}  {before:8.3f}  {after:8.3f}")
    return "\n".join(lines)
