"""FakeCuda: code run on tensors of a device "cuda" that is not there, with its waits, copies and launches counted."""

from __future__ import annotations

import traceback
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ssr_core.measure.layer import _can_write_wide

aten = torch.ops.aten
READ = {aten._local_scalar_dense.default: 1, aten.equal.default: False, aten.is_nonzero.default: True}
COPIES = (aten._to_copy.default, aten.copy_.default)
CORE = Path(__file__).parents[2] / "ssr_core"


class FakeCuda(TorchDispatchMode):
    """Counts what reaches the device. Mixed devices raise, as they do on a real one.

    On the CPU all is real. What code reads of the device is the same whatever would be there: numbers are 1, and a
    comparison says that two tensors differ.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()  # of the host for the device, by the line that caused them
        self.launches = 0
        self.sent = 0  # bytes to the device
        self.live = self.peak = 0  # bytes on the device
        self._known: Any = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        there = any(one.device.type == "cuda" for one in given)
        if not there and not any(isinstance(one, FakeTensor) for one in given) and not _is_on_device(kwargs):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if func in READ:
            if there:
                self.waits[_line()] += 1
            return READ[func]
        results = func(*args, **kwargs)
        made = [one for one in tree_leaves(results) if isinstance(one, Tensor)]
        if func is aten._to_copy.default and there and made[0].device.type == "cpu":
            self.waits[_line()] += 1
            with unset_fake_temporarily():
                return torch.ones(made[0].shape, dtype=made[0].dtype)
        arrives = any(one.device.type == "cuda" for one in made)
        if func in COPIES and len({one.device.type for one in (*given, *made)}) > 1:
            self._sent(
                made[0], bool(kwargs.get("non_blocking") or (func is aten.copy_.default and args[2:] == (True,)))
            )
        elif (there or arrives) and not func.is_view and func.namespace == "aten":
            self.launches += 1
        for one in made:
            if one.device.type == "cuda" and one.untyped_storage() not in self._known:
                self._allocated(one.untyped_storage())
        return results

    def reset(self) -> None:
        """Count from here; what is live stays live."""
        self.waits.clear()
        self.launches = self.sent = 0
        self.peak = self.live

    def _sent(self, tensor: Tensor, unhurried: bool) -> None:
        self.sent += tensor.nbytes
        if not unhurried:
            self.waits[_line()] += 1

    def _allocated(self, storage: Any) -> None:
        self._known[storage] = None
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._freed, storage.nbytes())

    def _freed(self, size: int) -> None:
        self.live -= size


@contextmanager
def fake_cuda() -> Iterator[FakeCuda]:
    """Inside, there is a device "cuda"."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # modes are per thread
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), FakeCuda() as seen:
            yield seen
    finally:
        torch.set_num_threads(threads)
        _can_write_wide.cache_clear()  # of a device that is not there


def on_device(make: Callable[[], nn.Module], dtype: torch.dtype) -> nn.Module:
    """A model made on the device, its weights in `dtype`."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("cuda"):
            return make()
    finally:
        torch.set_default_dtype(default)


def _is_on_device(kwargs: dict) -> bool:
    """Whether something is made there, or goes there."""
    return kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda"


def _line() -> str:
    """The innermost line of ssr_core."""
    for frame in reversed(traceback.extract_stack()):
        if CORE in Path(frame.filename).parents:
            return f"{Path(frame.filename).name}: {frame.line}"
    return "elsewhere"
