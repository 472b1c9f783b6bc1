"""What travels between the nodes: frozen values, because ComfyUI hands one object to every consumer and caches it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comfy_api.latest import io
from torch import Tensor

from ..ssr_core import Calibration, LowRankUpdate

CATEGORY = "SSR Merge"

SSRTasks = io.Custom("SSR_TASKS")
SSRStats = io.Custom("SSR_STATS")
LoraModelSocket = io.Custom("LORA_MODEL")


def schema(**fields: Any) -> io.Schema:
    """An io.Schema without the fields that an older ComfyUI does not know."""
    return io.Schema(**{key: value for key, value in fields.items() if key in io.Schema.__dataclass_fields__})


# folds an input away in the frontend, where ComfyUI knows how
ADVANCED: dict[str, Any] = {"advanced": True} if "advanced" in inspect.signature(io.Int.Input).parameters else {}

# a seed that stays: by default the frontend makes a new one each time, and all would be collected again
FIXED: Any = getattr(getattr(io, "ControlAfterGenerate", None), "fixed", None)


@dataclass(frozen=True, eq=False)
class Task:
    """One LoRA to merge, with the prompts it is calibrated on."""

    name: str
    lora: Path | Mapping[str, Tensor]  # a file, or the state dict of a LORA_MODEL
    strength: float
    conditioning: list[Any]  # ComfyUI's CONDITIONING; every entry is one calibration prompt
    latent: Mapping[str, Any] | None = None  # ComfyUI's LATENT of images of its own, instead of sampled ones


@dataclass(frozen=True, eq=False)
class Carried:
    """The parts of one LoRA that are not routed: the result holds their plain, strength-weighted sum."""

    text_encoder: Mapping[str, LowRankUpdate]  # by key prefix, as in the file
    patches: Mapping[Any, tuple[str, tuple[Tensor, ...]]]  # ComfyUI's ("diff", ...) and ("set", ...) by weight key
    unmatched: tuple[str, ...]  # keys of the file that name nothing in this model


@dataclass(frozen=True, eq=False)
class Stats:
    """All that SSR Solve needs: what was measured, what is carried along, and where it comes from."""

    calibration: Calibration
    carried: tuple[Carried, ...]  # (K,)
    silent: tuple[str, ...]  # modules that a LoRA changes and that never ran
    provenance: Mapping[str, str]  # metadata for the file that is saved in the end


class LoraModel(dict[str, Tensor]):
    """A LORA_MODEL: the plain state dict that ComfyUI's own nodes use, which also knows where it comes from."""

    def __init__(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        super().__init__(tensors)
        self.metadata = dict(metadata)
