"""LORA_MODEL: a merged LoRA as the state dict that ComfyUI loads for every model, and how it gets onto one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import comfy.lora
import comfy.lora_convert
import torch
from torch import Tensor

from ...ssr_core import LoraError, ModelMismatchError, Rule, treatment_of
from ...ssr_core.files.lora_file import to_state_dict
from ...ssr_core.lora.site import Updates
from ..reading.adapters import check_size
from ..reading.keys import TEXT_ENCODER
from ..reading.loaded_lora import Part, Patch
from ..reading.network import Network
from ..reading.place import Place


class LoraModel(dict[str, Tensor]):
    """A LORA_MODEL: the plain state dict that ComfyUI's own nodes use, which also knows where it comes from."""

    def __init__(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        super().__init__(tensors)
        self.metadata = dict(metadata)


def state_dict(
    updates: Updates, parts: Sequence[Part], strengths: Sequence[float], rules: Sequence[Rule], prefix: str
) -> dict[str, Tensor]:
    """Low-rank updates, and what else the parts of K LoRAs change, summed at their strengths.

    Args:
        rules: what they drop is left out; `updates` are taken as they are.
        prefix: of the generic spelling, before the weight keys of the parts.

    Raises:
        LoraError: LoRAs disagree about a weight that one of them replaces.
    """
    wanted = [
        {prefix + key: patch for key, patch in part.patches.items() if _is_kept(prefix + key, rules)} for part in parts
    ]
    differences, settings = _sum_of_differences(wanted, strengths), _settings(wanted, strengths)
    # ComfyUI keeps one patch per weight and file
    changed = {f"{site.module}.weight" for site in updates} | differences.keys()
    if both := sorted(changed & settings.keys()):
        raise LoraError(
            f"One LoRA replaces {both[0]} and another changes it; leave one of them out, or drop that layer in the "
            "layers of SSR Solve."
        )
    return {
        **to_state_dict(updates, ""),
        **{_difference_key(key): value.clone().contiguous() for key, value in differences.items()},
        **{f"{key.removesuffix('.weight')}.set_weight": value.clone().contiguous() for key, value in settings.items()},
    }


def _is_kept(key: str, rules: Sequence[Rule]) -> bool:
    return treatment_of(key.rpartition(".")[0], rules) != "drop"


def load_into(state: Mapping[str, Tensor], model: Any, clip: Any, strength: float) -> tuple[Any, Any]:
    """Clones of `model` and `clip` (may be None) patched with a LORA_MODEL.

    Raises:
        ModelMismatchError: a key names no weight of either, or a weight of another size.
    """
    network = Network.of_model(model)
    key_map = dict(network.key_map)
    encoder = None if clip is None else Network.of_text_encoder(clip)
    if encoder is not None:
        key_map |= encoder.key_map
    state = comfy.lora_convert.convert_lora(dict(state))
    patches = comfy.lora.load_lora(state, key_map, log_missing=False)
    loaded = _loaded_keys(state, patches, key_map)
    lost = [key for key in state if key not in loaded]
    if clip is None:
        lost = [key for key in lost if not key.startswith(TEXT_ENCODER)]
    _check_sizes(patches, network, encoder)
    model, clip = model.clone(), clip.clone() if clip is not None else None
    taken = set(model.add_patches(patches, strength))
    if clip is not None:
        taken |= set(clip.add_patches(patches, strength))
    lost += [str(key) for key in patches if key not in taken]
    if lost or not patches:
        raise ModelMismatchError(
            f"This LoRA does not fit the model: {len(lost) or 'all'} of its {len(state)} tensors name no weight of "
            f"{network.name}{f', such as {lost[0]!r}' if lost else ''}. Use the base it was merged for."
        )
    return model, clip


def check_base(state: Mapping[str, Tensor], model: Any, where: str) -> None:
    """Raise LoraError if `model`, which should be the base, has this LORA_MODEL on it already; names `where`."""
    own = {tensor.data_ptr() for tensor in state.values() if tensor.numel()}
    adapters = (patch[1] for patches in model.patches.values() for patch in patches)
    weights = (weight for adapter in adapters for weight in getattr(adapter, "weights", ()))
    if any(isinstance(weight, Tensor) and weight.data_ptr() in own for weight in weights):
        raise LoraError(f"{where}: this model has the merge on it already; connect the base model, from before it.")


def _check_sizes(patches: Mapping[Any, Any], network: Network, encoder: Network | None) -> None:
    """ComfyUI only logs what is of another size, and leaves the weight as it is."""
    misfits = []
    for key, patch in patches.items():
        place = Place.of(key, network) or (None if encoder is None else Place.of(key, encoder))
        try:
            if place is not None:
                check_size(patch, place.slice_shape, place.key)
        except ModelMismatchError as error:
            misfits.append(str(error))
    if misfits:
        raise ModelMismatchError(
            f"This LoRA does not fit the model: {len(misfits)} of its {len(patches)} layers are of another size than "
            f"those of {network.name}. {misfits[0]} Use the base it was merged for, or drop these layers in SSR Solve."
        )


def _loaded_keys(tensors: Mapping[str, Tensor], patches: Mapping[Any, Any], key_map: Mapping[str, Any]) -> set[str]:
    """The keys of a state dict that ComfyUI made patches of."""
    ends = (".alpha", ".dora_scale", ".w_norm", ".b_norm", ".diff", ".diff_b", ".set_weight")
    loaded = {name + end for name in key_map for end in ends if name + end in tensors}
    return loaded.union(*(patch.loaded_keys for patch in patches.values() if not isinstance(patch, tuple)))


def _sum_of_differences(parts: Sequence[Mapping[str, Patch]], strengths: Sequence[float]) -> dict[str, Tensor]:
    """Full differences by weight key, summed at their strengths."""
    total: dict[str, Tensor] = {}
    for patches, strength in zip(parts, strengths, strict=True):
        for key, (kind, values) in patches.items():
            if kind == "diff":
                total[key] = total.get(key, 0) + values[0].float() * strength
    return total


def _settings(parts: Sequence[Mapping[str, Patch]], strengths: Sequence[float]) -> dict[str, Tensor]:
    """Weights that a LoRA replaces outright, by key, however strong it is; two LoRAs cannot both have their way."""
    found: dict[str, Tensor] = {}
    for patches, strength in zip(parts, strengths, strict=True):
        for key, (kind, values) in patches.items():
            if kind != "set" or not strength:
                continue
            if key in found and not torch.equal(found[key], values[0]):
                raise LoraError(
                    f"Two LoRAs replace {key} with different values; leave one of them out, or drop that layer in the "
                    "layers of SSR Solve."
                )
            found[key] = values[0]
    return found


def _difference_key(weight_key: str) -> str:
    if weight_key.endswith(".bias"):
        return f"{weight_key.removesuffix('.bias')}.diff_b"
    return f"{weight_key.removesuffix('.weight')}.diff"
