"""Which module of a model a LoRA means by a name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from ..errors import ModelMismatchError
from ..lora.site import canonical
from .layer import Layer


def find_layers(model: nn.Module, names: Iterable[str]) -> dict[str, Layer]:
    """The layers of `model` that LoRAs call by these names, in dots or in kohya's underscores.

    Raises:
        ModelMismatchError: there is none of a name, or none that can be merged.
    """
    modules = dict(model.named_modules())
    known = {canonical(name): name for name in modules}
    return {name: _find(modules, known, name, model) for name in names}


def _find(modules: Mapping[str, nn.Module], known: Mapping[str, str], name: str, model: nn.Module) -> Layer:
    found = name if name in modules else known.get(canonical(name), "")
    if not found or getattr(modules[found], "weight", None) is None:
        raise ModelMismatchError(
            f"The model ({type(model).__name__}) has no layer {name!r}. Was the LoRA trained for another model, "
            "or do its keys carry a prefix that the model's module names lack?"
        )
    return Layer(modules[found], found)
