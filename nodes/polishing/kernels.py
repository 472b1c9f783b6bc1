"""Kernels that have a gradient, in place of ComfyUI's faster ones that have none."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import comfy.quant_ops

EAGER = ("rope", "adaln")  # modules of its backend that is written in torch's own functions


@contextmanager
def with_gradient() -> Iterator[None]:
    """Inside, models that call ComfyUI's kernels get the same in torch's own functions.

    Some models choose those by themselves where ComfyUI says that it is in training, and some do not.
    """
    library, plain = _plain()
    known = {name: getattr(library, name) for name in plain}
    for name, function in plain.items():
        setattr(library, name, function)
    try:
        yield
    finally:
        for name, function in known.items():
            setattr(library, name, function)


def _plain() -> tuple[ModuleType | None, dict[str, object]]:
    """The library, and by name what can stand in for its functions; none if this ComfyUI has no such library."""
    library = getattr(comfy.quant_ops, "ck", None)
    if library is None:
        return None, {}
    found: dict[str, object] = {}
    for part in EAGER:
        module = sys.modules.get(f"{library.__name__}.backends.eager.{part}")
        plain = {} if module is None else vars(module)
        names = (name for name in plain if not name.startswith("_"))
        found |= {name: plain[name] for name in names if callable(getattr(library, name, None))}
    return library, found
