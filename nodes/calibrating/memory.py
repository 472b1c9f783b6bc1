"""Memory that collecting takes beside the model, looked for before it starts."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import comfy.model_management as management
import torch

from ...ssr_core import Calibration, Requirement, SSRError
from ...ssr_core.measure.layer import WIDENED

GROUPS = 8  # of layers that are refined one after the other, at most


def precision(patcher: Any) -> torch.dtype:
    """What the layers' signals are computed in."""
    if patcher.load_device.type in WIDENED:
        return torch.float32
    model = patcher.model
    dtype: torch.dtype = getattr(model, "get_dtype_inference", model.get_dtype)()
    return dtype if dtype.itemsize >= 2 else torch.bfloat16


def groups_that_fit(patcher: Any, latent: torch.Tensor, need: Callable[[int], int]) -> int:
    """In how few groups of layers refining fits beside the whole model; GROUPS, if in no number of them.

    Each group takes runs of its own, so that memory is bought with time. Beyond GROUPS it is cheaper to have ComfyUI
    move a part of the model off the device.

    Args:
        latent: what is sampled.
        need: bytes on the device by the number of groups.
    """
    device = patcher.load_device
    if device.type == "cpu":
        return 1
    both = [2 * latent.shape[0], *latent.shape[1:]]  # as ComfyUI counts it: the positive and the negative prompt
    running = max(patcher.model.memory_required(both), management.minimum_inference_memory())
    room = management.get_total_memory(device) - patcher.model_size() - running
    return next((groups for groups in range(1, GROUPS) if need(groups) <= room), GROUPS)


def free_host() -> int:
    """Bytes of memory that are free."""
    return int(management.get_free_memory(torch.device("cpu")))


def check_host(need: Requirement) -> None:
    """Raise SSRError if the statistics will not fit into memory."""
    free = free_host()
    if need.host > free:
        raise SSRError(
            f"The statistics of these LoRAs need {size(need.host)} of memory, and {size(free)} are "
            "free. Set refine to 0 (it needs most of it), lower context, or merge fewer LoRAs at a time."
        )


def result_bytes(calibration: Calibration, rank: float) -> int:
    """Of merged factors in float32, at most; `rank` as MergeSettings has it.

    In files, `up` of a slice has the rows of its whole layer.
    """
    return sum(
        4 * (min(space.rank, int(rank)) if rank >= 1 else space.rank) * (site.out_features + space.down[0].numel())
        for site, space in calibration.subspaces.items()
    )


def check_result(count: int) -> None:
    """Tell what SSR Solve will take for a result of so many bytes, and raise SSRError if there is less.

    The result is there twice for a moment: as it is solved, and as it is given away.
    """
    need, free = 2 * count, free_host()
    logging.info("SSR Solve: the merged LoRA has up to %s, and making it takes %s of memory.", size(count), size(need))
    if need > free:
        raise SSRError(
            f"SSR Solve: making a merged LoRA of {size(count)} needs {size(need)} of memory, and {size(free)} are "
            "free. Set rank, drop layers, or free some memory; the statistics are kept."
        )


def make_room(need: int, device: torch.device) -> torch.Tensor | None:
    """A placeholder of `need` bytes on the device, so that ComfyUI loads the model into what is left.

    Drop it before the first step; the statistics then take its place.

    Raises:
        SSRError: there is not so much memory even without any model.
    """
    if device.type == "cpu" or not need:
        return None
    management.free_memory(need, device)
    try:
        return torch.empty(need, dtype=torch.uint8, device=device)
    except torch.cuda.OutOfMemoryError as error:
        raise SSRError(
            f"Collecting needs {size(need)} on {device} beside the model, and less is free. Lower context, "
            "or merge fewer LoRAs at a time."
        ) from error


def size(count: int) -> str:
    """Of so many bytes, for people."""
    return f"{count / 2**30:.1f} GB" if count >= 2**30 else f"{count / 2**20:.0f} MB"
