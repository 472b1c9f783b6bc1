"""Calibration: the model samples each task's prompts while a recording listens. No weight is touched."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.samplers
import torch

from ..ssr_core import (
    Calibration,
    LowRankUpdate,
    Recording,
    Refinement,
    Site,
    StatisticsCollector,
    StatisticsError,
    merge,
)
from .patches import LoadedLora
from .sockets import Carried, Task


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


class RecordingGuider(comfy.samplers.CFGGuider):
    """A guider with the recording's hooks on the model exactly while it samples.

    They go on the model that ComfyUI really loaded, after it was loaded. Nothing about the patcher differs from plain
    sampling, so no weight is moved or patched on account of a calibration, and nothing needs to be undone after it.
    """

    def __init__(self, patcher: Any, recording: Recording) -> None:
        super().__init__(patcher)
        self.recording = recording

    def predict_noise(self, x: torch.Tensor, timestep: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.recording.at(float(f"{timestep.flatten()[0]:.4g}"))
        if not isinstance(self.recording, Refinement):
            return super().predict_noise(x, timestep, *args, **kwargs)
        # the LoRA alone leads the way; the merge is looked at in the same places
        with self.recording.alone():
            denoised = super().predict_noise(x, timestep, *args, **kwargs)
        with self.recording.merged():
            super().predict_noise(x, timestep, *args, **kwargs)
        return denoised

    def inner_sample(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.recording.attach(self.inner_model)
        try:
            with _uncompiled():
                return super().inner_sample(*args, **kwargs)
        finally:
            self.recording.detach()


class Revisit(comfy.samplers.Sampler):
    """Shows the model given images with the noise of each step added, instead of making images."""

    def sample(
        self,
        model_wrap: Any,
        sigmas: torch.Tensor,
        extra_args: dict[str, Any],
        callback: Callable[..., None] | None,
        noise: torch.Tensor,
        latent_image: torch.Tensor,
        denoise_mask: torch.Tensor | None = None,
        disable_pbar: bool = False,
    ) -> torch.Tensor:
        steps = len(sigmas) - 1
        for step, sigma in enumerate(sigmas[:-1]):
            x = model_wrap.inner_model.model_sampling.noise_scaling(sigma, noise, latent_image)
            denoised = model_wrap(x, sigma.expand(len(x)), **extra_args)
            if callback is not None:
                callback(step, denoised, x, steps)
        return latent_image


class Kind(Enum):
    """What a run is for, in the order in which they come."""

    SURVEY = "looking"  # for directions in which the layers' inputs vary
    MEASURE = "measuring"
    REFINE = "refining"  # comparing a first merge with the LoRA alone


@dataclass(frozen=True)
class Run:
    """One recording: some prompts of one task."""

    index: int  # of the task
    task: Task
    prompts: list[Any]
    sampling: Sampling
    kind: Kind

    @property
    def steps(self) -> int:
        return len(self.prompts) * self.sampling.steps


SURVEY_STEPS = 4
REFINE = 1
TOKENS = 4096  # of each layer and step: all of an image of 1024 x 1024 pixels
REFINE_STEPS = 3  # with fewer, a correction fits the few noise levels seen and is off at the others


def plan(tasks: Sequence[Task], sampling: Sampling, context: int, refine: int) -> list[Run]:
    """All prompts of every task, once more for each refinement; before, for context rows, a look at each first one."""
    short = replace(sampling, steps=min(sampling.steps, SURVEY_STEPS))
    looks = [Run(i, task, task.conditioning[:1], short, Kind.SURVEY) for i, task in enumerate(tasks) if context]
    measuring = [Run(i, task, task.conditioning, sampling, Kind.MEASURE) for i, task in enumerate(tasks)]
    refine = refine if sampling.steps >= REFINE_STEPS else 0
    return looks + measuring + refine * [replace(run, kind=Kind.REFINE) for run in measuring]


def calibrate(
    patcher: Any,
    loaded: Sequence[LoadedLora],
    runs: Sequence[Run],
    latent: dict[str, Any],
    context: int,
    on_step: Callable[[torch.Tensor], None],
    on_run: Callable[[int], None],
) -> tuple[Calibration, tuple[str, ...]]:
    """Carry out `runs`. Returns the statistics, and the modules that a LoRA changes but that never ran.

    Args:
        on_step: called after each sampling step with the predicted clean latent.
        on_run: called with the number of each run before it starts.
    """
    collector = StatisticsCollector([one.lora for one in loaded])
    silent: set[str] = set()
    updates: Mapping[Site, LowRankUpdate] = {}
    for number, run in enumerate(runs):
        on_run(number)
        if run.kind is Kind.MEASURE and run.index == 0:  # once for all tasks, as below
            collector.see(context)
        if run.kind is Kind.REFINE and run.index == 0:
            updates = merge(collector.calibration(), on_site=_interruptible).updates
        with _recording(collector, run, context, updates) as recording:
            _sample(_prepared(patcher, run.task, loaded[run.index].carried), run, recording, latent, on_step)
            if not recording.heard:
                raise StatisticsError(
                    f"{run.task.name}: the model ran, but none of the layers this LoRA changes did. "
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
        return collector.refinement(run.index, updates)
    return collector.recording(run.index, context if run.kind is Kind.SURVEY else 0, run.sampling.tokens)


def _sample(
    patcher: Any, run: Run, recording: Recording, latent: dict[str, Any], on_step: Callable[[torch.Tensor], None]
) -> None:
    """Sample each prompt of `run` once, LoRA active, recording on."""
    sampling, given = run.sampling, run.task.latent
    latent = latent if given is None else dict(given)
    samples = _fitting(patcher, latent)
    sampler = comfy.samplers.sampler_object(sampling.sampler) if given is None else Revisit()
    sigmas = comfy.samplers.KSampler(
        patcher, sampling.steps, patcher.load_device, sampling.sampler, sampling.scheduler
    ).sigmas
    for index, prompt in enumerate(run.prompts):
        seed = (sampling.seed + index) % 2**64
        guider = RecordingGuider(patcher, recording)
        guider.inner_set_conds(
            {"positive": [prompt]} | ({"negative": [*sampling.negative]} if sampling.negative else {})
        )
        guider.set_cfg(sampling.cfg if sampling.negative else 1.0)
        guider.sample(
            comfy.sample.prepare_noise(samples, seed, latent.get("batch_index")),
            samples,
            sampler,
            sigmas,
            denoise_mask=latent.get("noise_mask"),
            callback=lambda step, x0, x, total: on_step(x0),
            disable_pbar=True,
            seed=seed,
        )


def _prepared(patcher: Any, task: Task, carried: Carried) -> Any:
    """The user's own patcher where nothing has to change, else a clone that carries the task's unrouted parts."""
    multigpu = "multigpu" in getattr(patcher, "additional_models", {})
    if not (carried.patches or multigpu):
        return patcher
    patcher = patcher.clone()
    if multigpu:  # hooks sit on one copy of the model, so only that one may run
        patcher.remove_additional_models("multigpu")
    patcher.add_patches(dict(carried.patches), task.strength)
    return patcher


def _fitting(patcher: Any, latent: dict[str, Any]) -> torch.Tensor:
    """The latent with the channels and size that this model wants."""
    ratios = {k: latent[k] for k in ("downscale_ratio_spacial", "downscale_ratio_temporal") if k in latent}
    return comfy.sample.fix_empty_latent_channels(patcher, latent["samples"], **ratios)


@contextmanager
def _uncompiled() -> Iterator[None]:
    """Run torch.compile'd modules eagerly: hooks that are added after compiling never fire."""
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
