"""LoadedLora: a LoRA as ComfyUI reads it for a model, in its parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from torch import Tensor

from ...ssr_core import Lora
from ...ssr_core.lora.site import Updates
from .task import Task
from .tensor_account import Account

Patch = tuple[str, tuple[Tensor, ...]]  # ComfyUI's ("diff", (tensor,)) or ("set", (tensor,))


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
        """The same with its factors where statistics keep them, so that nothing is in memory twice.

        Its prompts are sampled by then, and go: they hold the text encoder that read them.
        """
        of_text = self.text if text is None else replace(self.text, updates=text.updates)
        task = replace(self.task, conditioning=[], latent=None, negative=None)
        return replace(self, task=task, model=replace(self.model, updates=model.updates), text=of_text)

    @cached_property
    def lora(self) -> Lora:
        return Lora(self.task.name, self.model.updates, self.task.strength, self.source)

    @cached_property
    def text_lora(self) -> Lora:
        return Lora(self.task.name, self.text.updates, self.task.text_strength, self.source)
