"""Caches: what a model remembers of earlier calls, such as the keys and values of a prompt."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

CLEAR = "clear_kv_cache"  # what ComfyUI's classes that remember something between samplings have

State = list[dict[str, Any]]


class Caches:
    """The caches of a model's modules, kept apart for whoever runs it. Of most models there are none.

    They are found by the method that clears them; what it may clear is any attribute of its module.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = [module for module in model.modules() if callable(getattr(module, CLEAR, None))]
        self._states: dict[str, State] = {}

    @contextmanager
    def of(self, owner: str) -> Iterator[None]:
        """Inside, the model remembers only what it saw inside `of` the same owner; afterwards what it did before."""
        before = self._state()
        if owner in self._states:
            self._restore(self._states[owner])
        else:
            self.clear()
        try:
            yield
        finally:
            self._states[owner] = self._state()
            self._restore(before)

    def clear(self) -> None:
        """Forget what is remembered now."""
        for module in self._modules:
            getattr(module, CLEAR)()

    def _state(self) -> State:
        return [{name: value for name, value in vars(one).items() if name not in _PYTORCH} for one in self._modules]

    def _restore(self, state: State) -> None:
        for module, values in zip(self._modules, state, strict=True):
            vars(module).update(values)


_PYTORCH = frozenset(vars(nn.Module()))  # parameters, modules, hooks: not a model's memory
