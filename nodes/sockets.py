"""What travels between the nodes: frozen values, because ComfyUI hands one object to every consumer and caches it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from comfy_api.latest import io
from server import PromptServer
from torch import Tensor

from ..ssr_core import Calibration, Lora
from ..ssr_core.site import Updates
from .account import Account
from .collection import Collection

CATEGORY = "SSR Merge"

SSRTasks = io.Custom("SSR_TASKS")
SSRStats = io.Custom("SSR_STATS")
LoraModelSocket = io.Custom("LORA_MODEL")
LoraStackSocket = io.Custom("LORA_STACK")

Patch = tuple[str, tuple[Tensor, ...]]  # ComfyUI's ("diff", (tensor,)) or ("set", (tensor,))


def schema(**fields: Any) -> io.Schema:
    """An io.Schema without the fields that an older ComfyUI does not know."""
    return io.Schema(**{key: value for key, value in fields.items() if key in io.Schema.__dataclass_fields__})


def say(cls: type[io.ComfyNode], text: str) -> None:
    """A line of text on the node that runs."""
    if PromptServer.instance is not None and cls.hidden.unique_id is not None:
        PromptServer.instance.send_progress_text(text, cls.hidden.unique_id)


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
    clip_strength: float | None = None  # None = `strength`
    negative: list[Any] | None = None  # CONDITIONING as this LoRA's text encoder reads it, instead of everyone's

    @property
    def text_strength(self) -> float:
        return self.strength if self.clip_strength is None else self.clip_strength


@dataclass(frozen=True, eq=False)
class Part:
    """What a LoRA changes in one network, the diffusion model or the text encoder, at strength 1."""

    updates: Updates  # low-rank; sites carry the network's module names
    patches: Mapping[str, Patch]  # the rest, by weight key: active while calibrating, then summed at its strength


@dataclass(frozen=True, eq=False)
class LoadedLora:
    """A LoRA as ComfyUI reads it for a model."""

    task: Task
    source: Mapping[str, str]  # file, sha256, trigger words, ...
    model: Part
    text: Part
    account: Account

    def sharing(self, model: Lora, text: Lora | None) -> LoadedLora:
        """The same with its factors where statistics keep them, so that nothing is in memory twice."""
        of_text = self.text if text is None else replace(self.text, updates=text.updates)
        return replace(self, model=replace(self.model, updates=model.updates), text=of_text)

    @cached_property
    def lora(self) -> Lora:
        return Lora(self.task.name, self.model.updates, self.task.strength, self.source)

    @cached_property
    def text_lora(self) -> Lora:
        return Lora(self.task.name, self.text.updates, self.task.text_strength, self.source)


@dataclass(frozen=True, eq=False)
class Stats:
    """All that SSR Solve needs: the LoRAs, what was measured, and where it all comes from."""

    loras: tuple[LoadedLora, ...]  # (K,)
    calibration: Calibration
    text: Calibration | None  # of the text encoder; None: nothing was measured there, and its parts are summed
    with_clip: bool  # whether the text encoder was there, so that the names in `loras` are its own
    silent: tuple[str, ...]  # modules that a LoRA changes and that never ran
    provenance: Mapping[str, str]  # metadata for the file that is saved in the end
    collections: tuple[Collection, ...]  # how it was measured: once, unless statistics were added

    @property
    def model(self) -> str:
        """ComfyUI's class of the model it was measured on."""
        return self.collections[0].model


class LoraModel(dict[str, Tensor]):
    """A LORA_MODEL: the plain state dict that ComfyUI's own nodes use, which also knows where it comes from."""

    def __init__(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        super().__init__(tensors)
        self.metadata = dict(metadata)
