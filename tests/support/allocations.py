"""Allocations: the memory of all tensors that come into being while something runs, counted on any device."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocations(TorchDispatchMode):
    """Counts the memory of the tensors that come into being. It does not see into ComfyUI's QuantizedTensor."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []
        self.live = self.peak = 0
        self._known: Any = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        for given in tree_leaves((args, kwargs)):
            if isinstance(given, Tensor):
                self._known.setdefault(given.untyped_storage(), None)
        results = func(*args, **(kwargs or {}))
        for result in tree_leaves(results):
            if isinstance(result, Tensor) and result.untyped_storage() not in self._known:
                self._count(result.untyped_storage())
        return results

    def _count(self, storage: Any) -> None:
        self._known[storage] = None
        self.sizes.append(storage.nbytes())
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, storage.nbytes())

    def _free(self, size: int) -> None:
        self.live -= size

    def count_from(self, size: int) -> int:
        return sum(one >= size for one in self.sizes)


def allocations(run: Callable[[], Any]) -> Allocations:
    """Of what runs on one core: a mode of dispatch sees the thread that set it, none that share its work."""
    cores = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with Allocations() as seen:
            run()
    finally:
        torch.set_num_threads(cores)
    return seen
