"""Point: one call of a model while a case's LoRAs are active, and what it answered. What a merge is distilled at."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import SolveError
from ..measure.placed import sent
from .hooks import Hooks
from .structure import replaced, tensors_in


@dataclass(frozen=True, eq=False)
class Point:
    """A call of the model that can be made again, with another merge on it. All tensors are in host memory."""

    case: int  # whose LoRAs were active, by number
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    target: tuple[Tensor, ...]  # the tensors that it answered with

    def answer(self, network: nn.Module, device: torch.device) -> tuple[Tensor, ...]:
        """What the model answers now."""
        # copies: what was kept under inference mode takes no part in gradients, and a model may write into its inputs
        fresh = lambda tensor: sent(tensor, device, copy=True)  # noqa: E731
        return tuple(
            tensors_in(network(*replaced(self.args, Tensor, fresh), **replaced(dict(self.kwargs), Tensor, fresh)))
        )


def memory_of(points: Iterable[Point]) -> int:
    """Bytes of all their tensors; what several points share, as the steps of a prompt do, counts once."""
    every = (tensor for point in points for tensor in tensors_in((point.args, dict(point.kwargs), point.target)))
    return sum({id(tensor): tensor.nbytes for tensor in every}.values())


class PointRecorder(Hooks):
    """Keeps the calls of a model, as points of one case. Raises SolveError at an answer that is not finite."""

    def __init__(self, case: int, name: str = "its LoRAs") -> None:
        """`name`: of the case, for messages."""
        super().__init__()
        self.case, self._name = case, name
        self.points: list[Point] = []
        self._call: tuple[Any, Any] = ((), {})  # the one that is being answered
        self._kept: dict[tuple[torch.Size, torch.dtype], Tensor] = {}  # prompts are the same in all steps

    def _put(self, network: nn.Module) -> Iterable[RemovableHandle]:
        return [
            network.register_forward_pre_hook(self._before, with_kwargs=True),  # a model may write into its inputs
            network.register_forward_hook(self._after),
        ]

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._call = replaced(args, Tensor, self._on_host), replaced(kwargs, Tensor, self._on_host)

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        target = tuple(tensor.detach().to("cpu", copy=True) for tensor in tensors_in(output))
        if not all(tensor.isfinite().all() for tensor in target):
            raise SolveError(
                f"The model's answer with {self._name} is not finite, so nothing can be learnt from it. "
                "Does it make pictures with them at this precision?"
            )
        self.points.append(Point(self.case, *self._call, target))

    def _on_host(self, tensor: Tensor) -> Tensor:
        kept = tensor.detach().to("cpu", copy=True)
        last = self._kept.get((kept.shape, kept.dtype))
        if last is not None and torch.equal(last, kept):
            return last
        self._kept[kept.shape, kept.dtype] = kept
        return kept
