"""Structure: what a model or a block is given or answers, and the tensors in it, wherever they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Structure:
    """Without the tensors: it lives as long as the graph, they need not."""

    value: Any

    @classmethod
    def of(cls, value: Any) -> tuple[Structure, tuple[Tensor, ...]]:
        """The structure, and the tensors that were in it."""
        found: list[Tensor] = []

        def emptied(tensor: Tensor) -> _Slot:
            found.append(tensor)
            return _Slot(len(found) - 1)

        return cls(replaced(value, Tensor, emptied)), tuple(found)

    def filled(self, tensors: Sequence[Tensor]) -> Any:
        return replaced(self.value, _Slot, lambda slot: tensors[slot.number])


@dataclass(frozen=True)
class _Slot:
    number: int


def replaced(value: Any, kind: type, function: Callable[[Any], Any]) -> Any:
    """The same with all that is of a kind replaced.

    Containers are copied, as models write into those that they are given.
    """
    if isinstance(value, kind):
        return function(value)
    if isinstance(value, tuple):
        parts = [replaced(one, kind, function) for one in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if type(value) is list:
        return [replaced(one, kind, function) for one in value]
    if type(value) is dict:
        return {key: replaced(one, kind, function) for key, one in value.items()}
    held = dict(_attributes(value))
    if not any(isinstance(one, kind) for one in held.values()):
        return value
    same = copy(value)
    for name, one in held.items():
        object.__setattr__(same, name, replaced(one, kind, function))
    return same


def _attributes(value: Any) -> Iterator[tuple[str, Any]]:
    """Of a small object of a model's own, such as the scale and shift of a modulation."""
    if isinstance(value, nn.Module | type) or callable(value):
        return
    yield from getattr(value, "__dict__", {}).items()
    for base in type(value).__mro__:
        for name in base.__dict__.get("__slots__", ()):
            if hasattr(value, name):
                yield name, getattr(value, name)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors, in order."""
    yield from Structure.of(value)[1]
