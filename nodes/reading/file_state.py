"""The state of a file: ComfyUI runs a node again when it changes, though the name that was chosen is still the same."""

from __future__ import annotations

import os
from pathlib import Path


def state_of(path: str | os.PathLike[str] | None, name: str) -> str:
    """Another text whenever `name` means another file than before, or one that was replaced; `path` may be missing."""
    if path is None:
        return name
    stat = Path(path).stat()
    return f"{path} {stat.st_mtime_ns} {stat.st_size}"
