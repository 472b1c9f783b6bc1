# SPDX-License-Identifier: Apache-2.0
"""Velocity Error (demo): how far one model is from another, along the other's own way from noise to picture."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import comfy.sample
import comfy.samplers
import comfy.utils
import torch
from comfy_api.latest import ComfyExtension, io, ui


class VelocityError(io.ComfyNode):
    """Mean over steps of |v_model - v_reference|^2 at the latents that the reference passes through.

    v = (x - denoised) / sigma, what a flow-matching model predicts. With the base model, a LoRA's merge and the LoRA
    alone this gives the error relative to the LoRA's whole effect.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SSRDemoVelocityError",
            display_name="Velocity Error (demo)",
            category="SSR Merge/demo",
            is_output_node=True,
            inputs=[
                io.Model.Input("reference", tooltip="The model that is right, such as the one with a LoRA alone."),
                io.Model.Input("model", tooltip="The model that is measured."),
                io.Conditioning.Input("prompt"),
                io.Latent.Input("latent"),
                io.Int.Input("seed", default=0, min=0, max=2**63 - 1),
                io.Int.Input("steps", default=12, min=1, max=1000),
            ],
            outputs=[io.Float.Output(display_name="error")],
        )

    @classmethod
    def execute(cls, reference: Any, model: Any, prompt: list, latent: dict, seed: int, steps: int) -> io.NodeOutput:
        samples = comfy.sample.fix_empty_latent_channels(reference, latent["samples"])
        noise = comfy.sample.prepare_noise(samples, seed)
        sigmas = comfy.samplers.calculate_sigmas(reference.get_model_object("model_sampling"), "simple", steps)
        way: list[tuple[torch.Tensor, torch.Tensor]] = []
        _run(reference, prompt, noise, samples, sigmas, lambda call, x, s: _euler(call, x, s, way))
        found: list[torch.Tensor] = []
        _run(model, prompt, noise, samples, sigmas, lambda call, x, s: _replay(call, x, way, s, found))
        error = sum(
            float(((other - denoised) / sigma).square().mean())
            for (_, denoised), other, sigma in zip(way, found, sigmas, strict=False)
        ) / len(way)
        return io.NodeOutput(error, ui=ui.PreviewText(repr(error)))


def _run(model: Any, prompt: list, noise: torch.Tensor, samples: torch.Tensor, sigmas: torch.Tensor, walk: Any) -> None:
    """Have ComfyUI load `model` and call walk(denoise, x, sigmas) in place of a sampler."""

    def sampler(denoiser, x, sigmas, extra_args=None, callback=None, disable=None):
        return walk(lambda latent, sigma: denoiser(latent, sigma.expand(len(latent)), **(extra_args or {})), x, sigmas)

    guider = comfy.samplers.CFGGuider(model)
    guider.inner_set_conds({"positive": prompt})
    guider.sample(noise, samples, comfy.samplers.KSAMPLER(sampler), sigmas, disable_pbar=True, seed=0)


def _euler(call: Any, x: torch.Tensor, sigmas: torch.Tensor, way: list) -> torch.Tensor:
    for sigma, following in pairwise(sigmas):
        denoised = call(x, sigma)
        way.append((x, denoised))
        x = x + (x - denoised) / sigma * (following - sigma)
    return x


def _replay(call: Any, x: torch.Tensor, way: list, sigmas: torch.Tensor, found: list) -> torch.Tensor:
    found.extend(call(latent, sigma) for (latent, _), sigma in zip(way, sigmas, strict=False))
    return x


class VelocityErrorExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [VelocityError]


async def comfy_entrypoint() -> VelocityErrorExtension:
    return VelocityErrorExtension()
