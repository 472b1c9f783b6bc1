"""Pictures between Pillow, which draws them, and ComfyUI's IMAGE."""

from __future__ import annotations

import numpy
import torch
from PIL import Image
from torch import Tensor


def picture_of(pixels: Tensor) -> Image.Image:
    """The middle one of all; pixels: (batch, height, width, channels) or (batch, frames, ...), in 0..1."""
    frames = pixels.reshape(-1, *pixels.shape[-3:])
    frame = frames[len(frames) // 2, ..., :3].float().clamp(0, 1).cpu()
    return Image.fromarray((frame * 255).round().to(torch.uint8).numpy())


def image_of(picture: Image.Image) -> Tensor:
    """An IMAGE, (1, height, width, 3) in 0..1."""
    return torch.from_numpy(numpy.asarray(picture.convert("RGB")).astype(numpy.float32) / 255)[None]
