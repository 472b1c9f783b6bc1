"""Network: the diffusion model or the text encoder, as far as LoRAs are concerned: names, shapes and weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import comfy.lora
import comfy.model_management
import comfy.utils
import torch
from torch import Tensor, nn

from ..ssr_core import LoraError

GENERIC = "text_encoders."  # before a text encoder's own names, in the spelling that ComfyUI loads for all of them


class Network:
    """What ComfyUI knows about the weights of a model."""

    def __init__(self, patcher: Any, key_map: Mapping[str, Any]) -> None:
        self.key_map = key_map
        self._patcher = patcher
        self._modules = dict(patcher.model.named_modules())
        self._keys = set(patcher.model.state_dict())

    @classmethod
    def of_model(cls, patcher: Any) -> Network:
        return cls(patcher, comfy.lora.model_lora_keys_unet(patcher.model, {}))

    @classmethod
    def of_text_encoder(cls, clip: Any) -> Network:
        return cls(clip.patcher, comfy.lora.model_lora_keys_clip(clip.cond_stage_model, {}))

    @property
    def name(self) -> str:
        return type(self._patcher.model).__name__

    def __contains__(self, key: str) -> bool:
        return key in self._keys

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(comfy.utils.get_attr(self._patcher.model, key).shape)

    def can_be_routed(self, key: str) -> bool:
        """Whether `key` is the weight of a layer that multiplies its input with it: the others cannot be hooked."""
        module = self._modules.get(key.removesuffix(".weight"))
        if module is None or not key.endswith(".weight") or isinstance(module, nn.Embedding):
            return False
        plain = getattr(module, "groups", 1) == 1 and not getattr(module, "transposed", False)
        return plain and 2 <= len(self.shape(key)) <= 5

    def weight(self, key: str, where: str) -> Tensor:
        """The weight as it is used: de-quantized, with all patches that are on the model, float32.

        Raises:
            LoraError: it is kept in a form that ComfyUI has no conversion for.
        """
        (stored, convert), *patches = self._weights[key]
        shape = self.shape(key)
        if type(stored) not in (Tensor, nn.Parameter) and not hasattr(stored, "dequantize"):
            found = self._dequantized(key)
        else:
            found = convert(stored.to(self.device, copy=True), inplace=True)
        if tuple(found.shape) != shape or not found.is_floating_point():
            raise LoraError(
                f"{where} depends on the weight of the base, which is kept as {type(stored).__name__} here and cannot "
                "be read. Collect on a base in fp16, bf16 or fp8, or leave this LoRA out."
            )
        found = found.to(self.device, torch.float32)
        return comfy.lora.calculate_weight(patches, found, key) if patches else found

    @cached_property
    def device(self) -> torch.device:
        device: torch.device = self._patcher.load_device
        return device if device.type == "cuda" else torch.device("cpu")

    @cached_property
    def _weights(self) -> dict[str, Any]:
        """[(weight, conversion), patch, ...] by key, as ComfyUI keeps them for its own differences of models."""
        weights: dict[str, Any] = self._patcher.get_key_patches()
        return weights

    def _dequantized(self, key: str) -> Tensor:
        """By a layer that keeps its weight packed and knows how to unpack it, such as ComfyUI-GGUF's."""
        module = self._modules[key.removesuffix(".weight")]
        unpack: Callable[..., Tensor] | None = getattr(module, "get_weight", None)
        stored: Tensor = comfy.utils.get_attr(self._patcher.model, key)
        return stored if unpack is None else unpack(stored.to(self.device), torch.float32)


class NamesOnly:
    """A text encoder that is not there: any name is taken as the file has it."""

    def __init__(self, key_map: Mapping[str, str]) -> None:
        self.key_map = key_map
        self.name = "text encoder"
        self.device = torch.device("cpu")

    def __contains__(self, key: str) -> bool:
        return True

    def shape(self, key: str) -> tuple[int, ...]:
        return ()

    def can_be_routed(self, key: str) -> bool:
        return True

    def weight(self, key: str, where: str) -> Tensor:
        raise LoraError(f"{where} depends on the weight of the text encoder; connect clip to SSR Collect Stats.")
