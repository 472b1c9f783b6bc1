"""Lora: one LoRA as this package sees it, its updates by site and what is worth remembering about its source."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from ..errors import StatisticsError
from .site import Updates, canonical, sum_by_site


@dataclass(frozen=True, eq=False)
class Lora:
    """The updates of one LoRA at strength 1, with the strength its user gives it."""

    name: str
    updates: Updates
    strength: float = 1.0
    source: Mapping[str, str] = field(default_factory=dict)  # file, sha256, trigger words, ...

    def with_strength(self, strength: float) -> Lora:
        return replace(self, strength=strength)

    @property
    def modules(self) -> set[str]:
        return {site.module for site in self.updates}

    @cached_property
    def fingerprint(self) -> str:
        """Of all its factors at strength 1, in whichever spelling and order its layers come."""
        digest = hashlib.sha256()
        for site in sorted(self.updates, key=lambda site: (canonical(site.module), site.start)):
            update = self.updates[site]
            digest.update(f"{canonical(site.module)} {site.start} {site.stop} {update.rank}".encode())
            for factor in (update.down, update.up):
                digest.update(factor.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:32]

    def renamed(self, names: Mapping[str, str]) -> Lora:
        """The same LoRA with other names for some modules."""
        renamed = ((replace(site, module=names.get(site.module, site.module)), u) for site, u in self.updates.items())
        return replace(self, updates=sum_by_site(renamed))


def with_common_names(loras: Sequence[Lora]) -> list[Lora]:
    """Have LoRAs that spell a module in dots and in kohya's underscores use one name, the one with dots."""
    modules = set().union(*(lora.modules for lora in loras))
    dotted = {canonical(module): module for module in sorted(modules) if "." in module}
    names = {module: dotted.get(canonical(module), module) for module in modules if "." not in module}
    return [lora.renamed(names) for lora in loras]


def find_order(names: Sequence[str], fingerprints: Sequence[str], loras: Sequence[Lora]) -> tuple[int, ...]:
    """For each of `loras`, where it stands among those with these names and fingerprints.

    Raises:
        StatisticsError: they are not the same LoRAs; says which differ.
    """
    left = list(range(len(names)))
    order: list[int | None] = []
    for lora in loras:
        found = [i for i in left if fingerprints[i] == lora.fingerprint]
        best = next(
            (i for i in found if names[i] == lora.name), found[0] if found else None
        )  # a LoRA may be there twice
        order.append(best)
        left = [i for i in left if i != best]
    strange = [lora.name for lora, at in zip(loras, order, strict=True) if at is None]
    if not strange and not left:
        return tuple(at for at in order if at is not None)
    missing = [names[i] for i in left]
    changed = [name for name in missing if name in strange]
    parts = [f"{name} is another file or has changed" for name in changed]
    parts += [f"{name} is missing" for name in missing if name not in changed]
    parts += [f"{name} was not there" for name in strange if name not in changed]
    raise StatisticsError(
        f"measured with other LoRAs ({', '.join(names)}): {'; '.join(parts)}. Use the same LoRAs, or collect again."
    )
