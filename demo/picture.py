# SPDX-License-Identifier: Apache-2.0
"""The demo's comparison as one picture: rows are prompts, columns are models."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType

from PIL import Image

GRID = Path(__file__).resolve().parents[1] / "nodes" / "pictures" / "grid.py"


def grid(
    pictures: Mapping[tuple[int, int], Path], prompts: Sequence[str], columns: Sequence[str], highlight: int
) -> Image.Image:
    """The pictures at (row, column), with the columns from `highlight` on set off."""
    opened = {place: Image.open(path) for place, path in pictures.items()}
    sheet: Image.Image = _grid_of_the_pack().grid(opened, prompts, columns, highlight)
    return sheet


def _grid_of_the_pack() -> ModuleType:
    """By its file: the package around it can only be imported inside ComfyUI."""
    spec = importlib.util.spec_from_file_location("ssr_grid", GRID)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look up what they are told by name
    spec.loader.exec_module(module)
    return module
