"""Inputs that several nodes have."""

from __future__ import annotations

from typing import Any

import comfy.samplers
from comfy_api.latest import io

from .sockets import FIXED


def seed(tooltip: str, **more: Any) -> io.Int.Input:
    return io.Int.Input(
        "seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=FIXED, tooltip=tooltip, **more
    )


def steps(tooltip: str, default: int, **more: Any) -> io.Int.Input:
    return io.Int.Input("steps", default=default, min=1, max=10000, tooltip=tooltip, **more)


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
    return io.String.Input("combinations", default="", multiline=True, dynamic_prompts=False, tooltip=tooltip, **more)
