"""Files of merged LoRAs: written under output/loras, where Load LoRA finds them, with word of where they come from."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import folder_paths
import torch
from comfy.cli_args import args

from ...ssr_core import LoraError, LowRankUpdate
from ...ssr_core.files.storage import write_safetensors
from .save_path import next_path

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def save(loras: Sequence[tuple[Any, str]], dtype: str, where: str) -> tuple[list[str], int]:
    """Write each LORA_MODEL under its name. Nothing is written if one of them cannot be.

    Returns the names under which Load LoRA lists them, and their bytes.

    Raises:
        LoraError: values that `dtype` cannot hold; names `where` and the key.
        SSRError: a name that leads elsewhere.
    """
    converted = [(_converted(lora, DTYPES[dtype], where), lora, name) for lora, name in loras]
    listed, size = [], 0
    for tensors, lora, name in converted:
        path = next_file(name)
        write_safetensors(tensors, path, {} if args.disable_metadata else _metadata(lora, path))
        listed.append(path.relative_to(Path(folder_paths.get_output_directory()) / "loras").as_posix())
        size += path.stat().st_size
    return listed, size


def next_file(name: str) -> Path:
    """Where `save` would write a LoRA of this name now.

    Raises:
        SSRError: a name that leads elsewhere.
    """
    return next_path("loras", name, "merged")


def save_one(lora: Any, name: str, dtype: str, where: str) -> tuple[str, str]:
    """`save` of one LORA_MODEL: (the name under which Load LoRA lists it, a sentence that says so)."""
    (listed,), size = save([(lora, name)], dtype, where)
    return listed, f"Saved output/loras/{listed} ({size / 2**20:.1f} MiB). Load LoRA lists it as {listed}."


def _balanced(lora: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """With both factors of each pair equally large: float16 holds the smallest values of some LoRAs only so."""
    tensors = dict(lora)
    for key in (key for key in lora if key.endswith(".lora_A.weight")):
        other = f"{key.removesuffix('.lora_A.weight')}.lora_B.weight"
        if other in lora:
            pair = LowRankUpdate(lora[key].float(), lora[other].float().flatten(1)).balanced()
            tensors |= {key: pair.down, other: pair.up.reshape(lora[other].shape)}
    return tensors


def _converted(lora: dict[str, torch.Tensor], dtype: torch.dtype, where: str) -> dict[str, torch.Tensor]:
    """Weights in `dtype`; alphas stay as they are. Nothing shares storage, as safetensors wants it."""
    tensors = {}
    for key, value in (_balanced(lora) if dtype == torch.float16 else lora).items():
        narrow = value.ndim > 0 and value.is_floating_point()
        tensors[key] = (value.to(dtype) if narrow else value).detach().cpu().contiguous().clone()
        if not torch.isfinite(tensors[key]).all():
            raise LoraError(f"{where}: {key} has values that {dtype} cannot hold; choose bfloat16 or float32.")
    return tensors


def _metadata(lora: Any, path: Path) -> dict[str, str]:
    known = dict(getattr(lora, "metadata", {}))
    return {**known, "modelspec.title": path.stem, "modelspec.date": datetime.date.today().isoformat()}
