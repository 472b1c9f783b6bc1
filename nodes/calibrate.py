"""One calibration run: a model samples the prompts of one task while a recording listens. No weight is touched."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import comfy.sample
import comfy.samplers
import comfy.utils
import torch

from ..ssr_core import Recording
from .sockets import Carried, Task


@dataclass(frozen=True)
class Sampling:
    """How calibration images are sampled."""

    seed: int
    steps: int
    sampler: str
    scheduler: str


class RecordingGuider(comfy.samplers.CFGGuider):
    """Positive prompt only, at cfg 1, with the recording's hooks on the model exactly while it samples.

    They go on the model that ComfyUI really loaded, after it was loaded. Nothing about the patcher differs from plain
    sampling, so no weight is moved or patched on account of a calibration, and nothing needs to be undone after it.
    """

    def __init__(self, patcher: Any, recording: Recording) -> None:
        super().__init__(patcher)
        self.recording = recording

    def inner_sample(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.recording.attach(self.inner_model)
        try:
            with _uncompiled():
                return super().inner_sample(*args, **kwargs)
        finally:
            self.recording.detach()


def run_task(
    patcher: Any,
    task: Task,
    carried: Carried,
    recording: Recording,
    latent: dict[str, Any],
    sampling: Sampling,
    on_step: Callable[[torch.Tensor], None],
) -> None:
    """Sample every calibration prompt of `task` once, LoRA active, recording on.

    Args:
        on_step: called after each step with the predicted clean latent.
    """
    patcher = _prepared(patcher, task, carried)
    samples = _fitting(patcher, latent)
    sigmas = comfy.samplers.KSampler(
        patcher, sampling.steps, patcher.load_device, sampling.sampler, sampling.scheduler
    ).sigmas
    for index, prompt in enumerate(task.conditioning):
        seed = sampling.seed + index
        guider = RecordingGuider(patcher, recording)
        guider.inner_set_conds({"positive": [prompt]})
        guider.sample(
            comfy.sample.prepare_noise(samples, seed, latent.get("batch_index")),
            samples,
            comfy.samplers.sampler_object(sampling.sampler),
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
    import sys

    if "torch._dynamo" not in sys.modules:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
