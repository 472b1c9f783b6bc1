"""Where a node saves a file: below ComfyUI's output folder, numbered, and nowhere else."""

from __future__ import annotations

import re
from pathlib import Path

import folder_paths

from ...ssr_core import SSRError

LONGEST = 180  # bytes of a name, which leaves room for the number, the ending and those of a temporary file


def next_path(folder: str, prefix: str, otherwise: str) -> Path:
    """The next free `output/<folder>/<prefix>_00001_.safetensors`; `otherwise` is the prefix if none is given.

    Raises:
        SSRError: the prefix leads out of that folder, or is longer than file systems take.
        Exception: ComfyUI's own, if it leads out of the output folder all the same, by a link.
    """
    chosen = _below(prefix.removesuffix(".safetensors"), folder) or otherwise
    where = folder_paths.get_output_directory()
    inside, name, counter, _, _ = folder_paths.get_save_image_path(f"{folder}/{chosen}", where)
    return Path(inside) / f"{name}_{counter:05}_.safetensors"


def _below(prefix: str, folder: str) -> str:
    """A name, maybe in folders, that is below `folder` on every system that a shared workflow may reach."""
    parts = [part.strip(" ") for part in re.sub(r'[<>:"|?*\x00-\x1f\x7f\ud800-\udfff]', "_", prefix).split("/")]
    for part in parts:
        if {*part.replace("\\", "/").split("/")} & {".."}:
            raise SSRError(f"{prefix!r} leads out of output/{folder}; choose a name below it.")
        if (size := len(part.encode())) > LONGEST:
            raise SSRError(
                f"{part[:40]!r}... is {size} bytes long, more than the {LONGEST} that every file system takes together "
                "with a number; choose a shorter name."
            )
    return "/".join(part for part in parts if part not in ("", "."))
