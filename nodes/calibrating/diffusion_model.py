"""Calibration of the diffusion model: it samples each case's prompts while a recording listens."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import comfy.model_management
import torch
from torch import Tensor

from ...ssr_core import (
    Calibration,
    LowRankUpdate,
    MergeSettings,
    Recording,
    Refinement,
    Requirement,
    Site,
    StatisticsCollector,
    StatisticsError,
    merge,
)
from ...ssr_core.measure.refinement import Uncompared
from ...ssr_core.solve.weights import task_weights
from ..reading.loaded_lora import LoadedLora
from .memory import check_host, free_host, groups_that_fit, precision
from .runs import Kind, Run
from .sampling import OnStep, begin, fitting, sample

OnNeed = Callable[[Requirement, int], None]


class Calibrated(NamedTuple):
    """What became of the runs."""

    calibration: Calibration
    silent: tuple[str, ...]  # modules that a LoRA changes and that never ran
    notes: tuple[str, ...]  # lines for the report: what could not be refined, and why


def calibrate(
    patcher: Any,
    loaded: Sequence[LoadedLora],
    runs: Sequence[Run],
    latent: dict[str, Any],
    context: int,
    on_step: OnStep,
    on_run: Callable[[int], None],
    on_need: OnNeed = lambda need, groups: None,
    before: Any = None,
    earlier: Calibration | None = None,
) -> Calibrated:
    """Carry out `runs`. Whatever goes wrong while refining, what was measured before stands; only a stop ends all.

    Args:
        on_step: called after each sampling step with the predicted clean latent.
        on_run: called with the number of each run before it starts.
        on_need: called first, with the memory that it will take, and again before refining where there is room for only
            a part of the layers at a time, with that of one part and how many there are.
        before: the model that samples the steps before the first that is looked at.
        earlier: statistics of the same LoRAs in the same order, in whose subspaces it is measured. The merge that
            refinement looks at is made from both.
    """
    collector = _collector(loaded, runs, earlier)
    refined = {run.index for run in runs if run.kind is Kind.REFINE}
    unrefined = len({run.index for run in runs} - refined)
    dtype = precision(patcher)
    hosts = {
        folded: collector.requirement(context, bool(refined), unrefined=unrefined, folded=folded).host
        for folded in (False, True)
    }
    folded = bool(refined) and hosts[False] > free_host()  # SSR Split makes use of cases that are kept apart
    need = replace(collector.requirement(context, dtype=dtype), host=hosts[folded])
    on_need(need, 1)
    check_host(need)
    begun = {run.index: begin(patcher, run, latent, on_step, before) for run in runs if run.unseen}
    session = _Session(patcher, loaded, latent, on_step, begun, need.device, collector)
    measuring = [run for run in runs if run.kind is not Kind.REFINE]
    for number, run in enumerate(measuring):
        on_run(number)
        if run.kind is Kind.MEASURE and run.index == 0:  # once for all cases
            collector.see(context)
        survey = context if run.kind is Kind.SURVEY else 0
        session.carry_out(run, collector.recording(run.case.case.speakers, survey, run.sampling.tokens))
    found, failure = collector.calibration(), list[str]()
    groups = _groups(session, dtype, on_need) if refined else []
    try:
        updates: Mapping[Site, LowRankUpdate] = {}
        weights: Mapping[Site, Sequence[float]] | None = None
        for number, run in enumerate(runs[len(measuring) :], len(measuring)):
            on_run(number)
            if run.index == 0:  # a round begins: whatever happens in it, the one before stands
                found = collector.calibration()
                weights = task_weights(found, MergeSettings()) if folded else None
                updates = merge(found if earlier is None else earlier + found, on_site=_interruptible).updates
            for part, modules in enumerate(groups):
                session.on_step = on_step if not part else _unseen  # the bar counts each point once
                session.carry_out(run, collector.refinement(run.case.case.speakers, updates, modules, weights))
        found = collector.calibration()
    except comfy.model_management.InterruptProcessingException:
        raise
    except Exception as error:  # of the model, of another pack, of the device: what was measured took minutes
        failure.append(_failed(error))
    return Calibrated(found, tuple(sorted(session.silent)), (*_notes(collector.uncompared, session.outside), *failure))


@dataclass(eq=False)
class _Session:
    """What all runs have in common, and what became known of the layers."""

    patcher: Any
    loaded: Sequence[LoadedLora]
    latent: dict[str, Any]
    on_step: OnStep
    begun: Mapping[int, Sequence[Tensor]]
    need: int
    collector: StatisticsCollector
    ran: set[str] = field(default_factory=set)
    idle: set[str] = field(default_factory=set)  # in some run
    outside: set[str] = field(default_factory=set)  # before the first step

    @property
    def silent(self) -> set[str]:
        return self.idle - self.ran

    def carry_out(self, run: Run, listening: AbstractContextManager[Recording]) -> None:
        speaking = [self.loaded[task] for task in run.case.case.speakers]
        with listening as recording:
            patcher, begins = prepared(self.patcher, speaking), self.begun.get(run.index, ())
            sample(patcher, run, recording, self.latent, self.on_step, begins, self.need)
            if not recording.heard and any(lora.model.updates for lora in speaking):
                raise StatisticsError(f"{run.case.name}: {_unheard(run)}")
        self.ran |= recording.ran
        self.idle |= recording.idle
        if isinstance(recording, Refinement):
            self.outside |= recording.outside


def _unheard(run: Run) -> str:
    """Why no layer ran that should have."""
    spans = [(options.get("start_percent", 0.0), options.get("end_percent", 1.0)) for _, options in run.prompts]
    if all(start > 0 or end < 1 for start, end in spans):
        start, end = min(start for start, _ in spans), max(end for _, end in spans)
        return (
            f"its prompts are active only from {100 * start:.0f} % to {100 * end:.0f} % of the sampling, where none of "
            f"the {run.sampling.seen} steps is that are looked at. Give prompts that are active throughout, or raise "
            "steps."
        )
    return (
        "the model ran, but none of the layers this LoRA changes did. A node that compiles or converts the model can "
        "hide its layers; connect the model before it."
    )


def _collector(loaded: Sequence[LoadedLora], runs: Sequence[Run], earlier: Calibration | None) -> StatisticsCollector:
    combinations = max(0, len({run.index for run in runs}) - len(loaded))
    subspaces = None if earlier is None else earlier.subspaces
    return StatisticsCollector([one.lora for one in loaded], subspaces, combinations)


def _groups(session: _Session, dtype: torch.dtype, on_need: OnNeed) -> list[frozenset[str]]:
    """The layers in as few groups as fit on the device; what each takes is then the need of the session."""
    collector, patcher = session.collector, session.patcher

    def need(groups: int) -> Requirement:
        return collector.requirement(refine=True, dtype=dtype, groups=groups)

    count = groups_that_fit(patcher, fitting(patcher, session.latent), lambda groups: need(groups).device)
    session.need = need(count).device
    if count > 1:
        on_need(need(count), count)
    return collector.groups(count)


def _unseen(x0: Tensor) -> None:
    """What a step shows that was shown before."""


def _failed(error: Exception) -> str:
    logging.warning("SSR Collect Stats: refining failed, measuring stands", exc_info=error)
    return (
        f"Refining failed ({type(error).__name__}: {str(error)[:300]}), so the merge is made of what was measured "
        "before it. Set refine of SSR Collect Stats to 0, or remove the cause and collect again."
    )


def _notes(uncompared: Mapping[str, Uncompared], outside: Iterable[str]) -> Iterator[str]:
    """Which layers were measured and not refined, and why."""
    if found := sorted(set(outside) - uncompared.keys()):
        yield f"{_layers(found)} ran before the first step, where texts are prepared: measured, not refined."
    for why in Uncompared:
        if found := sorted(module for module, reason in uncompared.items() if reason is why):
            yield f"{_layers(found)} {why.value}: measured, not refined.{_REMEDIES[why]}"


_REMEDIES = {
    Uncompared.TOKENS: "",
    Uncompared.CALLS: " If there is a node that skips steps (EasyCache, TeaCache), connect the model before it.",
}


def _layers(names: Sequence[str]) -> str:
    return f"{len(names)} layer{'s' * (len(names) > 1)}, such as {names[0]},"


def _interruptible(done: int, total: int) -> None:
    comfy.model_management.throw_exception_if_processing_interrupted()


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
