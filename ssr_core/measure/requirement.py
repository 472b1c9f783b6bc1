"""Requirement: the memory that collecting takes beside the model, told before it starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ..lora.site import Site
from ..lora.subspace import Subspace
from .accumulator import SINGLE
from .refinement import TOKENS
from .sketch import OVERSAMPLING

LARGE = 4 * 2**30  # bytes of statistics in float64 from which they are kept in float32


@dataclass(frozen=True)
class Requirement:
    """Bytes beside the model and its activations."""

    device: int  # where the model computes, at the most demanding kind of run
    host: int  # of the statistics that are kept when all runs are done

    @classmethod
    def of(
        cls,
        subspaces: Mapping[Site, Subspace],
        context: int = 0,
        refine: bool = False,
        itemsize: int = 4,
        combinations: int = 0,
        unrefined: int = 0,
    ) -> Requirement:
        """Of collecting in these subspaces.

        Args:
            context: context rows that a survey will add; 0 if they are there already or none are wanted.
            refine: whether a first merge is tried beside each LoRA.
            itemsize: bytes of a number in the precision that layers compute in.
            combinations: cases beside those of one LoRA each.
            unrefined: how many of these no merge is tried beside.
        """
        sizes = [_Size.of(site, space, context, combinations) for site, space in subspaces.items() if space.is_routed]
        if not sizes:
            return cls(0, 0)
        surveying = sum(size.surveyed(context, itemsize) for size in sizes) if context else 0
        measuring = sum(size.measured(itemsize) for size in sizes)
        refining = sum(size.refined(itemsize) for size in sizes) if refine else 0
        rows, cases = [size.rows for size in sizes], sizes[0].cases
        compared = cases - unrefined if refine else 0
        host = statistics_bytes(rows, cases) + statistics_bytes(rows, compared)
        targets = sum(compared * 4 * size.out * size.rows for size in sizes)
        return cls(max(surveying, measuring, refining), host + targets)


def statistics_bytes(rows: Sequence[int], cases: int) -> int:
    """Of the Gram matrices of all sites, given the rows of each: upper triangles, in float64 unless that is LARGE."""
    numbers = sum(cases * size * (size + 1) // 2 for size in rows)
    return statistics_dtype(rows, cases).itemsize * numbers


def statistics_dtype(rows: Sequence[int], cases: int) -> torch.dtype:
    """What these are kept in: where they grow large, rounding to float32 is the smaller evil."""
    exact = sum(8 * cases * size * (size + 1) // 2 for size in rows)
    return torch.float64 if exact < LARGE else torch.float32


@dataclass(frozen=True)
class _Size:
    """Of one site."""

    rows: int  # R
    rank: int  # joint, without context rows
    own: int  # of the LoRAs that speak at one time, at most
    inputs: int
    out: int
    cases: int

    @classmethod
    def of(cls, site: Site, space: Subspace, context: int, combinations: int) -> _Size:
        inputs = space.down[0].numel()
        rows = len(space.down) + (0 if space.context else min(context, space.down.shape[1]))
        cases = len(space.ranks) + combinations
        own = space.rank if combinations else max(space.ranks)
        return cls(rows, space.rank, own, inputs, site.stop - site.start, cases)

    def surveyed(self, context: int, itemsize: int) -> int:
        return self.inputs * (4 * (context + OVERSAMPLING) + itemsize * self.own) + itemsize * self.out * self.own

    def measured(self, itemsize: int) -> int:
        return itemsize * (self.rows * self.inputs + self.own * self.out) + self._gram

    def refined(self, itemsize: int) -> int:
        merged = itemsize * self.rank * (self.inputs + self.out)
        waiting = itemsize * TOKENS * self.out
        return self.measured(itemsize) + itemsize * self.own * self.inputs + merged + waiting + 4 * self.out * self.rows

    @property
    def _gram(self) -> int:
        return (8 if self.rows <= SINGLE else 4) * self.rows**2
