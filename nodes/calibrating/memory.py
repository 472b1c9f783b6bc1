"""Memory that collecting takes beside the model, looked for before it starts."""

from __future__ import annotations

from typing import Any

import comfy.model_management as management
import torch

from ...ssr_core import Requirement, SSRError
from ...ssr_core.measure.layer import WIDENED


def itemsize(patcher: Any) -> int:
    """Bytes of a number in the precision in which the layers' signals are computed."""
    if patcher.load_device.type in WIDENED:
        return 4
    model = patcher.model
    dtype: torch.dtype = getattr(model, "get_dtype_inference", model.get_dtype)()
    return max(dtype.itemsize, 2)


def check_host(need: Requirement) -> None:
    """Raise SSRError if the statistics will not fit into memory."""
    free = management.get_free_memory(torch.device("cpu"))
    if need.host > free:
        raise SSRError(
            f"The statistics of these LoRAs need {size(need.host)} of memory, and {size(free)} are "
            "free. Set refine to 0 (it needs most of it), lower context, or merge fewer LoRAs at a time."
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
            "set refine to 0, or merge fewer LoRAs at a time."
        ) from error


def size(count: int) -> str:
    """Of so many bytes, for people."""
    return f"{count / 2**30:.1f} GB" if count >= 2**30 else f"{count / 2**20:.0f} MB"
