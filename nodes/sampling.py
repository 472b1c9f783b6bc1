"""Sampling with a recording: ComfyUI's own sampling, with hooks on the model exactly while it runs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import comfy.sample
import comfy.samplers
import torch

from ..ssr_core import Recording, Refinement
from .runs import Run, Sampling

OnStep = Callable[[torch.Tensor], None]


def sample(
    patcher: Any, run: Run, recording: Recording, latent: dict[str, Any], on_step: OnStep, before: Any = None
) -> None:
    """Sample each prompt of `run` once, with its LoRA active and the recording on.

    Args:
        latent: LATENT, empty; not used where the task has images of its own.
        before: the model that samples the steps before the first that is looked at; None = `patcher`, unhooked.
    """
    sampling, given = run.sampling, run.task.latent
    latent = latent if given is None else dict(given)
    samples = _fitting(patcher, latent)
    sampler = comfy.samplers.sampler_object(sampling.sampler)
    sigmas = comfy.samplers.KSampler(
        patcher, sampling.steps, patcher.load_device, sampling.sampler, sampling.scheduler
    ).sigmas
    unseen, seen = sigmas[: sampling.start + 1], sigmas[sampling.start : sampling.end + 1]
    for index, prompt in enumerate(run.prompts):
        seed = (sampling.seed + index) % 2**64
        noise = comfy.sample.prepare_noise(samples, seed, latent.get("batch_index"))
        options = {
            "denoise_mask": latent.get("noise_mask"),
            "callback": lambda step, x0, x, total: on_step(x0),
            "disable_pbar": True,
            "seed": seed,
        }
        begun = samples
        if sampling.start and given is None:
            first = _conditioned(comfy.samplers.CFGGuider(before or patcher), prompt, sampling)
            begun = first.sample(noise, samples, sampler, unseen, **options)
            noise = torch.zeros_like(noise)  # what is left of it is in the latent
        guider = _conditioned(RecordingGuider(patcher, recording), prompt, sampling)
        guider.sample(noise, begun, sampler if given is None else Revisit(), seen, **options)


def _conditioned(guider: Any, prompt: Any, sampling: Sampling) -> Any:
    negative = {"negative": [*sampling.negative]} if sampling.negative else {}
    guider.inner_set_conds({"positive": [prompt]} | negative)
    guider.set_cfg(sampling.cfg if sampling.negative else 1.0)
    return guider


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
