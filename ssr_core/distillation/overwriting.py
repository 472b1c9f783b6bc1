"""Models that overwrite their activations, as most do that are made for inference, with gradients nevertheless."""

from __future__ import annotations

from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from ..errors import SolveError


class _Saved:
    """A tensor that autograd saved for the backward pass."""

    __slots__ = ("__weakref__", "tensor", "version")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.version = tensor, tensor._version


class Overwriting(TorchFunctionMode):
    """Inside, a tensor that was saved for the backward pass is copied before it is written to in place.

    As torch.autograd.graph.allow_mutation_on_saved_tensors does, but it looks at the calls of torch's functions and not
    at every operation of the forward and backward pass below them, which takes a small model as long again.
    """

    def __enter__(self) -> Overwriting:
        self._by_storage: dict[int, WeakSet[_Saved]] = {}
        self._hooks = saved_tensors_hooks(self._save, _load)
        self._hooks.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._hooks.__exit__(*error)
        self._by_storage.clear()

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for written in _written(function, args, kwargs):
            for saved in self._by_storage.pop(written.untyped_storage()._cdata, ()):
                with torch.no_grad():
                    saved.tensor = saved.tensor.clone()
                saved.version = saved.tensor._version
        return function(*args, **kwargs)

    def _save(self, tensor: Tensor) -> _Saved:
        # a function may save its own answer, and a gradient that is never asked for would then keep itself alive
        saved = _Saved(tensor.detach())
        self._by_storage.setdefault(tensor.untyped_storage()._cdata, WeakSet()).add(saved)
        return saved


def _load(saved: _Saved) -> Tensor:
    if saved.tensor._version != saved.version:
        raise SolveError(
            "The model overwrites values that its gradient needs, in a way that cannot be seen, so it cannot be "
            "distilled on."
        )
    return saved.tensor


def _written(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that a call writes to."""
    name = getattr(function, "__name__", "")
    if args and ((name[-1:] == "_" and name[-2:] != "__") or name == "__setitem__" or kwargs.get("inplace")):
        return [args[0]] if isinstance(args[0], Tensor) else [one for one in args[0] if isinstance(one, Tensor)]
    out = kwargs.get("out")
    return [] if out is None else [out] if isinstance(out, Tensor) else list(out)
