"""Which module of a model a LoRA means by a name."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from ..errors import ModelMismatchError
from ..lora.site import canonical
from .layer import Layer


def find_layer(modules: Mapping[str, nn.Module], known: Mapping[str, str], name: str, model: nn.Module) -> Layer:
    """The layer that LoRAs call `name`, in dots or in kohya's underscores."""
    found = name if name in modules else known.get(canonical(name), "")
    if not found or getattr(modules[found], "weight", None) is None:
        raise ModelMismatchError(
            f"The model ({type(model).__name__}) has no layer {name!r}. Was the LoRA trained for another model, "
            "or do its keys carry a prefix that the model's module names lack?"
        )
    return Layer(modules[found], found)
