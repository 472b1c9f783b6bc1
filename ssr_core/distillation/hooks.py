"""Hooks: what is on a model for a while, and comes off whatever happens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn
from torch.utils.hooks import RemovableHandle


class Hooks(ABC):
    """Hooks that are on one model at a time."""

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []

    @abstractmethod
    def _put(self, model: nn.Module) -> Iterable[RemovableHandle]:
        """Put them on."""

    def attach(self, model: nn.Module) -> None:
        """Put the hooks on `model`, and off the one that they were on."""
        self.detach()
        self._handles.extend(self._put(model))

    def detach(self) -> None:
        """Take the hooks off; does nothing if there are none."""
        while self._handles:
            self._handles.pop().remove()

    @contextmanager
    def attached(self, model: nn.Module) -> Iterator[None]:
        """Inside, the hooks are on."""
        self.attach(model)
        try:
            yield
        finally:
            self.detach()
