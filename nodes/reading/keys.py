"""What the key of a tensor in a LoRA file says: the name of a weight, and what the tensor is to it."""

from __future__ import annotations

import re
from collections.abc import Container, Iterator

# what follows a weight's name in the keys that ComfyUI reads: comfy.lora.load_lora and comfy.weight_adapter
ADAPTER = re.compile(
    r"(?P<name>.+?)("
    r"\.lora_(up|down|mid)\.weight|\.lora_[AB](\.default)?(\.weight)?|(_lora|\.lora|\.lora_linear_layer)\.(up|down)\.weight"
    r"|\.(hada|lokr)_\w+|\.[ab][12]\.weight|\.oft_blocks|\.rescale"
    r"|\.(alpha|dora_scale|reshape_weight|diff|diff_b|w_norm|b_norm|set_weight))"
)
# how keys of a text encoder begin, in files of all trainers
TEXT_ENCODER = ("lora_te", "text_encoder", "lora_prior_te", "clip_l.", "clip_g.", "conditioner.", "te1.", "te2.")


def owner(key: str, names: Container[str]) -> str:
    """The longest leading part of `key` that is one of `names`, or nothing."""
    return next((name for name in _leading(key) if name in names), "")


def _leading(key: str) -> Iterator[str]:
    """Everything that `key` may start with as the name of a weight, longest first."""
    while key:
        yield key
        if key.endswith("_lora"):
            yield key.removesuffix("_lora")
        key = key.rpartition(".")[0]


def is_bias(key: str) -> bool:
    """Whether it changes the bias that goes with the weight it names."""
    return key.endswith((".diff_b", ".b_norm"))
