"""Pickers: the lists of LoRA files that a node lets people choose from, and what they chose."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import folder_paths
from comfy_api.latest import io

PICKERS = 4
NONE = "None"


def picker(number: int, tooltip: str, optional: bool) -> io.Combo.Input:
    return io.Combo.Input(
        f"lora_{number}",
        options=[NONE, *folder_paths.get_filename_list("loras")],
        default=NONE,
        optional=optional,
        tooltip=tooltip,
    )


def picked(chosen: Mapping[str, Any]) -> list[str]:
    """The names in the pickers of a node with these inputs, in order; NONE where nothing is chosen."""
    return [str(chosen.get(f"lora_{number}") or NONE) for number in range(1, PICKERS + 1)]
