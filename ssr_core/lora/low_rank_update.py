"""LowRankUpdate: one weight update delta W = up @ down, with every scale folded in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import LoraError

KERNEL = 4096  # the most values that a kernel of a convolution has, per input and output


@dataclass(frozen=True, eq=False)
class LowRankUpdate:
    """delta W = up @ down; `down` is flattened over the input and kernel axes for the product.

    The field calls the factors A and B, but PEFT and ComfyUI disagree on which is which; here names say what they do.
    """

    down: Tensor  # (rank, in, *kernel)
    up: Tensor  # (out, rank)

    @classmethod
    def from_factors(
        cls, down: Tensor, up: Tensor, alpha: float | None = None, mid: Tensor | None = None, name: str = "LoRA"
    ) -> LowRankUpdate:
        """Fold the factors of a LoRA file into an update: `alpha / rank` goes into `up`, a Tucker `mid` into `down`.

        Args:
            down: (rank, in) or (rank, in, *kernel); (rank, in, 1, 1) next to a `mid`.
            up: (out, rank), or with trailing axes of length 1.
            alpha: the file's alpha; None means alpha = rank.
            mid: (rank, rank, *kernel), LoCon's Tucker core (LyCORIS, `lora_mid`).
            name: how errors call this pair.

        Raises:
            LoraError: rank 0, shapes that do not multiply, or values that are not finite.
        """
        shapes = f"down {tuple(down.shape)}, up {tuple(up.shape)}"
        if down.ndim < 2 or up.ndim < 2 or 0 in (up.shape[0], *down.shape[1:]):
            raise LoraError(f"{name}: {shapes} are not the factors of a LoRA; is the file damaged?")
        if down.shape[0] == 0:
            raise LoraError(f"{name}: its rank is 0 ({shapes}); remove this pair from the file.")
        if up.numel() != up.shape[0] * up.shape[1]:
            raise LoraError(f"{name}: {shapes} are not the factors of a LoRA; is the file damaged?")
        # as ComfyUI takes whole numbers
        down, up = (factor if factor.is_floating_point() else factor.float() for factor in (down, up))
        # ComfyUI divides by the rank of the file's `down`, also next to a Tucker core
        scale = 1.0 if alpha is None else alpha / down.shape[0]
        if mid is not None:
            down = _fold_tucker(down, mid, name)
        up = up.flatten(start_dim=1)
        if up.shape[1] != down.shape[0]:
            raise LoraError(f"{name}: {shapes} differ in rank; one half of the pair belongs to another LoRA.")
        # a power of two (alpha / rank mostly is one) leaves bfloat16 exact, and the update half the size; float16 is
        # not so wide that it would
        exact = up.dtype == torch.bfloat16 and abs(math.frexp(scale)[0]) == 0.5 and 2**-8 <= abs(scale) <= 2**8
        update = cls(down, up if scale == 1.0 else up * scale if exact else up.float() * scale)
        if not update.is_finite():
            raise LoraError(f"{name} contains NaN or infinite values; the file is damaged or its training diverged.")
        return update

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def out_features(self) -> int:
        return self.up.shape[0]

    @property
    def in_shape(self) -> tuple[int, ...]:
        """(in,) for a linear layer, (in, *kernel) for a convolution."""
        return tuple(self.down.shape[1:])

    def is_finite(self) -> bool:
        # .float(): isfinite is not there for 8-bit floats
        return bool(torch.isfinite(self.down.float()).all() and torch.isfinite(self.up.float()).all())

    def dense(self) -> Tensor:
        """The update as a weight, (out, in, *kernel), float32. For tests and small layers."""
        return (self.up.float() @ self.down.float().flatten(1)).reshape(self.out_features, *self.in_shape)

    def squared_norm(self) -> float:
        """Of the dense update, which is not formed."""
        up, down = self.up.float(), self.down.float().flatten(1)
        return float(((up.mT @ up) * (down @ down.mT)).sum())

    def scaled(self, strength: float) -> LowRankUpdate:
        return self if strength == 1.0 else replace(self, up=self.up.float() * strength)

    def with_in_shape(self, in_shape: Sequence[int], name: str = "LoRA") -> LowRankUpdate:
        """The same update laid out for a weight (out, *in_shape); files store 1x1 convolutions both ways."""
        if self.in_shape == tuple(in_shape):
            return self
        if self.down[0].numel() != torch.Size(in_shape).numel():
            raise LoraError(f"{name} has inputs {self.in_shape}, the model's layer has {tuple(in_shape)}.")
        return replace(self, down=self.down.reshape(self.rank, *in_shape))

    def slice_rows(self, start: int, stop: int) -> LowRankUpdate:
        """The rows start..stop of the update; `down` stays the same tensor, so that slices can share its projection."""
        return self if (start, stop) == (0, self.out_features) else replace(self, up=self.up[start:stop])

    def embed_rows(self, start: int, total: int) -> LowRankUpdate:
        """The update as rows start.. of a weight with `total` rows, zero elsewhere."""
        if start == 0 and total == self.out_features:
            return self
        up = self.up.new_zeros(total, self.rank)
        up[start : start + self.out_features] = self.up
        return replace(self, up=up)

    def balanced(self) -> LowRankUpdate:
        """The same update with row i of `down` and column i of `up` of equal norm: half precision keeps it best."""
        down_norm = self.down.flatten(1).norm(dim=1)
        up_norm = self.up.norm(dim=0)
        silent = (down_norm == 0) | (up_norm == 0)
        scale = torch.where(silent, torch.ones_like(up_norm), (up_norm / down_norm.clamp_min(1e-30)).sqrt())
        shape = (-1,) + (1,) * (self.down.ndim - 1)
        return LowRankUpdate(self.down * scale.reshape(shape), self.up / scale)


def concatenate(updates: Sequence[LowRankUpdate]) -> LowRankUpdate:
    """The sum of updates of one layer as one update, exact: factors are joined along the rank."""
    if len(updates) == 1:
        return updates[0]
    in_shape = updates[0].in_shape
    downs = [update.with_in_shape(in_shape).down for update in updates]
    return LowRankUpdate(_joined(downs, dim=0), _joined([update.up for update in updates], dim=1))


def _joined(factors: Sequence[Tensor], dim: int) -> Tensor:
    """In the precision of files where they agree on one, else in float32."""
    (dtype, *others) = {factor.dtype for factor in factors}
    keep = not others and dtype in (torch.bfloat16, torch.float16)
    return torch.cat([factor if keep else factor.float() for factor in factors], dim)


def _fold_tucker(down: Tensor, mid: Tensor, name: str) -> Tensor:
    """down'[p, i, *k] = sum_q mid[p, q, *k] down[q, i], as comfy.weight_adapter.lora rebuilds it."""
    fits = mid.ndim >= 3 and mid.shape[1] == down.shape[0] and down[0].numel() == down.shape[1]
    # small factors must not make a layer that no memory holds
    if not fits or torch.Size(mid.shape[2:]).numel() > KERNEL:
        raise LoraError(f"{name}: a Tucker core {tuple(mid.shape)} does not fit its down factor {tuple(down.shape)}.")
    return torch.einsum("pq...,qi->pi...", mid.float(), down.float().flatten(1))
