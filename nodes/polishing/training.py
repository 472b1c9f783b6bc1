"""A model that gradients pass through: loaded, told that it is in training, and as it was afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import comfy.model_management as management
import torch

from ..calibrating.caches import Caches
from ..calibrating.sampling import uncompiled
from .kernels import with_gradient


@contextmanager
def in_training(patcher: Any, need: int) -> Iterator[Any]:
    """The model of `patcher` with its patches on it, and `need` bytes free beside it on its device.

    ComfyUI's own training does the same: some models choose other kernels then, which have a gradient. Unlike there,
    weights that do not fit beside `need` may stay offloaded: none is kept for a gradient, see frozen().
    """
    # in the mode of all other nodes: quantized weights that were moved in another can never be moved again
    management.load_models_gpu([patcher], memory_required=need)
    with torch.inference_mode(False), uncompiled(), with_gradient():
        known = getattr(management, "in_training", False)
        management.in_training = True
        patcher.pre_run()
        caches = Caches(patcher.model)
        # points of all prompts and steps come in any order, and none may find what another left
        forgetting = patcher.model.diffusion_model.register_forward_pre_hook(lambda module, args: caches.clear())
        try:
            with caches.of("training"):
                yield patcher.model
        finally:
            forgetting.remove()
            patcher.cleanup()
            management.in_training = known
