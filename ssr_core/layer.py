"""How a layer turns inputs into tokens: linear layers and convolutions of 1 to 3 dimensions, in bounded pieces."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .errors import ModelMismatchError
from .site import Site

CHUNK_BYTES = 64 * 2**20  # of float32 input that exist at one time

_CONV = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}


@dataclass(frozen=True)
class Layer:
    """A linear or convolution module, read by its weight's shape: quantized layers are no nn.Linear."""

    module: Any  # an nn.Module with a weight; Any because hosts wrap linear layers in classes of their own
    name: str

    def __post_init__(self) -> None:
        if self.weight_shape[2:] and getattr(self.module, "groups", 1) != 1:
            raise ModelMismatchError(f"{self.name} is a grouped convolution, which cannot be merged by routing.")
        if getattr(self.module, "transposed", False):
            raise ModelMismatchError(f"{self.name} is a transposed convolution, which cannot be merged by routing.")
        if len(self.weight_shape) not in (2, *_CONV):
            raise ModelMismatchError(
                f"{self.name} has a weight of shape {self.weight_shape}; it is no linear or conv layer."
            )

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """(out, in) or (out, in, *kernel)"""
        return tuple(self.module.weight.shape)

    @property
    def is_conv(self) -> bool:
        return len(self.weight_shape) > 2

    def chunks(self, x: Tensor, output: Tensor, rank: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Pieces of x, with the view of `output` (..., out) that holds the same tokens.

        Neither a piece, nor its signal of `rank` rows, nor its output takes more than CHUNK_BYTES in float32; only
        images of a convolution are not divided.
        """
        if self.is_conv:
            x, output = self._batched(x), self._batched(output)
            size = max(1, CHUNK_BYTES // (4 * x[0].numel()))
            yield from zip(x.split(size), output.movedim(1, -1).split(size), strict=True)
        else:
            tokens, written = x.reshape(-1, x.shape[-1]), output.view(-1, output.shape[-1])
            widest = max(x.shape[-1], output.shape[-1], 2 * rank)  # the signal is summed in float64
            size = max(1, CHUNK_BYTES // (4 * widest))
            yield from zip(tokens.split(size), written.split(size), strict=True)

    def place(self, down: Tensor, where: tuple[torch.device, torch.dtype]) -> Tensor:
        """A `down` in this layer's own layout, ready for `project`."""
        return down.reshape(-1, *self.weight_shape[1:]).to(*where)

    def plus(self, x: Tensor, output: Tensor, updates: Iterable[tuple[Site, Tensor, Tensor]]) -> Tensor:
        """The output with updates of this layer, as (site, down, up) in their place, added to a copy of it."""
        result = output.clone(memory_format=torch.contiguous_format)
        for site, down, up in updates:
            for piece, written in self.chunks(x, result, len(down)):
                rows = written[..., site.start : site.stop]
                rows += (self.project(piece.to(down.dtype), down) @ up.mT).reshape(rows.shape)
        return result

    def positions(self, output: Tensor) -> int:
        """How many tokens an output holds."""
        return output.numel() // self.weight_shape[0]

    def outputs(self, output: Tensor) -> Tensor:
        """(tokens, out)"""
        if self.is_conv:
            output = self._batched(output).movedim(1, -1)
        return output.reshape(-1, output.shape[-1])

    def project_some(self, x: Tensor, down: Tensor, chosen: Tensor) -> Tensor:
        """`project` for the tokens with these indices only."""
        if not self.is_conv:
            return self.project(x.reshape(-1, x.shape[-1])[chosen], down)
        return self.project(self._batched(x), down)[chosen]

    def samples(self, x: Tensor) -> int:
        """The size of the batch: each of its entries is one image at one step."""
        return len(x) if x.ndim >= len(self.weight_shape) else 1

    def features(self, piece: Tensor) -> Tensor:
        """What the layer sees at each position, (tokens, in)."""
        return piece.movedim(1, -1).flatten(0, -2) if self.is_conv else piece

    def project(self, x: Tensor, down: Tensor) -> Tensor:
        """z = down x for every token: (tokens, R). For a convolution the tokens are its output positions."""
        if not self.is_conv:
            return x @ down.mT
        module, padding = self.module, self.module.padding
        if getattr(module, "padding_mode", "zeros") != "zeros":
            x = F.pad(x, module._reversed_padding_repeated_twice, mode=module.padding_mode)
            padding = 0
        z = _CONV[down.ndim](x, down, stride=module.stride, padding=padding, dilation=module.dilation)
        return z.movedim(1, -1).flatten(0, -2)

    def _batched(self, images: Tensor) -> Tensor:
        """Inputs or outputs of a convolution, which may be one image without a batch axis."""
        return images if images.ndim == len(self.weight_shape) else images[None]


def compute_dtype(x: Tensor) -> torch.dtype:
    """Signals are computed in float32, however narrow the model's own activations are."""
    return torch.promote_types(x.dtype, torch.float32)
