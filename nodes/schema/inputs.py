"""Inputs that several nodes have."""

from __future__ import annotations

import re
from typing import Any

import comfy.samplers
from comfy_api.latest import io

from ...ssr_core import SSRError
from .sockets import ADVANCED, FIXED


def seed(tooltip: str, default: int = 0, **more: Any) -> io.Int.Input:
    return io.Int.Input(
        "seed", default=default, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=FIXED, tooltip=tooltip, **more
    )


def steps(tooltip: str, default: int, **more: Any) -> io.Int.Input:
    """0 = no calibration."""
    return io.Int.Input("steps", default=default, min=0, max=10000, tooltip=tooltip, **more)


def cfg(tooltip: str, **more: Any) -> io.Float.Input:
    return io.Float.Input("cfg", default=1.0, min=0.0, max=100.0, step=0.1, tooltip=tooltip, **more)


def sampler(tooltip: str = "The sampler you render with.", **more: Any) -> io.Combo.Input:
    options = comfy.samplers.KSampler.SAMPLERS
    return io.Combo.Input("sampler_name", options=options, default="euler", tooltip=tooltip, **more)


def scheduler(tooltip: str = "The scheduler you render with.", **more: Any) -> io.Combo.Input:
    options = comfy.samplers.KSampler.SCHEDULERS
    return io.Combo.Input("scheduler", options=options, default="simple", tooltip=tooltip, **more)


def ridge(tooltip: str, **more: Any) -> io.Float.Input:
    return io.Float.Input("ridge", default=0.01, min=0.0, max=10.0, step=0.001, round=0.0001, tooltip=tooltip, **more)


def pairs(tooltip: str, default: int, **more: Any) -> io.Int.Input:
    return io.Int.Input("pairs", default=default, min=0, max=64, tooltip=tooltip, **more)


def combinations(tooltip: str, **more: Any) -> io.String.Input:
    hint = "1+2: a prompt that asks for both, one per line; empty: some are made"
    shown = {"multiline": True, "placeholder": hint, "dynamic_prompts": False}
    return io.String.Input("combinations", default="", tooltip=tooltip, **shown, **more)


def references() -> io.Latent.Input:
    return io.Latent.Input(
        "references",
        optional=True,
        tooltip="For edit models: input pictures, VAE-encoded, of any size. Each prompt gets one, in turn; the shorter "
        "of both lists starts over, so one prompt and three pictures make three.",
    )


def dtype() -> io.Combo.Input:
    return io.Combo.Input(
        "dtype",
        options=["bfloat16", "float16", "float32"],
        default="bfloat16",
        tooltip="bfloat16 and float16 make files of the usual size; float32 is exact.",
    )


def strengths(**more: Any) -> io.String.Input:
    return io.String.Input(
        "strengths",
        default="",
        tooltip="Strength of each LoRA in the merge, in their order, such as 1, 0.8, 1. "
        "Empty: as given in SSR Add LoRA.",
        **more,
    )


RULES = (
    "Rules for layers, one per line; later ones overrule earlier ones. keep: routed, as all are without a rule. "
    "stack: summed, not routed. drop: left out. Then what: all, attention, mlp, modulation, text, image, text_encoder, "
    "or part of a name, such as drop single_blocks.0-9."
)


def layers(tooltip: str = RULES) -> io.String.Input:
    return io.String.Input(
        "layers",
        default="",
        multiline=True,
        dynamic_prompts=False,
        optional=True,
        tooltip=tooltip,
        **ADVANCED,
    )


def numbers(text: str, where: str) -> tuple[float, ...]:
    """What a person wrote into `strengths`.

    Raises:
        SSRError: something else than numbers; names `where`.
    """
    try:
        return tuple(float(part) for part in re.split(r"[\s,;]+", text.strip()) if part)
    except ValueError as error:
        raise SSRError(f"{where}: strengths are {text!r}; give one number per LoRA, such as 1, 0.8, 1.") from error
