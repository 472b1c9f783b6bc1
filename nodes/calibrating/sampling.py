"""Sampling with a recording: ComfyUI's own sampling, with hooks on the model exactly while it runs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import comfy.sample
import comfy.samplers
import torch

from ...ssr_core import Refinement
from .caches import Caches
from .memory import make_room
from .runs import Run, Sampling

OnStep = Callable[[torch.Tensor], None]


class Listener(Protocol):
    """What is put on the model exactly while it samples."""

    def attach(self, model: torch.nn.Module) -> None: ...

    def detach(self) -> None: ...

    def at(self, level: float) -> None:
        """Told the noise level of each call before it comes."""


def begin(patcher: Any, run: Run, latent: dict[str, Any], on_step: OnStep, before: Any = None) -> list[torch.Tensor]:
    """The latents of each prompt of `run` after the steps that are not looked at. Nothing listens.

    Args:
        latent: LATENT, empty.
        before: the model that samples these steps; None = `patcher`.
    """
    model = before or patcher
    samples, sigmas = fitting(patcher, latent), _sigmas(model, run.sampling)[: run.sampling.start + 1]
    sampler = comfy.samplers.sampler_object(run.sampling.sampler)
    begun = []
    for index, prompt in enumerate(run.prompts):
        guider = _conditioned(comfy.samplers.CFGGuider(model), prompt, run)
        noise = comfy.sample.prepare_noise(samples, run.sampling.seed_of(index), latent.get("batch_index"))
        options = _options(run, index, latent, on_step)
        with Caches(model.model).of("begun"):
            begun.append(guider.sample(noise, samples, sampler, sigmas, **options).cpu())
    return begun


def sample(
    patcher: Any,
    run: Run,
    recording: Listener,
    latent: dict[str, Any],
    on_step: OnStep,
    begun: Sequence[torch.Tensor] = (),
    need: int = 0,
) -> None:
    """Sample each prompt of `run` once, with its LoRAs active and the recording on.

    Args:
        latent: LATENT, empty; not used where the case has images of its own.
        begun: what `begin` gave, if sampling starts later than at the first step.
        need: bytes that the recording will take where the model computes.
    """
    given = run.case.latent
    latent = latent if given is None else dict(given)
    samples = fitting(patcher, latent)
    sampler = comfy.samplers.sampler_object(run.sampling.sampler) if given is None else Revisit()
    sigmas = _sigmas(patcher, run.sampling)
    end = len(sigmas) if run.sampling.stop >= run.sampling.steps else run.sampling.stop + 1
    for index, prompt in enumerate(run.prompts):
        noise = comfy.sample.prepare_noise(samples, run.sampling.seed_of(index), latent.get("batch_index"))
        start = samples
        if begun:
            start, noise = begun[index], noise * 0.0  # nested latents, too; what is left of the noise is in the latent
        room = make_room(need, patcher.load_device) if index == 0 else None
        guider = _conditioned(RecordingGuider(patcher, recording, room), prompt, run)
        room = None
        options = _options(run, index, latent, on_step)
        guider.sample(noise, start, sampler, sigmas[run.sampling.start : end], **options)


def _sigmas(patcher: Any, sampling: Sampling) -> torch.Tensor:
    """Of the whole schedule; some have another step than was asked for."""
    sampler = comfy.samplers.KSampler(
        patcher, sampling.steps, patcher.load_device, sampling.sampler, sampling.scheduler
    )
    sigmas: torch.Tensor = sampler.sigmas
    return sigmas


def _options(run: Run, index: int, latent: dict[str, Any], on_step: OnStep) -> dict[str, Any]:
    return {
        "denoise_mask": latent.get("noise_mask"),
        "callback": lambda step, x0, x, total: on_step(x0),
        "disable_pbar": True,
        "seed": run.sampling.seed_of(index),
    }


def _conditioned(guider: Any, prompt: Any, run: Run) -> Any:
    negative = run.sampling.negative if run.case.negative is None else run.case.negative
    guider.inner_set_conds({"positive": [prompt]} | ({"negative": [*negative]} if negative else {}))
    guider.set_cfg(run.sampling.cfg if negative else 1.0)
    return guider


class RecordingGuider(comfy.samplers.CFGGuider):
    """A guider with the recording's hooks on the model exactly while it samples.

    They go on the model that ComfyUI really loaded, after it was loaded. Nothing about the patcher differs from plain
    sampling, so no weight is moved or patched on account of a calibration, and nothing needs to be undone after it.
    """

    def __init__(self, patcher: Any, recording: Listener, room: torch.Tensor | None = None) -> None:
        """`room`: what the recording needs on the device, kept free while the model is loaded."""
        super().__init__(patcher)
        self.recording = recording
        self.room = room

    def predict_noise(self, x: torch.Tensor, timestep: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.recording.at(float(f"{timestep.flatten()[0]:.4g}"))
        if not isinstance(self.recording, Refinement):
            return super().predict_noise(x, timestep, *args, **kwargs)
        # the LoRA alone leads the way; the merge is looked at in the same places
        with self.recording.alone():
            denoised = super().predict_noise(x, timestep, *args, **kwargs)
        with self.recording.merged(), self.caches.of("merged"):
            super().predict_noise(x, timestep, *args, **kwargs)
        return denoised

    def inner_sample(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.room = None
        self.caches = Caches(self.inner_model)
        self.recording.attach(self.inner_model)
        try:
            with uncompiled(), self.caches.of("alone"):
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


def fitting(patcher: Any, latent: dict[str, Any]) -> torch.Tensor:
    """The latent with the channels and size that this model wants."""
    ratios = {k: latent[k] for k in ("downscale_ratio_spacial", "downscale_ratio_temporal") if k in latent}
    return comfy.sample.fix_empty_latent_channels(patcher, latent["samples"], **ratios)


@contextmanager
def uncompiled() -> Iterator[None]:
    """Run torch.compile'd modules eagerly: hooks that are added after compiling never fire."""
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
