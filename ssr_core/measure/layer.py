"""How a layer turns inputs into tokens: linear layers and convolutions of 1 to 3 dimensions, in bounded pieces."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import ModelMismatchError
from .placed import Placed, PlacedUp, sent

CHUNK_BYTES = 64 * 2**20  # of float32 input that exist at one time
WIDENED = ("cpu", "mps")  # where half precision is computed in float32: they have no fast product with a wide result

_LINEAR, _CONVOLUTION = ("in_features", "out_features"), ("kernel_size", "stride", "padding", "dilation")
_CONV = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}


@dataclass(frozen=True)
class Layer:
    """A linear or convolution module, read by its weight's shape: quantized layers are no nn.Linear."""

    module: Any  # an nn.Module with a weight; Any because hosts wrap linear layers in classes of their own
    name: str

    def __post_init__(self) -> None:
        if len(self.weight_shape) not in (2, *_CONV):
            raise ModelMismatchError(
                f"{self.name} has a weight of shape {self.weight_shape}; it is no linear or conv layer."
            )
        if self.weight_shape[2:] and getattr(self.module, "groups", 1) != 1:
            raise ModelMismatchError(f"{self.name} is a grouped convolution, which cannot be merged by routing.")
        if getattr(self.module, "transposed", False):
            raise ModelMismatchError(f"{self.name} is a transposed convolution, which cannot be merged by routing.")
        if not multiplies(self.module):
            raise ModelMismatchError(
                f"{self.name} is a {type(self.module).__name__}, of which nobody knows that it multiplies its input "
                "with its weight: it has neither in_features nor kernel_size, as linear and conv layers have. Leave "
                "its updates out, or sum them."
            )

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """(out, in) or (out, in, *kernel)"""
        return tuple(self.module.weight.shape)

    @property
    def is_conv(self) -> bool:
        return len(self.weight_shape) > 2

    def place(self, down: Tensor, where: tuple[torch.device, torch.dtype]) -> Placed:
        """A `down` in this layer's own layout, ready for `project`."""
        device, dtype = where
        down = down.reshape(-1, *self.weight_shape[1:])
        near = down.to(dtype)
        if is_exact(down, dtype):
            return Placed(sent(near, device), len(down))
        # statistics are to be of `down` itself: what rounding takes from it is a second set of rows
        return Placed(sent(torch.cat([near, (down.float() - near.float()).to(dtype)]), device), len(down))

    def project(self, x: Tensor, placed: Placed, wide: bool = True) -> Tensor:
        """z = down x for every token: (tokens, R), at least float32. Convolutions have tokens at output positions.

        `wide` False leaves it in the precision of x where nothing would be lost but a conversion.
        """
        if not wide and not self.is_conv and len(placed.down) == placed.rank:
            return x @ placed.down.mT
        z = self._convolved(x, placed.down) if self.is_conv else _wide_product(x, placed.down.mT)
        return z if len(placed.down) == placed.rank else z[:, : placed.rank] + z[:, placed.rank :]

    def project_some(self, x: Tensor, placed: Placed, chosen: Tensor, dtype: torch.dtype) -> Tensor:
        """`project` for the tokens with these indices only, computed in `dtype`."""
        if not self.is_conv:
            return self.project(x.reshape(-1, x.shape[-1]).index_select(0, chosen).to(dtype), placed)
        pieces = (self.project(piece.to(dtype), placed) for piece in self._images(x))
        return torch.cat(list(pieces)).index_select(0, chosen)

    def pieces(self, x: Tensor, output: Tensor, rank: int, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
        """Pieces of x in `dtype`, with the view of `output` (..., out) that holds the same tokens.

        Neither a piece that had to be converted nor its signal of `rank` rows takes more than CHUNK_BYTES in float32;
        only images of a convolution are not divided.
        """
        if self.is_conv:
            written = self._batched(output).movedim(1, -1)
            images = self._images(x)
            for piece, there in zip(images, written.split([len(image) for image in images]), strict=True):
                yield piece.to(dtype), there
            return
        tokens, written = x.reshape(-1, x.shape[-1]), output.view(-1, output.shape[-1])
        widest = max(x.shape[-1] if x.dtype != dtype else 0, 2 * rank)  # the signal may be summed in float64
        size = max(1, CHUNK_BYTES // (4 * widest))
        for piece, there in zip(tokens.split(size), written.split(size), strict=True):
            yield piece.to(dtype), there

    def positions(self, output: Tensor) -> int:
        """How many tokens an output holds."""
        return output.numel() // self.weight_shape[0]

    def outputs(self, output: Tensor) -> Tensor:
        """(tokens, out)"""
        if self.is_conv:
            output = self._batched(output).movedim(1, -1)
        return output.reshape(-1, output.shape[-1])

    def samples(self, x: Tensor) -> int:
        """The size of the batch: each of its entries is one image at one step."""
        return len(x) if x.ndim >= len(self.weight_shape) else 1

    def inputs(self, x: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
        """Pieces of x, (tokens, in), in `dtype`; of a convolution, what it sees at each input position."""
        if self.is_conv:
            yield from (image.to(dtype).movedim(1, -1).flatten(0, -2) for image in self._images(x))
            return
        tokens = x.reshape(-1, x.shape[-1])
        size = len(tokens) if x.dtype == dtype else CHUNK_BYTES // (4 * x.shape[-1])
        yield from (piece.to(dtype) for piece in tokens.split(max(1, size)))

    def seen(self, x: Tensor, chosen: Tensor | None) -> Iterator[Tensor]:
        """`inputs` at least in float32, for a linear layer those of the tokens with these indices."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        if chosen is not None and not self.is_conv:
            x = x.reshape(-1, x.shape[-1]).index_select(0, chosen)
        return self.inputs(x, dtype)

    def writable(self, x: Tensor, output: Tensor) -> Tensor:
        """`output` itself if nobody else can hold it, else a copy: an update is added to it in place."""
        alone = len(self.module._forward_hooks) == 1  # a hook of somebody else may have kept it
        fresh = output.is_contiguous() and output.untyped_storage()._cdata != x.untyped_storage()._cdata
        plain = not output.requires_grad and output.is_inference() <= torch.is_inference_mode_enabled()
        return output if alone and fresh and plain else output.clone(memory_format=torch.contiguous_format)

    def low_rank(self, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        """up down x in the shape of the layer's output, all at once; gradients pass.

        Args:
            down: (r, in, *kernel) in the layout of the weight.
            up: (out, r)
        """
        if not self.is_conv:
            return F.linear(F.linear(x, down.flatten(1)), up)
        down = down.reshape(-1, *self.weight_shape[1:])
        images = self._convolve(self._batched(x), down)
        output = _CONV[down.ndim](images, up.reshape(*up.shape, *(1,) * (down.ndim - 2)))
        return output if x.ndim == down.ndim else output[0]

    def _convolved(self, x: Tensor, down: Tensor) -> Tensor:
        z = self._convolve(x, down).movedim(1, -1).flatten(0, -2)
        return z if z.dtype.itemsize >= 4 else z.float()

    def _convolve(self, x: Tensor, down: Tensor) -> Tensor:
        """Images of the signal, as this layer slides over images of the input."""
        module, padding = self.module, self.module.padding
        if getattr(module, "padding_mode", "zeros") != "zeros":
            x = F.pad(x, module._reversed_padding_repeated_twice, mode=module.padding_mode)
            padding = 0
        return _CONV[down.ndim](x, down, stride=module.stride, padding=padding, dilation=module.dilation)

    def _images(self, x: Tensor) -> tuple[Tensor, ...]:
        images = self._batched(x)
        return images.split(max(1, CHUNK_BYTES // (4 * images[0].numel()))) if len(images) else ()

    def _batched(self, images: Tensor) -> Tensor:
        """Inputs or outputs of a convolution, which may be one image without a batch axis."""
        return images if images.ndim == len(self.weight_shape) else images[None]


def multiplies(module: Any) -> bool:
    """Whether a module is a linear layer or a plain convolution, of whichever class.

    A weight of two axes does not tell: gates that choose experts, Fourier features and layers that scale their weight
    have one, too. What stands in for torch's layers (packed weights, say) has their attributes.
    """
    weight = getattr(module, "weight", None)
    if weight is None or not 2 <= len(weight.shape) <= 5:
        return False
    names = _LINEAR if len(weight.shape) == 2 else _CONVOLUTION
    plain = getattr(module, "groups", 1) == 1 and not getattr(module, "transposed", False)
    return plain and all(hasattr(module, name) for name in names)


def compute_dtype(x: Tensor) -> torch.dtype:
    """What a layer's signals are computed in: half precision only where products of it come out in float32."""
    if x.is_floating_point() and x.dtype.itemsize == 2 and x.device.type not in WIDENED:
        return x.dtype
    return torch.promote_types(x.dtype, torch.float32)


def is_exact(down: Tensor, dtype: torch.dtype) -> bool:
    """Whether rounding to what layers compute in takes nothing from it. Without values (meta) the type decides."""
    if dtype.itemsize >= 4 or down.dtype == dtype or down.is_meta:
        return dtype.itemsize >= 4 or down.dtype == dtype
    return torch.equal(down.to(dtype).float(), down.float())


def fits(tokens: int, width: int) -> bool:
    """Whether float32 values of so many tokens may be kept."""
    return 4 * tokens * width <= CHUNK_BYTES


def add_product(written: Tensor, z: Tensor, placed: PlacedUp) -> None:
    """written += z up^T, in place.

    Args:
        written: (..., out), a view of an output.
        z: (tokens, r)
    """
    up, scale = placed.matrix, placed.scale
    if written.dtype == up.dtype and written.ndim == 2:
        written.addmm_(z.to(up.dtype), up.mT, alpha=scale)
        return
    if written.ndim > 2:
        written += (z.to(up.dtype) @ up.mT).reshape(written.shape).mul_(scale)
        return
    size = max(1, CHUNK_BYTES // (4 * len(up)))  # of a product that is wider than what it is added to
    for there, piece in zip(written.split(size), z.split(size), strict=True):
        there += (piece.to(up.dtype) @ up.mT).mul_(scale)


def _wide_product(x: Tensor, matrix: Tensor) -> Tensor:
    """x @ matrix, in float32 if x is in half precision: its products are summed in float32 anyway."""
    if x.dtype.itemsize >= 4:
        return x @ matrix
    if _can_write_wide(x.device, x.dtype):
        return torch.mm(x, matrix, out_dtype=torch.float32)
    return (x @ matrix).float()


@cache
def _can_write_wide(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this backend has a product of halves that comes out in float32 (CUDA since torch 2.8)."""
    few = torch.zeros(16, 16, device=device, dtype=dtype)
    try:
        return torch.mm(few, few, out_dtype=torch.float32).dtype == torch.float32
    except (TypeError, RuntimeError):  # NotImplementedError is a RuntimeError
        return False
