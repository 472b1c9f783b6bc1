"""Where a node saves a file: below ComfyUI's output folder, numbered, and nowhere else."""

from __future__ import annotations

import re
from pathlib import Path

import folder_paths


def next_path(folder: str, prefix: str, otherwise: str) -> Path:
    """The next free `output/<folder>/<prefix>_00001_.safetensors`; `otherwise` is the prefix if none is given.

    Raises:
        Exception: ComfyUI's own, if the prefix leads out of the output folder.
    """
    # not part of a path on every system that a shared workflow may reach
    prefix = re.sub(r'[<>:"|?*]', "_", prefix).strip() or otherwise
    inside, name, counter, _, _ = folder_paths.get_save_image_path(
        f"{folder}/{prefix}", folder_paths.get_output_directory()
    )
    return Path(inside) / f"{name}_{counter:05}_.safetensors"
