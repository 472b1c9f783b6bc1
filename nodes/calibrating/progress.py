"""Progress: one bar over everything that a node samples, with ComfyUI's own preview."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.utils
import latent_preview
import torch


def show_steps(model: Any, total: int, bar: Any = None) -> Callable[[torch.Tensor], None]:
    """To be called after each of `total` steps with the predicted clean latent.

    Args:
        bar: ComfyUI's ProgressBar of a longer work, which these steps are the beginning of.
    """
    bar = bar or comfy.utils.ProgressBar(total)
    previewer = latent_preview.get_previewer(model.load_device, model.model.latent_format)

    def on_step(x0: torch.Tensor) -> None:
        preview = previewer.decode_latent_to_preview_image("JPEG", x0) if previewer else None
        bar.update_absolute(min(bar.current + 1, total), bar.total, preview)

    return on_step
