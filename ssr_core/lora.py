"""Lora: one LoRA as this package sees it, its updates by site and what is worth remembering about its source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from .site import Updates


@dataclass(frozen=True, eq=False)
class Lora:
    """The updates of one LoRA at strength 1, with the strength its user gives it."""

    name: str
    updates: Updates
    strength: float = 1.0
    source: Mapping[str, str] = field(default_factory=dict)  # file, sha256, trigger words, ...

    def with_strength(self, strength: float) -> Lora:
        return replace(self, strength=strength)
