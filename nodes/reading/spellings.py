"""Spellings that ComfyUI does not know: read where they can mean one thing only, else named with what converts them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from torch import Tensor

from .keys import ADAPTER, TEXT_ENCODER, owner

# what files begin with, and what ComfyUI knows the same names by
_UNKNOWN = ("base_model.model.", "base_model.", "lora_transformer_", "model.", "")
_KNOWN = ("diffusion_model.", "transformer.", "lora_unet_", "lycoris_", "unet.", "")
_ADAPTER_NAME = re.compile(r"(?P<half>\.lora_[AB])\.(?P<name>\w+)\.weight$")  # that PEFT gave one of several adapters

_CAUSES = (  # what keys look like, and what that means
    (
        re.compile(r"^(model\.diffusion_model|first_stage_model|cond_stage_model|conditioner\.embedders)\."),
        "It is a checkpoint, the weights of a whole model: choose it in Load Checkpoint.",
    ),
    (
        re.compile(r"^(emb_params|string_to_param|string_to_token|clip_[lgh]|t5xxl)$"),
        "It is an embedding (textual inversion): put it into models/embeddings and name it in a prompt.",
    ),
    (
        re.compile(r"^oft_unet_|\.oft_(diag|R|r)(\.|$)"),
        "It is an OFT in the spelling of kohya's or PEFT's trainers, which Load LoRA does not read either; of OFTs it "
        "reads those of LyCORIS (oft_blocks). Make a LoRA of it with the tool that trained it, or leave it out.",
    ),
    (
        re.compile(r"\.ia3_|\.on_input$"),
        "It is an IA3, which Load LoRA does not read either. Leave it out.",
    ),
    (
        re.compile(r"processor\.\w*lora\w*\."),
        "It is in XLabs' spelling, which Load LoRA does not read either. diffusers does: load it there with "
        "load_lora_weights and save it with save_lora_weights.",
    ),
)


def respelled(tensors: Mapping[str, Tensor], names: Mapping[str, object]) -> tuple[dict[str, Tensor], str]:
    """The same tensors in a spelling that is known, and in words what was changed; as they are where all is well.

    Args:
        names: ComfyUI's key map.
    """
    own = {key for key in tensors if not key.startswith(TEXT_ENCODER)}
    if not own or any(_is_known(key, names) for key in own):
        return dict(tensors), ""
    found: dict[tuple[str, ...], tuple[dict[str, Tensor], str]] = {}
    for change, told in _changes(own):
        renamed = {change(key) if key in own else key: value for key, value in tensors.items()}
        ours = [key for key in renamed if not key.startswith(TEXT_ENCODER)]
        if len(renamed) == len(tensors) and all(_is_known(key, names) for key in ours):
            meaning = tuple(str(names[owner(key, names)]) for key in ours)
            found.setdefault(meaning, (renamed, told))
    return next(iter(found.values())) if len(found) == 1 else (dict(tensors), "")


def cause(tensors: Mapping[str, Tensor]) -> str:
    """Why none of the tensors names anything, with a remedy."""
    for pattern, said in _CAUSES:
        if any(pattern.search(key) for key in tensors):
            return said
    if not any(ADAPTER.fullmatch(key) or re.search(r"lora|hada|lokr|oft", key) for key in tensors):
        return (
            "None of them is called like a part of a LoRA (lora_A, lora_up, hada_w1_a, ...): is it a checkpoint, or of "
            "another kind?"
        )
    return "Was it trained for another base?"


def _is_known(key: str, names: Mapping[str, object]) -> bool:
    return bool(owner(key, names)) and ADAPTER.fullmatch(key) is not None


def _changes(keys: set[str]) -> Iterator[tuple[_Change, str]]:
    adapters = {match["name"] for key in keys if (match := _ADAPTER_NAME.search(key))}
    name = adapters.pop() if len(adapters) == 1 else ""
    for old in (prefix for prefix in _UNKNOWN if all(key.startswith(prefix) for key in keys)):
        for new in _KNOWN:
            parts = [f"{old or 'no prefix'} as {new or 'none'}"] * (old != new)
            parts += [f"the adapter name {name} as none"] * bool(name)
            yield _Change(old, new, name), " and ".join(parts)


class _Change:
    """Another prefix, and no name of an adapter."""

    def __init__(self, old: str, new: str, name: str) -> None:
        self._old, self._new, self._name = old, new, name

    def __call__(self, key: str) -> str:
        key = self._new + key.removeprefix(self._old)
        return _ADAPTER_NAME.sub(r"\g<half>.weight", key) if self._name else key
