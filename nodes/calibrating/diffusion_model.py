"""Calibration of the diffusion model: it samples each case's prompts while a recording listens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import comfy.model_management

from ...ssr_core import (
    Calibration,
    LowRankUpdate,
    Recording,
    Requirement,
    Site,
    StatisticsCollector,
    StatisticsError,
    merge,
)
from ..reading.loaded_lora import LoadedLora
from .memory import check_host, itemsize
from .runs import Kind, Run
from .sampling import OnStep, begin, sample


def calibrate(
    patcher: Any,
    loaded: Sequence[LoadedLora],
    runs: Sequence[Run],
    latent: dict[str, Any],
    context: int,
    on_step: OnStep,
    on_run: Callable[[int], None],
    on_need: Callable[[Requirement], None] = lambda need: None,
    before: Any = None,
    earlier: Calibration | None = None,
) -> tuple[Calibration, tuple[str, ...]]:
    """Carry out `runs`. Returns the statistics, and the modules that a LoRA changes but that never ran.

    Args:
        on_step: called after each sampling step with the predicted clean latent.
        on_run: called with the number of each run before it starts.
        on_need: called first, with the memory that all of it will take.
        before: the model that samples the steps before the first that is looked at.
        earlier: statistics of the same LoRAs in the same order, in whose subspaces it is measured. The merge that
            refinement looks at is made from both.
    """
    combinations = max(0, len({run.index for run in runs}) - len(loaded))
    subspaces = None if earlier is None else earlier.subspaces
    collector = StatisticsCollector([one.lora for one in loaded], subspaces, combinations)
    refined = {run.index for run in runs if run.kind is Kind.REFINE}
    unrefined = len({run.index for run in runs} - refined)
    need = collector.requirement(context, bool(refined), itemsize(patcher), unrefined)
    on_need(need)
    check_host(need)
    begun = {run.index: begin(patcher, run, latent, on_step, before) for run in runs if run.unseen}
    silent: set[str] = set()
    updates: Mapping[Site, LowRankUpdate] = {}
    for number, run in enumerate(runs):
        on_run(number)
        if run.kind is Kind.MEASURE and run.index == 0:  # once for all cases, as below
            collector.see(context)
        if run.kind is Kind.REFINE and run.index == 0:
            known = collector.calibration()
            updates = merge(known if earlier is None else earlier + known, on_site=_interruptible).updates
        with _recording(collector, run, context, updates) as recording:
            begins = begun.get(run.index, ())
            speaking = [loaded[task] for task in run.case.case.speakers]
            sample(prepared(patcher, speaking), run, recording, latent, on_step, begins, need.device)
            if not recording.heard and any(lora.model.updates for lora in speaking):
                raise StatisticsError(
                    f"{run.case.name}: the model ran, but none of the layers this LoRA changes did. "
                    "A node that compiles or converts the model can hide its layers; connect the model before it."
                )
        silent.update(recording.silent)
    return collector.calibration(), tuple(sorted(silent))


def _interruptible(done: int, total: int) -> None:
    comfy.model_management.throw_exception_if_processing_interrupted()


def _recording(
    collector: StatisticsCollector, run: Run, context: int, updates: Mapping[Site, LowRankUpdate]
) -> AbstractContextManager[Recording]:
    if run.kind is Kind.REFINE:
        return collector.refinement(run.case.case.speakers, updates)
    return collector.recording(run.case.case.speakers, context if run.kind is Kind.SURVEY else 0, run.sampling.tokens)


def prepared(patcher: Any, speaking: Sequence[LoadedLora]) -> Any:
    """The user's own patcher where nothing has to change, else a clone that carries the LoRAs' unrouted parts."""
    multigpu = "multigpu" in getattr(patcher, "additional_models", {})
    if not (any(lora.model.patches for lora in speaking) or multigpu):
        return patcher
    patcher = patcher.clone()
    if multigpu:  # hooks sit on one copy of the model, so only that one may run
        patcher.remove_additional_models("multigpu")
    for lora in speaking:
        patcher.add_patches(dict(lora.model.patches), lora.task.strength)
    return patcher
