"""LORA_STACK: what LoRA stackers of other packs make, (file, strength, text encoder strength) for each LoRA."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import folder_paths

from ...ssr_core import LoraError


@dataclass(frozen=True)
class StackedLora:
    """A LoRA file and how strong it is."""

    path: Path
    strength: float
    clip_strength: float

    @property
    def name(self) -> str:
        return self.path.stem


def read_stack(stack: Iterable[Sequence[Any]] | None, where: str) -> list[StackedLora]:
    """The LoRAs of a LORA_STACK; empty places are passed over. Entries may lack the last strength.

    Raises:
        LoraError: a file that is in none of ComfyUI's folders; names `where`.
    """
    return [_entry(entry, where) for entry in stack or () if entry and entry[0] not in (None, "", "None")]


def _entry(entry: Sequence[Any], where: str) -> StackedLora:
    name, strength = str(entry[0]), float(entry[1])
    # a workflow made on Windows names files in folders with backslashes
    found = folder_paths.get_full_path("loras", name) or folder_paths.get_full_path("loras", name.replace("\\", "/"))
    if found is None:
        raise LoraError(f"{where}: there is no LoRA file {name!r} in any of ComfyUI's loras folders.")
    return StackedLora(Path(found), strength, float(entry[2]) if len(entry) > 2 else strength)
