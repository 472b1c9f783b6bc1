"""Network: the diffusion model or the text encoder, as far as LoRAs are concerned: names, shapes and weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, cast

import comfy.lora
import comfy.model_management
import comfy.utils
import torch
from torch import Tensor, nn

from ...ssr_core import LoraError, ModelMismatchError
from ...ssr_core.measure.layer import multiplies

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
        """Raises ModelMismatchError if its layers cannot be seen, whatever the LoRA."""
        _check_layers(patcher)
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
        return module is not None and key.endswith(".weight") and multiplies(module)

    def weight(self, key: str, where: str) -> Tensor:
        """The weight as it is used: de-quantized, with all patches that are on the model, float32.

        Raises:
            LoraError: it is kept in a form that ComfyUI has no conversion for.
        """
        stored, shape = self._kept(key), self.shape(key)
        found = self._unpacked(key, stored.to(self.device, copy=True))
        if tuple(found.shape) != shape or not found.is_floating_point():
            raise LoraError(
                f"{where} depends on the weight of the base, which is kept as {type(stored).__name__} here and cannot "
                "be read. Collect on a base in fp16, bf16 or fp8, or leave this LoRA out."
            )
        patches = self._patcher.patches.get(key, [])
        found = found.to(self.device, torch.float32)
        return comfy.lora.calculate_weight(patches, found, key) if patches else found

    @cached_property
    def device(self) -> torch.device:
        device: torch.device = self._patcher.load_device
        return device if device.type == "cuda" else torch.device("cpu")

    def _kept(self, key: str) -> Tensor:
        """The weight as it is stored, without the patches that may be in it at the moment."""
        patcher = self._patcher
        if (hooked := patcher.hook_backup.get(key)) is not None:
            return cast(Tensor, hooked[0])
        if (backup := patcher.backup.get(key)) is not None:
            return cast(Tensor, backup.weight)
        return cast(Tensor, comfy.utils.get_attr(patcher.model, key))

    def _unpacked(self, key: str, stored: Tensor) -> Tensor:
        """By the layer that keeps it packed: ComfyUI's own quantized ones, or those of ComfyUI-GGUF."""
        module: Any = self._modules[key.removesuffix(".weight")]
        if hasattr(module, "get_weight"):
            stored.patches = []  # type: ignore[attr-defined]  # GGUF's: they are added below, as everywhere
            return cast(Tensor, module.get_weight(stored, torch.float32))
        convert: Callable[..., Tensor] | None = getattr(module, "convert_weight", None)
        return stored if convert is None else convert(stored, inplace=True)


def _check_layers(patcher: Any) -> None:
    diffusion = getattr(patcher.model, "diffusion_model", None)
    kind = type(diffusion).__name__
    if not isinstance(diffusion, nn.Module) or next(diffusion.parameters(), None) is None:
        raise ModelMismatchError(
            f"This model is a compiled engine ({kind}, as of TensorRT), whose layers cannot be seen. Collect on the "
            "model it was built from, and build the engine again from the model with the merged LoRA on it."
        )
    modules = dict(diffusion.named_modules())
    for name, module in modules.items():
        packed = hasattr(module, "qweight") and getattr(module, "weight", None) is None
        if packed or "nunchaku" in type(module).__module__.lower():
            raise ModelMismatchError(
                f"This model is Nunchaku's or packed as its are ({kind}, {name or 'whole'}: {type(module).__name__}): "
                "it runs several layers as one, where nothing can be measured. Collect on the same model in bf16, fp8 "
                "or GGUF, save the merged LoRA, and load it with Nunchaku's own loader."
            )
    replaced = {**patcher.object_patches, **modules}
    if compiled := [name for name, module in replaced.items() if hasattr(module, "_orig_mod")]:
        raise ModelMismatchError(
            f"{compiled[0]} of this model was compiled in place, which hides its layers (and Load LoRA has no effect "
            "on them). Connect the model before the node that compiles it."
        )


class NamesOnly:
    """A text encoder that is not there: any name is taken as the file has it."""

    def __init__(self, key_map: Mapping[str, str]) -> None:
        self.key_map = key_map
        self.device = torch.device("cpu")

    def __contains__(self, key: str) -> bool:
        return True

    def shape(self, key: str) -> tuple[int, ...]:
        return ()

    def can_be_routed(self, key: str) -> bool:
        return True

    def weight(self, key: str, where: str) -> Tensor:
        raise LoraError(f"{where} depends on the weight of the text encoder; connect clip to SSR Collect Stats.")
