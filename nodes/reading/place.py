"""Place: where a patch goes, a weight of a network or a slice of one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...ssr_core import LowRankUpdate, Site
from .adapters import Rows
from .network import NamesOnly, Network


@dataclass(frozen=True)
class Place:
    """Where a patch goes: a weight, or a slice of it."""

    key: str
    shape: tuple[int, ...]  # of the whole weight
    axis: int = 0
    start: int = 0
    length: int = 0
    rows: Rows | None = None  # a permutation of output rows

    @classmethod
    def of(cls, key: Any, network: Network | NamesOnly) -> Place | None:
        """None where the network has no such weight."""
        name, offset, rows = (key, None, None) if isinstance(key, str) else (*key, None)[:3]
        if not isinstance(name, str) or name not in network:
            return None
        shape = network.shape(name)
        axis, start, length = offset or (0, 0, shape[0] if shape else 0)
        return cls(name, shape, axis, start, length, rows)

    @property
    def slice_shape(self) -> tuple[int, ...]:
        return tuple(self.length if i == self.axis else n for i, n in enumerate(self.shape))

    def site(self, out: int) -> Site:
        module, total = self.key.removesuffix(".weight"), self.shape[0] if self.shape else out
        return Site(module, self.start, self.start + out, total) if self.axis == 0 else Site.whole(module, total)

    def narrowed(self, weight: Tensor) -> Tensor:
        return weight.narrow(self.axis, self.start, self.length)

    def widened(self, update: LowRankUpdate) -> LowRankUpdate:
        """An update of some input columns as one of all of them."""
        if self.axis == 0:
            return update
        down = update.down.new_zeros(update.rank, *self.shape[1:])
        down.narrow(self.axis, self.start, self.length).copy_(update.down)
        return LowRankUpdate(down, update.up)

    def embedded(self, difference: Tensor) -> Tensor:
        """A difference of the slice as one of the whole weight."""
        if not self.shape or tuple(difference.shape) == self.shape:
            return difference
        whole = difference.new_zeros(self.shape)
        self.narrowed(whole).copy_(difference)
        return whole
