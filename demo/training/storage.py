# SPDX-License-Identifier: Apache-2.0
"""The files in demo/assets: safetensors with a few words about themselves."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

log = logging.getLogger(__name__)
ASSETS = Path(__file__).parents[1] / "assets"


def save(
    name: str, tensors: dict[str, Tensor], dtype: torch.dtype | None = None, *, folder: Path = ASSETS, **about: object
) -> None:
    """Replaces <folder>/<name>.safetensors at once, so that nobody reads half a file. `dtype`: None = as they are."""
    folder.mkdir(parents=True, exist_ok=True)
    converted = {
        k: (v.to(dtype or v.dtype) if v.is_floating_point() else v).contiguous().clone() for k, v in tensors.items()
    }
    metadata = {"modelspec.title": name, "modelspec.license": "Apache-2.0", "trained_by": "demo/train.py"}
    metadata |= {key: str(value) for key, value in about.items()}
    path, temporary = folder / f"{name}.safetensors", folder / f".{name}.part"
    save_file(converted, temporary, metadata=metadata)
    temporary.chmod(0o644)
    temporary.rename(path)
    log.info("saved %s, %.2f MB", path.name, path.stat().st_size / 1e6)


def load(name: str, folder: Path = ASSETS) -> dict[str, Tensor]:
    """<folder>/<name>.safetensors with its floating-point tensors in float32."""
    path = folder / f"{name}.safetensors"
    if not path.exists():
        raise SystemExit(f"{path} is missing: run the training step that makes it first")
    return {k: v.float() if v.is_floating_point() else v for k, v in load_file(path).items()}
