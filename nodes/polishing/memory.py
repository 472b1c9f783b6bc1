"""Memory that polishing takes beside the model: told, and looked for, before the first gradient step."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import comfy.model_management as management
import torch

from ...ssr_core import DistillationRequirement, LowRankUpdate, Point, Site, SSRError, footprint, memory_of
from ..calibrating.memory import free_host, size
from .points import Lesson
from .training import in_training

SHARE = 0.25  # of the free host memory that points may take


def room_for_points() -> float:
    """Bytes."""
    return SHARE * free_host()


def needed(
    patcher: Any, updates: Mapping[Site, LowRankUpdate], lesson: Lesson, only_up: bool
) -> DistillationRequirement:
    """Counted while the model answers at the largest point once."""
    point = max(lesson.points, key=lambda one: memory_of([one]))
    with in_training(patcher, _in_sampling(patcher, point)) as network:
        activations = footprint(network, network.diffusion_model, point, updates, patcher.load_device, only_up)
    return DistillationRequirement.of(updates, activations, lesson.all, only_up)


def _in_sampling(patcher: Any, point: Point) -> int:
    """What ComfyUI expects a call to take."""
    latent = point.args[0]
    return int(patcher.memory_required(latent.shape)) if isinstance(latent, torch.Tensor) else 0


def look_for(need: DistillationRequirement, device: torch.device, tell: Callable[[str], None]) -> None:
    """Say what it takes, and make room on the device; other models leave it where they have to.

    Raises:
        SSRError: there is not so much memory, even without any model.
    """
    where = "of memory" if device.type == "cpu" else f"on {device}"
    text = f"Polishing takes {size(need.device)} {where} beside the model, and {size(need.host)} for points and results"
    tell(text)
    logging.info("SSR-Merge: %s.", text)
    elsewhere = need.device if device.type == "cpu" else 0
    _check(need.results + elsewhere, torch.device("cpu"))  # the points are there already
    if device.type != "cpu":
        management.free_memory(need.device, device)
        _check(need.device, device)


def _check(need: int, device: torch.device) -> None:
    free = management.get_free_memory(device)
    if need > free:
        place = "of memory" if device.type == "cpu" else f"on {device}"
        raise SSRError(
            f"Polishing takes {size(need)} {place}, and {size(int(free))} are free. Use a merge of a lower rank "
            "(rank of SSR Solve), only_up, or a smaller latent in SSR Collect Stats."
        )
