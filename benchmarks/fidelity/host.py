# SPDX-License-Identifier: Apache-2.0
"""A real ComfyUI in this process, with this pack loaded into it: what is measured is what the nodes do."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator, Sequence
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
    task, points = _part("nodes.reading.task"), _part("nodes.polishing.points")


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
    runs = _runs(tasks, steps, asked, pairs, CONTEXT, nodes.runs.REFINE)
    ignore = lambda _: None  # noqa: E731
    return nodes.diffusion_model.calibrate(patcher, loaded, runs, LATENT, CONTEXT, ignore, ignore)[0]


def polish(
    patcher: Any,
    tasks: Sequence[Any],
    loaded: Sequence[Any],
    steps: int,
    starts: Sequence[tuple[Any, Sequence[int]]],
    asked: Sequence[Any] = (),
    pairs: int = PAIRS,
) -> Iterator[Any]:
    """What SSR Polish makes of merges of the same calibration, with its defaults.

    Args:
        starts: updates by site, and for how many steps each of them is polished.
    """
    runs = [(run, LATENT) for run in _runs(tasks, steps, asked, pairs)]
    modules = {site.module for site in starts[0][0]}
    ignore = lambda *_: None  # noqa: E731
    for updates, amounts in starts:
        for amount in amounts:
            settings = ssr_core.DistillationSettings(amount)
            lesson = nodes.points.record(patcher, loaded, modules, runs, ignore, ignore, settings.points)
            yield ssr_core.distil(
                *(patcher.model, patcher.model.diffusion_model, updates, lesson.points, lesson.held_out),
                *(patcher.load_device, lesson.cases, settings),
            ).updates


def _runs(
    tasks: Sequence[Any], steps: int, asked: Sequence[Any], pairs: int, context: int = 0, refine: int = 0
) -> Sequence[Any]:
    sampling = nodes.runs.Sampling(0, steps, "euler", "simple")
    return nodes.runs.plan(nodes.case_prompts.cases_of(tasks, asked, pairs), sampling, context, refine)
