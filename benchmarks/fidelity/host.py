# SPDX-License-Identifier: Apache-2.0
"""A real ComfyUI in this process, with this pack loaded into it: what is measured is what the nodes do."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
sys.path += [str(ROOT / "demo"), str(ROOT / "tests" / "support")]
sys.path = [path for path in sys.path if path and Path(path).resolve() != ROOT]  # its nodes/ would hide ComfyUI's

import training  # noqa: E402, F401  (puts ComfyUI on the path)

import comfy_runtime  # noqa: E402

_base = ROOT / ".cache" / "fidelity" / "comfyui"
_base.mkdir(parents=True, exist_ok=True)
comfy_runtime.start(Path(os.environ["COMFYUI_PATH"]).resolve(), _base)
pack = comfy_runtime.load_pack()


def _part(name: str) -> ModuleType:
    return importlib.import_module(f"{pack.__name__}.{name}")


class nodes:
    """Modules of the pack's nodes."""

    diffusion_model, runs = _part("nodes.calibrating.diffusion_model"), _part("nodes.calibrating.runs")
    case_prompts, prompt = _part("nodes.calibrating.case_prompts"), _part("nodes.calibrating.prompt")
    combination, patches = _part("nodes.reading.combination"), _part("nodes.reading.patches")
    task = _part("nodes.reading.task")


ssr_core = _part("ssr_core")
CONTEXT = _part("ssr_core.measure.collector").CONTEXT
PAIRS = nodes.case_prompts.PAIRS
LATENT = {"samples": torch.zeros(1, 16, 16, 16)}


def collect(
    patcher: Any,
    tasks: Sequence[Any],
    loaded: Sequence[Any],
    steps: int,
    asked: Sequence[Any] = (),
    pairs: int = PAIRS,
) -> Any:
    """What SSR Collect Stats does, without its progress bar.

    Args:
        asked: combinations, with prompts of their own.
        pairs: where there are none, how many prompts of each pair of LoRAs are made of their own.
    """
    sampling = nodes.runs.Sampling(0, steps, "euler", "simple")
    cases = nodes.case_prompts.cases_of(tasks, asked, pairs)
    runs = nodes.runs.plan(cases, sampling, CONTEXT, nodes.runs.REFINE)
    ignore = lambda _: None  # noqa: E731
    return nodes.diffusion_model.calibrate(patcher, loaded, runs, LATENT, CONTEXT, ignore, ignore)[0]
