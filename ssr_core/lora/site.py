"""Site: where a LoRA writes, a module together with the output rows of its weight."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from .low_rank_update import LowRankUpdate, concatenate

Updates = Mapping["Site", LowRankUpdate]


@dataclass(frozen=True, order=True)
class Site:
    """Rows start..stop of the weight of `module`, which has out_features rows.

    A fused qkv is one site for a LoRA trained on it whole, and three for one trained on q, k and v apart.
    """

    module: str
    start: int
    stop: int
    out_features: int

    @classmethod
    def whole(cls, module: str, out_features: int) -> Site:
        return cls(module, 0, out_features, out_features)

    @property
    def is_whole(self) -> bool:
        return self.start == 0 and self.stop == self.out_features

    def __str__(self) -> str:
        return self.module if self.is_whole else f"{self.module}[{self.start}:{self.stop}]"


def align_rows(tasks: Sequence[Updates]) -> list[dict[Site, LowRankUpdate]]:
    """Cut the updates of all tasks at each other's row boundaries (their common refinement).

    Afterwards two sites are either equal or share no row. Nothing is cut where tasks agree.
    """
    boundaries: dict[str, set[int]] = {}
    for site in _all_sites(tasks):
        boundaries.setdefault(site.module, set()).update((site.start, site.stop))
    return [sum_by_site(_cut(updates, boundaries)) for updates in tasks]


def join_rows(updates: Updates) -> dict[str, LowRankUpdate]:
    """One update per module from those of its sites, as files and weight patches need them. Ranks of slices add up."""
    grouped: dict[str, list[LowRankUpdate]] = {}
    for site, update in updates.items():
        grouped.setdefault(site.module, []).append(update.embed_rows(site.start, site.out_features))
    return {module: concatenate(parts) for module, parts in grouped.items()}


def sum_by_site(pieces: Iterable[tuple[Site, LowRankUpdate]]) -> dict[Site, LowRankUpdate]:
    """By site; where one LoRA writes twice to the same rows, the sum."""
    grouped: dict[Site, list[LowRankUpdate]] = {}
    for site, update in pieces:
        grouped.setdefault(site, []).append(update)
    return {site: concatenate(updates) for site, updates in grouped.items()}


def _cut(updates: Updates, boundaries: Mapping[str, set[int]]) -> Iterable[tuple[Site, LowRankUpdate]]:
    for site, update in updates.items():
        edges = sorted(edge for edge in boundaries[site.module] if site.start <= edge <= site.stop)
        for start, stop in pairwise(edges):
            piece = Site(site.module, start, stop, site.out_features)
            yield piece, update.slice_rows(start - site.start, stop - site.start)


def canonical(module: str) -> str:
    """A module's name with dots and underscores made equal: kohya's files cannot tell them apart."""
    return module.replace(".", "_")


def _all_sites(tasks: Sequence[Updates]) -> Iterable[Site]:
    return (site for updates in tasks for site in updates)
