"""Requirement: the memory that collecting takes beside the model, told before it starts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from ..lora.site import Site
from ..lora.subspace import Subspace
from .layer import is_exact
from .refinement import ROUNDED, TOKENS
from .sketch import OVERSAMPLING

LARGE = 4 * 2**30  # bytes of statistics in float64 from which they are kept in float32
MANY = 2**30  # bytes of targets in float32 from which they are kept in bfloat16
COUNTED = 1024  # tokens of a layer that are looked at in one pass, as hosts have it by default

Key = TypeVar("Key")


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
        dtype: torch.dtype = torch.float32,
        combinations: int = 0,
        unrefined: int = 0,
        groups: int = 1,
        tokens: Mapping[Site, int] | None = None,
        folded: bool = False,
    ) -> Requirement:
        """Of collecting in these subspaces.

        Args:
            context: context rows that a survey will add; 0 if they are there already or none are wanted.
            refine: whether a first merge is tried beside each LoRA.
            dtype: the precision that layers compute in.
            combinations: cases beside those of one LoRA each.
            unrefined: how many of these no merge is tried beside.
            groups: of layers, refined one after the other.
            folded: whether the cases are summed while refining, with the weights of the merge.
            tokens: how many a layer sees of an image, where that is known.
        """
        routed = {site: space for site, space in subspaces.items() if space.is_routed}
        seen = tokens or {}
        sizes = {
            site: _Size.of(site, space, context, combinations, dtype, min(TOKENS, seen.get(site, TOKENS)))
            for site, space in routed.items()
        }
        if not sizes:
            return cls(0, 0)
        surveying = _most((size.surveyed(context), size.survey_work) for size in sizes.values()) if context else 0
        measuring = _most((size.measured, size.measuring_work) for size in sizes.values())
        refining = _refining(sizes, groups) if refine else 0
        rows, cases = [size.rows for size in sizes.values()], len(next(iter(routed.values())).ranks) + combinations
        compared = (1 if folded else cases - unrefined) if refine else 0
        host = statistics_bytes(rows, cases) + statistics_bytes(rows, compared)
        targets = sum(size.out * size.rows for size in sizes.values())
        wide = folded or 4 * cases * targets < MANY
        host += (4 if wide else 2) * compared * targets
        return cls(max(surveying, measuring, refining), host)


def groups_of(subspaces: Mapping[Site, Subspace], groups: int) -> list[frozenset[str]]:
    """Modules in so many groups, in their order, that take about the same memory while they are refined."""
    costs: dict[str, int] = {}
    for site, space in subspaces.items():
        if space.is_routed:
            costs[site.module] = costs.get(site.module, 0) + (site.stop - site.start) * len(space.down)
    return [frozenset(group) for group in _groups(costs, groups)]


def statistics_bytes(rows: Sequence[int], cases: int) -> int:
    """Of the Gram matrices of all sites, given the rows of each: upper triangles, in float64 unless that is LARGE."""
    numbers = sum(cases * size * (size + 1) // 2 for size in rows)
    return statistics_dtype(rows, cases).itemsize * numbers


def statistics_dtype(rows: Sequence[int], cases: int) -> torch.dtype:
    """What these are kept in: where they grow large, rounding to float32 is the smaller evil."""
    exact = sum(8 * cases * size * (size + 1) // 2 for size in rows)
    return torch.float64 if exact < LARGE else torch.float32


def targets_dtype(subspaces: Mapping[Site, Subspace], cases: int) -> torch.dtype:
    """What targets of so many cases are kept in: rounded to 16 bits they give the same merge to four digits."""
    routed = [(site, space) for site, space in subspaces.items() if space.is_routed]
    numbers = cases * sum((site.stop - site.start) * len(space.down) for site, space in routed)
    return torch.float32 if 4 * numbers < MANY else torch.bfloat16


def _most(sizes: Iterable[tuple[int, int]]) -> int:
    """Of what all layers keep, and what each takes while it works: no two work at one time."""
    kept, work = zip(*sizes, strict=True)
    return int(sum(kept) + max(work))


def _refining(sizes: Mapping[Site, _Size], groups: int) -> int:
    """In the most demanding of the groups."""
    everywhere = sum(size.active for size in sizes.values())
    work = max(size.refining_work for size in sizes.values())
    costs: dict[str, int] = {}
    compared: dict[str, int] = {}
    for site, size in sizes.items():
        costs[site.module] = costs.get(site.module, 0) + size.out * size.rows
        compared[site.module] = compared.get(site.module, 0) + size.compared
    return everywhere + work + max(sum(map(compared.__getitem__, group)) for group in _groups(costs, groups))


def _groups(costs: Mapping[Key, int], groups: int) -> list[list[Key]]:
    """In their order, and of about the same cost; fewer where there are not so many."""
    found: list[list[Key]] = [[] for _ in range(groups)]
    total, before = sum(costs.values()), 0
    for key, cost in costs.items():
        found[min(groups - 1, (2 * before + cost) * groups // (2 * total))].append(key)
        before += cost
    return [group for group in found if group]


@dataclass(frozen=True)
class _Size:
    """Of one site. Numbers of bytes are those on the device."""

    rows: int  # R
    rank: int  # joint, without context rows
    own: int  # of the LoRAs that speak at one time, at most
    inputs: int
    out: int
    itemsize: int  # of what layers compute in
    sets: int  # of rows of `down`: two where rounding would take something from one
    merged_sets: int  # the same of a merge that is tried
    waiting: int  # tokens

    @classmethod
    def of(
        cls, site: Site, space: Subspace, context: int, combinations: int, dtype: torch.dtype, waiting: int
    ) -> _Size:
        inputs = space.down[0].numel()
        rows = len(space.down) + (0 if space.context else min(context, space.down.shape[1]))
        own = space.rank if combinations else max(space.ranks)
        sets = 1 if is_exact(space.down, dtype) else 2
        merged_sets = 1 if dtype.itemsize >= 4 or dtype == ROUNDED else 2
        return cls(rows, space.rank, own, inputs, site.stop - site.start, dtype.itemsize, sets, merged_sets, waiting)

    @property
    def _speaking(self) -> int:
        """The factors of the LoRAs that are active."""
        return self.itemsize * self.own * (self.sets * self.inputs + self.out)

    def surveyed(self, context: int) -> int:
        return self._speaking + 4 * self.inputs * (context + OVERSAMPLING)

    @property
    def survey_work(self) -> int:
        """Tokens in float32, and the test matrix."""
        return 4 * self.inputs * COUNTED + self.itemsize * self.inputs * COUNTED

    @property
    def measured(self) -> int:
        return self._speaking + self._counting

    @property
    def measuring_work(self) -> int:
        return COUNTED * (self.itemsize * self.inputs + 4 * (1 + self.sets) * self.rows)

    @property
    def active(self) -> int:
        """While refining, of a layer whether or not it is compared: the LoRAs that speak, and the merge."""
        return self._speaking + self.itemsize * self.rank * (self.merged_sets * self.inputs + self.out)

    @property
    def compared(self) -> int:
        """Further, of a layer that is: outputs that wait, and sums."""
        return self._counting + self.itemsize * self.waiting * self.out + 4 * self.out * self.rows

    @property
    def refining_work(self) -> int:
        return 3 * 4 * TOKENS * self.out + TOKENS * (self.itemsize * self.inputs + 8 * self.rows)

    @property
    def _counting(self) -> int:
        return self.sets * self.itemsize * self.rows * self.inputs + 4 * self.rows**2
