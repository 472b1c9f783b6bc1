"""Lora: one LoRA as this package sees it, its updates by site and what is worth remembering about its source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

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
