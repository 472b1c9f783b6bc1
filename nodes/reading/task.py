"""Task: one LoRA to merge, with the prompts it is calibrated on. What SSR_TASKS is a tuple of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

OFF = 1e-6  # a strength that is less came out of arithmetic such as 0.3 - 3 * 0.1


def is_off(strength: float) -> bool:
    return abs(strength) < OFF


@dataclass(frozen=True, eq=False)
class Task:
    """One LoRA to merge, with the prompts it is calibrated on."""

    name: str
    lora: Path | Mapping[str, Tensor]  # a file, or the state dict of a LORA_MODEL
    strength: float
    conditioning: list[Any]  # ComfyUI's CONDITIONING; every entry is one calibration prompt
    latent: Mapping[str, Any] | None = None  # ComfyUI's LATENT of images of its own, instead of sampled ones
    clip_strength: float | None = None  # None = `strength`
    negative: list[Any] | None = None  # CONDITIONING as this LoRA's text encoder reads it, instead of everyone's

    @property
    def is_off(self) -> bool:
        """Whether it changes neither the model nor the text encoder: then it is as if it were not there."""
        return is_off(self.strength) and is_off(self.text_strength)

    @property
    def text_strength(self) -> float:
        return self.strength if self.clip_strength is None else self.clip_strength
