"""A model that gradients pass through: loaded whole, told that it is in training, and as it was afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import comfy.model_management as management
import torch

from ..calibrating.sampling import uncompiled


@contextmanager
def in_training(patcher: Any, need: int) -> Iterator[Any]:
    """The model of `patcher` with its patches on it, and `need` bytes free beside it on its device.

    ComfyUI's own training does the same: some models choose other kernels then, which have a gradient.
    """
    with torch.inference_mode(False), uncompiled():
        management.load_models_gpu([patcher], memory_required=need, force_full_load=True)
        known = getattr(management, "in_training", False)
        management.in_training = True
        patcher.pre_run()
        try:
            yield patcher.model
        finally:
            patcher.cleanup()
            management.in_training = known
