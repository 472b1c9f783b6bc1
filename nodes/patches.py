"""ComfyUI's LoRA patches to updates by site and back. Which key means which weight is ComfyUI's to say, not ours."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.lora
import comfy.lora_convert
import comfy.utils
import comfy.weight_adapter
import torch
from torch import Tensor

from ..ssr_core import Lora, LoraError, LowRankUpdate, ModelMismatchError, Site, concatenate, join_rows, read_pairs
from ..ssr_core.files import find_pairs, sha256, to_state_dict
from .sockets import Carried, Task

_TEXT_ENCODER = ("lora_te", "text_encoder", "lora_prior_te", "clip_l.", "clip_g.", "conditioner.", "te1.", "te2.")


@dataclass(frozen=True, eq=False)
class LoadedLora:
    """A LoRA as ComfyUI reads it, parted into what is routed and what is carried."""

    lora: Lora
    carried: Carried


def read_task(task: Task, model: torch.nn.Module) -> LoadedLora:
    """Read the LoRA of a task for `model` (a comfy BaseModel).

    Raises:
        LoraError: damaged, half a pair, or an adapter that is not plain LoRA.
        ModelMismatchError: nothing in it names a weight of this model, or sizes differ.
    """
    tensors, source = _read(task)
    tensors = comfy.lora_convert.convert_lora(tensors)
    key_map = comfy.lora.model_lora_keys_unet(model, {})
    # first: ComfyUI passes over a lone down in silence, and stumbles over a lone up
    find_pairs({key: value for key, value in tensors.items() if _names_weight(key, key_map)}, task.name)
    patches = comfy.lora.load_lora(tensors, key_map, log_missing=False)
    loaded = _loaded_keys(tensors, patches, key_map)
    text = {key: value for key, value in tensors.items() if key not in loaded and key.startswith(_TEXT_ENCODER)}
    if not patches:
        raise ModelMismatchError(_no_match(task.name, tensors, text, model))
    unmatched = tuple(key for key in tensors if key not in loaded and key not in text)
    updates = dict(_updates(patches, model, task.name))
    others = {key: patch for key, patch in patches.items() if isinstance(patch, tuple)}
    lora = Lora(task.name, updates, task.strength, source)
    return LoadedLora(lora, Carried(_text_pairs(text, task.name), others, unmatched))


def lora_state_dict(
    updates: Mapping[Site, LowRankUpdate], carried: Sequence[Carried], strengths: Sequence[float]
) -> dict[str, Tensor]:
    """The merged LoRA in the generic spelling that ComfyUI loads for every model."""
    modules = join_rows(updates)
    dense = _sum_of_differences(carried, strengths)
    state: dict[str, Tensor] = {}
    for key in [key for key in dense if key.removesuffix(".weight") in modules]:
        # ComfyUI keeps one patch per weight and file: a full difference takes the low-rank update in
        dense[key] = dense[key] + modules.pop(key.removesuffix(".weight")).dense().reshape(dense[key].shape)
    whole = {Site.whole(module, update.out_features): update for module, update in modules.items()}
    state.update(to_state_dict(whole, prefix=""))
    state.update({_difference_key(key): value.contiguous() for key, value in dense.items()})
    state.update(_settings(carried))
    text = _sum_of_text(carried, strengths)
    state.update(
        to_state_dict({Site.whole(key, update.out_features): update for key, update in text.items()}, prefix="")
    )
    return state


def load_into(state: Mapping[str, Tensor], model: Any, clip: Any, strength: float) -> tuple[Any, Any]:
    """Clones of `model` and `clip` (may be None) patched with a LORA_MODEL.

    Raises:
        ModelMismatchError: a key names no weight of either.
    """
    key_map = comfy.lora.model_lora_keys_unet(model.model, {})
    if clip is not None:
        key_map = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, key_map)
    state = comfy.lora_convert.convert_lora(dict(state))
    patches = comfy.lora.load_lora(state, key_map, log_missing=False)
    loaded = _loaded_keys(state, patches, key_map)
    lost = [key for key in state if key not in loaded]
    if clip is None:
        lost = [key for key in lost if not key.startswith(_TEXT_ENCODER)]
    model, clip = model.clone(), clip.clone() if clip is not None else None
    taken = set(model.add_patches(patches, strength))
    if clip is not None:
        taken |= set(clip.add_patches(patches, strength))
    lost += [str(key) for key in patches if key not in taken]
    if lost or not patches:
        raise ModelMismatchError(
            f"This LoRA does not fit the model: {len(lost) or 'all'} of its {len(state)} tensors name no weight of "
            f"{type(model.model).__name__}{f', such as {lost[0]!r}' if lost else ''}. Use the base it was merged for."
        )
    return model, clip


def _read(task: Task) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a task's LoRA and what is worth remembering about where they come from."""
    if not isinstance(task.lora, Path):
        return dict(task.lora), {"file": task.name}
    try:
        tensors, metadata = comfy.utils.load_torch_file(str(task.lora), safe_load=True, return_metadata=True)
    except Exception as error:  # whatever a damaged file makes the reader raise
        raise LoraError(f"{task.lora.name} cannot be read ({error}); download or save it again.") from error
    kept = {key: value for key, value in (metadata or {}).items() if key in _KEPT_METADATA}
    return tensors, {"file": task.lora.name, "sha256": sha256(task.lora), **kept}


_KEPT_METADATA = ("ss_base_model_version", "modelspec.architecture", "modelspec.trigger_phrase", "modelspec.title")


def _loaded_keys(tensors: Mapping[str, Tensor], patches: Mapping[Any, Any], key_map: Mapping[str, Any]) -> set[str]:
    """The keys of a file that ComfyUI made patches of."""
    ends = (".alpha", ".dora_scale", ".w_norm", ".b_norm", ".diff", ".diff_b", ".set_weight")
    loaded = {name + end for name in key_map for end in ends if name + end in tensors}
    return loaded.union(*(patch.loaded_keys for patch in patches.values() if not isinstance(patch, tuple)))


def _names_weight(key: str, names: Container[str]) -> bool:
    """Whether some leading part of `key` is a name that ComfyUI's key map knows."""
    while True:
        if key in names or key.removesuffix("_lora") in names:
            return True
        key, dot, _ = key.rpartition(".")
        if not dot:
            return False


def _no_match(name: str, tensors: Mapping[str, Tensor], text: Mapping[str, Tensor], model: torch.nn.Module) -> str:
    if tensors and len(text) == len(tensors):
        return f"{name} changes only the text encoder; there is nothing to route. Load it with Load LoRA instead."
    return (
        f"{name} does not fit this model ({type(model).__name__}): none of its {len(tensors)} tensors matched; "
        "was it trained for another base?"
    )


def _updates(patches: Mapping[Any, Any], model: torch.nn.Module, name: str) -> Iterator[tuple[Site, LowRankUpdate]]:
    for key, adapter in patches.items():
        if isinstance(adapter, tuple):
            continue
        weight_key, offset, function = (key, None, None) if isinstance(key, str) else (*key, None)[:3]
        where = f"{name}: {weight_key}"
        update = _low_rank(adapter, where)
        if function is not None:  # a permutation of output rows, such as swapped scale and shift
            update = LowRankUpdate(update.down, function(update.up))
        shape = tuple(comfy.utils.get_attr(model, weight_key).shape)
        dim, start, length = offset or (0, 0, shape[0])
        if dim != 0:
            raise LoraError(f"{where} changes a slice of input columns, which cannot be routed; leave this LoRA out.")
        if update.out_features != length or update.down[0].numel() != torch.Size(shape[1:]).numel():
            raise ModelMismatchError(
                f"{where} has {length} outputs and inputs {tuple(shape[1:])} in this model, but {update.out_features} "
                f"and {update.in_shape} in the LoRA; it was trained for another variant of the base."
            )
        site = Site(weight_key.removesuffix(".weight"), start, start + length, shape[0])
        yield site, update.with_in_shape(shape[1:], where)


def _low_rank(adapter: Any, where: str) -> LowRankUpdate:
    if not isinstance(adapter, comfy.weight_adapter.LoRAAdapter):
        kind = getattr(adapter, "name", type(adapter).__name__)
        raise LoraError(f"{where} is a {kind} adapter; only plain LoRA can be routed. Convert the file to LoRA first.")
    up, down, alpha, mid, dora_scale, reshape = adapter.weights
    if dora_scale is not None:
        raise LoraError(f"{where} is a DoRA (it has a dora_scale); only plain LoRA can be routed.")
    if reshape is not None:
        raise LoraError(f"{where} reshapes the weight of the base; such a LoRA cannot be merged.")
    return LowRankUpdate.from_factors(down, up, alpha, mid, where)


def _text_pairs(text: Mapping[str, Tensor], name: str) -> dict[str, LowRankUpdate]:
    pairs, rest = read_pairs(text, name)
    if rest:
        raise LoraError(f"{name}: {rest[0]} is no plain LoRA of a text encoder; only plain LoRA can be merged.")
    return pairs


def _sum_of_text(carried: Sequence[Carried], strengths: Sequence[float]) -> dict[str, LowRankUpdate]:
    parts: dict[str, list[LowRankUpdate]] = {}
    for part, strength in zip(carried, strengths, strict=True):
        for key, update in part.text_encoder.items():
            parts.setdefault(key, []).append(update.scaled(strength))
    return {key: concatenate(updates) for key, updates in parts.items()}


def _sum_of_differences(carried: Sequence[Carried], strengths: Sequence[float]) -> dict[str, Tensor]:
    """Full differences by weight key, summed at their strengths."""
    total: dict[str, Tensor] = {}
    for part, strength in zip(carried, strengths, strict=True):
        for key, (kind, values) in part.patches.items():
            if kind == "diff":
                if not isinstance(key, str):
                    raise LoraError(f"A full difference of a slice ({key[0]}) cannot be carried; leave this LoRA out.")
                total[key] = total.get(key, 0) + values[0].float() * strength
    return total


def _settings(carried: Sequence[Carried]) -> dict[str, Tensor]:
    """Weights that a LoRA replaces outright; two LoRAs cannot both have their way."""
    state: dict[str, Tensor] = {}
    for part in carried:
        for key, (kind, values) in part.patches.items():
            if kind != "set":
                continue
            name = f"{key.removesuffix('.weight')}.set_weight"
            if name in state and not torch.equal(state[name], values[0]):
                raise LoraError(f"Two LoRAs replace {key} with different values; leave one of them out.")
            state[name] = values[0].clone().contiguous()
    return state


def _difference_key(weight_key: str) -> str:
    if weight_key.endswith(".bias"):
        return f"{weight_key.removesuffix('.bias')}.diff_b"
    return f"{weight_key.removesuffix('.weight')}.diff"
