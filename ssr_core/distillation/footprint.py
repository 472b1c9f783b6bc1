"""Footprint: the memory of activations that the gradient at one point takes, counted before any is computed."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from ..lora.low_rank_update import LowRankUpdate
from ..lora.site import Site
from ..measure.placed import Place
from .branch import Branch
from .frozen import blocks_of, frozen
from .point import Point
from .structure import Structure, tensors_in

PASSING = 2  # gradients as large as a block's largest activation that are there at one time
JOINING = 3  # and of a layer's input: through its weight, through its factors, and the sum of both
WAITING = 2  # of a tensor that several blocks use: its gradient, and the next block's share before it is added


def footprint(
    model: nn.Module,
    network: nn.Module,
    point: Point,
    updates: Mapping[Site, LowRankUpdate],
    device: torch.device,
    only_up: bool = False,
) -> int:
    """Bytes on the device at the peak of a gradient at `point`, beside the weights and the factors that learn.

    It takes no more memory than a call of the model: what autograd would keep is counted and dropped. A block's inputs
    stay from the forward to the backward pass, and its inside is there while it is computed again.

    Args:
        model, network, updates, device: as of distil().
    """
    seen = _Seen(model, {site.module for site in updates})
    branch = Branch({site: _Copies(update, only_up) for site, update in updates.items()})
    usable = frozen(model, checkpointing=False)
    with torch.inference_mode(False), torch.enable_grad(), usable, branch.attached(model), seen.watching():
        answer = point.answer(network, device)
        torch.stack([one.float().square().sum() for one in answer])  # as the loss keeps them
    return max(seen.peak, seen.outside.total)


class _Copies:
    """Factors as layers compute with them."""

    def __init__(self, update: LowRankUpdate, only_up: bool) -> None:
        self._update, self._only_up = update, only_up

    def placed(self, where: Place) -> tuple[Tensor, Tensor]:
        down, up = (one.to(*where, copy=True) for one in (self._update.down, self._update.up))
        return down.requires_grad_(not self._only_up), up.requires_grad_()


class _Bytes:
    """Of tensors that are there at one time: the same memory counts once, unless it was overwritten in between."""

    def __init__(self) -> None:
        self._versions: WeakKeyDictionary[Any, set[int]] = WeakKeyDictionary()
        self.total = self.largest = 0

    def add(self, tensor: Tensor) -> bool:
        """Whether it was not there yet."""
        storage = tensor.untyped_storage()
        versions = self._versions.setdefault(storage, set())
        if tensor._version in versions:
            return False
        versions.add(tensor._version)
        self.total += storage.nbytes()
        self.largest = max(self.largest, storage.nbytes())
        return True

    def alive(self, without: _Bytes) -> int:
        """Bytes that somebody still refers to."""
        return sum(storage.nbytes() for storage in self._versions if storage not in without._versions)


class _Seen:
    """What autograd wants to keep of a call, block by block."""

    def __init__(self, model: nn.Module, learning: Collection[str]) -> None:
        self._blocks = blocks_of(model)
        self._learning = [module for name, module in model.named_modules() if name in learning]
        self._weights = {held.untyped_storage()._cdata for held in (*model.parameters(), *model.buffers())}
        self.outside = _Bytes()  # of blocks, and what they are given
        self._inside = _Bytes()  # of the present block
        self._answers = _Bytes()
        self._input = 0  # bytes of the largest that a layer of the present block learns with
        self._in_block = False
        self._waiting = 0  # bytes of tensors whose gradients are there when they come to the present block
        self.peak = 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        handles = [block.register_forward_pre_hook(self._enter, with_kwargs=True) for block in self._blocks]
        # before the hooks of others on the block itself, which are not computed again with it
        handles += [block.register_forward_hook(self._leave, prepend=True) for block in self._blocks]
        handles += [layer.register_forward_pre_hook(self._learn, with_kwargs=True) for layer in self._learning]
        try:
            with saved_tensors_hooks(self._save, _never):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _save(self, tensor: Tensor) -> None:
        if tensor.untyped_storage()._cdata not in self._weights:
            (self._inside if self._in_block else self.outside).add(tensor)

    def _enter(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._in_block, self._inside, self._input, self._waiting = True, _Bytes(), 0, 0
        for given in Structure.of((args, kwargs))[1]:
            if not self.outside.add(given) and given.requires_grad:  # another block was given it, too
                self._waiting += given.untyped_storage().nbytes()
            self._inside.add(given)  # it computes with a copy
        self._waiting += self._answers.alive(self._inside)  # for a later block, as of the first half of a UNet

    def _leave(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._in_block = False
        answers = list(tensors_in(output))
        for answer in answers:
            self._answers.add(answer)
        passing = max(PASSING * self._inside.largest, JOINING * self._input)
        passing += 2 * sum(one.nbytes for one in answers) + WAITING * self._waiting
        self.peak = max(self.peak, self.outside.total + self._inside.total + passing)

    def _learn(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._input = max(self._input, *(one.nbytes for one in tensors_in((args, kwargs))), 0)


def _never(_: None) -> Tensor:
    raise AssertionError("Gradients are counted here, not computed.")
