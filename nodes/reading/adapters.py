"""ComfyUI's adapters as low-rank updates: some are, some are expanded, some first need the weight of the base.

What an adapter of each kind means is defined by comfy.weight_adapter and LyCORIS (Yeh et al., ICLR 2024).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import comfy.lora
import comfy.weight_adapter as adapters
import torch
from torch import Tensor

from ...ssr_core import Expansion, LoraError, LowRankUpdate, ModelMismatchError, hadamard, kronecker, nearest

# what a part that is missing, misshapen or empty makes the arithmetic of adapters raise
_DAMAGE = (AttributeError, TypeError, IndexError, RuntimeError, UnboundLocalError, ArithmeticError)
LARGEST = 2**31  # values of the largest weight there may be, where it is not known: embeddings have 2**30

Rows = Callable[[Tensor], Tensor]  # a permutation of output rows, such as swapped scale and shift


def kind(patch: Any) -> str:
    """What the field calls this kind of adapter."""
    if isinstance(patch, tuple):
        return "full difference"
    if _dora_scale(patch) is not None:
        return "DoRA"
    names = {"lora": "LoRA", "loha": "LoHa", "lokr": "LoKr", "glora": "GLoRA", "oft": "OFT", "boft": "BOFT"}
    return names.get(patch.name, patch.name)


def needs_base(patch: Any) -> bool:
    """Whether the update depends on the weight that it changes."""
    if isinstance(patch, tuple):
        return False
    linear = (adapters.LoRAAdapter, adapters.LoHaAdapter, adapters.LoKrAdapter)
    return not isinstance(patch, linear) or _dora_scale(patch) is not None


@dataclass(frozen=True)
class Target:
    """The weight, or the slice of one, that a patch changes."""

    shape: tuple[int, ...]  # () if it is not known
    rows: Rows | None  # a permutation of its output rows that the patch is subject to
    base: Callable[[], Tensor]  # gives the weight, for adapters that depend on it
    strength: float  # at which the LoRA is used: OFT and BOFT are not proportional to it
    device: torch.device  # where expansions are computed; results are on the CPU
    where: str  # how errors call it


def low_rank(patch: Any, target: Target, rank: int) -> Expansion:
    """A patch of ComfyUI's, an adapter or ("diff", (tensor,)), as a low-rank update; exact where its rank is small.

    Raises:
        LoraError: damaged, or of a kind that cannot be merged.
        ModelMismatchError: of another size than the weight.
    """
    check_size(patch, target.shape, target.where)
    if not isinstance(patch, tuple) and not needs_base(patch):
        try:
            found = _factors(patch, rank, target)
        except _DAMAGE as error:
            raise LoraError(f"{target.where}: its {kind(patch)} is incomplete or damaged ({error}).") from error
        if found is not None:
            up = found.update.up if target.rows is None else target.rows(found.update.up)
            return _expansion(LowRankUpdate(found.update.down, up), found.kept, target.where)
    try:
        found = nearest(dense(patch, target), rank)
    except torch.linalg.LinAlgError as error:
        raise LoraError(f"{target.where} has values too large to compute with; the file is damaged.") from error
    return _expansion(found.update, found.kept, target.where)


def _expansion(update: LowRankUpdate, kept: float, where: str) -> Expansion:
    """On the CPU, and finite."""
    return Expansion(LowRankUpdate(_finite(update.down, where).cpu(), _finite(update.up, where).cpu()), kept)


def check_size(patch: Any, shape: tuple[int, ...], where: str) -> None:
    """Raise before anything is computed that would be larger than the weight: small factors can stand for terabytes.

    Args:
        shape: of the weight; () if it is not known.

    Raises:
        ModelMismatchError: of another size than the weight, or, where that is not known, than any weight.
    """
    if isinstance(patch, tuple):
        if shape and tuple(patch[1][0].shape) != shape:
            raise ModelMismatchError(
                f"{where}: a full difference of shape {tuple(patch[1][0].shape)} does not fit this model's "
                f"{shape}; it was trained for another variant of the base."
            )
        return
    if isinstance(patch, adapters.LoRAAdapter) and patch.weights[5] is not None:
        return  # it reshapes the weight
    try:
        out, inputs = _size(patch)
    except (AttributeError, TypeError, IndexError):
        return  # a part is missing, which is said where it is needed
    wanted = (shape[0], torch.Size(shape[1:]).numel()) if shape else ()
    fits = out * inputs <= LARGEST if not wanted else (out, inputs) == wanted
    if isinstance(patch, adapters.GLoRAAdapter):  # in two orders of factors; here only what is too large
        fits = not wanted or max(out, inputs) <= max(wanted)
    if not fits:
        raise ModelMismatchError(
            f"{where}: its {kind(patch)} is of {out} outputs and {inputs} inputs, but this model's layer "
            f"{f'has {wanted[0]} and {wanted[1]}' if wanted else 'cannot be that large'}; "
            "it was trained for another variant of the base."
        )


def _size(adapter: Any) -> tuple[int, int]:
    """Rows and columns of the update, kernels flattened, from the shapes of its factors. OFT's fit or raise."""
    if isinstance(adapter, adapters.LoRAAdapter):
        up, down, _, mid = adapter.weights[:4]
        return up.shape[0], _width(down) * (1 if mid is None else _kernel(mid))
    if isinstance(adapter, adapters.LoHaAdapter):
        up, down, _, _, _, tucker = adapter.weights[:6]
        return (up.shape[0], _width(down)) if tucker is None else (up.shape[1], _width(down) * _kernel(tucker))
    if isinstance(adapter, adapters.LoKrAdapter):
        left, right, _, left_up, left_down, right_up, right_down, tucker = adapter.weights[:8]
        a, b = (left_up.shape[0], _width(left_down)) if left is None else (left.shape[0], _width(left))
        if right is not None:
            return a * right.shape[0], b * _width(right)
        if tucker is None:
            return a * right_up.shape[0], b * _width(right_down)
        return a * right_up.shape[1], b * _width(right_down) * _kernel(tucker)
    if isinstance(adapter, adapters.GLoRAAdapter):
        sides = [side for factor in adapter.weights[:4] for side in (factor.shape[0], _width(factor))]
        return max(sides), max(sides)
    raise TypeError


def _width(factor: Tensor) -> int:
    return factor[0].numel()


def _kernel(tucker: Tensor) -> int:
    return torch.Size(tucker.shape[2:]).numel()


def dense(patch: Any, target: Target) -> Tensor:
    """The weight difference (out, in, *kernel) that a patch stands for at strength 1, float32.

    Of OFT and BOFT, what they do at the target's strength, divided by it.
    """
    where, rows = target.where, target.rows
    if isinstance(patch, tuple):
        check_size(patch, target.shape, where)
        difference = patch[1][0].to(target.device, torch.float32)
        return _finite(difference if rows is None else rows(difference), where)
    weight = target.base() if needs_base(patch) else torch.zeros(target.shape, device=target.device)
    strength = target.strength if kind(patch) in ("OFT", "BOFT") and target.strength else 1.0
    with _errors() as errors:
        try:
            changed = comfy.lora.calculate_weight([(strength, patch, 1.0, None, rows)], weight.clone(), where)
        except _DAMAGE as error:
            raise LoraError(f"{where}: its {kind(patch)} is incomplete or damaged ({error}).") from error
    if errors:
        raise ModelMismatchError(
            f"{where}: its {kind(patch)} does not fit a weight of shape {target.shape} ({errors[0]})."
        )
    return _finite((changed - weight) / strength, where)


def _factors(adapter: Any, rank: int, target: Target) -> Expansion | None:
    """From the adapter's own factors alone; None where these say nothing about the rank."""
    where = target.where
    if isinstance(adapter, adapters.LoRAAdapter):
        up, down, alpha, mid, _, reshape = adapter.weights
        if reshape is not None:
            raise LoraError(f"{where} reshapes the weight of the base; such a LoRA cannot be merged.")
        return Expansion(LowRankUpdate.from_factors(down, up, alpha, mid, where))
    weights: list[Any] = [value.to(target.device) if isinstance(value, Tensor) else value for value in adapter.weights]
    if isinstance(adapter, adapters.LoHaAdapter):
        up1, down1, alpha, up2, down2, tucker1, tucker2, _ = weights
        if tucker1 is not None or tucker2 is not None:
            return None
        found = hadamard((up1, down1), (up2, down2), rank)
        return _scaled(found, 1.0 if alpha is None else alpha / down1.shape[0])
    left, right, alpha, left_up, left_down, right_up, right_down, tucker, _ = weights
    if tucker is not None and right is None:
        right = torch.einsum("ijkl,jr,ip->prkl", tucker.float(), right_down.float(), right_up.float())
    inner = right_down if right_down is not None and weights[1] is None else left_down if left is None else None
    left = left_up.float() @ left_down.float() if left is None else left
    right = right_up.float() @ right_down.float() if right is None else right
    found = kronecker(left, right, rank)
    return _scaled(found, 1.0 if alpha is None or inner is None else alpha / inner.shape[0])


def _scaled(found: Expansion, scale: float) -> Expansion:
    return Expansion(found.update.scaled(scale), found.kept)


def _finite(values: Tensor, where: str) -> Tensor:
    if not torch.isfinite(values.float()).all():
        raise LoraError(f"{where} contains NaN or infinite values; the file is damaged or its training diverged.")
    return values


def _dora_scale(adapter: Any) -> Tensor | None:
    """LyCORIS keeps it last, but for LoRA's reshape."""
    last: Tensor | None = adapter.weights[-2 if isinstance(adapter, adapters.LoRAAdapter) else -1]
    return last


@contextmanager
def _errors() -> Iterator[list[str]]:
    """What ComfyUI logs as errors: an adapter that does not fit a weight is logged and passed over."""
    found: list[str] = []
    handler = logging.Handler(logging.ERROR)
    here = threading.get_ident()
    handler.addFilter(lambda record: record.thread == here)
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger().addHandler(handler)
    try:
        yield found
    finally:
        logging.getLogger().removeHandler(handler)
