"""A LoRA file as ComfyUI reads it, checked: plain tensors in memory of their own, and where they come from."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import comfy.lora_convert
import comfy.utils
from torch import Tensor

from ...ssr_core import LoraError
from ...ssr_core.files.peft_config import read_peft_config
from ...ssr_core.files.storage import owned, sha256, unchanged
from .task import Task
from .training_notes import TRIGGER

_KEPT_METADATA = ("ss_base_model_version", "modelspec.architecture", TRIGGER, "modelspec.title")


def read(task: Task) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a task's LoRA, in a spelling that ComfyUI's key map has, and what to remember of their source.

    Raises:
        LoraError: no file, damaged, or not what a LoRA file is; names the file.
    """
    return read_with_notes(task)[:2]


def read_with_notes(task: Task) -> tuple[dict[str, Tensor], dict[str, str], tuple[str, ...]]:
    """`read`, and what else a person should know of the file."""
    metadata: Mapping[str, str] = {}
    if isinstance(task.lora, Path):
        tensors, source, metadata = _read_file(task.lora)
    else:
        tensors, source = owned(task.lora, task.name, LoraError), {"file": task.name}
    notes = tuple(_alpha_elsewhere(task.lora, tensors, metadata)) if isinstance(task.lora, Path) else ()
    try:
        return comfy.lora_convert.convert_lora(tensors), source, notes
    except (LookupError, AttributeError) as error:  # it knows a dialect by some of its keys and expects the others
        raise LoraError(f"{task.name} has no {error}, which others of its keys need; it is incomplete.") from error


def _alpha_elsewhere(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Iterator[str]:
    """Where PEFT or diffusers keep alpha beside the tensors, which they themselves and `ssr_core.load_lora` read."""
    found = next((key for key in tensors if key.endswith(".lora_A.weight")), None)
    if (
        found is None
        or any(key.endswith(".alpha") for key in tensors)
        or not tensors[found].ndim
        or not len(tensors[found])
    ):
        return
    module, rank = found.removesuffix(".lora_A.weight"), len(tensors[found])
    config = read_peft_config(file, metadata, module)
    if config is not None and (scale := config.alpha_of(module, rank) / rank) != 1:
        yield (
            f"its alpha of {config.alpha_of(module, rank):g} for rank {rank} is kept beside the tensors, where neither "
            f"Load LoRA nor these nodes read it: strength 1 is Load LoRA's 1, and {scale:g} is what diffusers and "
            "ssr_core.load_lora make of it."
        )


def _read_file(file: Path) -> tuple[dict[str, Tensor], dict[str, str], Mapping[str, str]]:
    try:
        with unchanged(file, LoraError):
            _check_container(file)
            # safe_load: pickled files are read as tensors only, no code in them is run
            content, metadata = comfy.utils.load_torch_file(str(file), safe_load=True, return_metadata=True)
            if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
                raise LoraError(f"{file.name} holds no tensors with names; it is no LoRA file.")
            tensors = owned(content, file.name, LoraError)
            source = {"file": file.name, "sha256": sha256(file)}
    except LoraError:
        raise
    except Exception as error:  # whatever a damaged file makes the reader raise
        raise LoraError(f"{file.name} cannot be read ({str(error)[:500]}); download or save it again.") from error
    metadata = metadata or {}
    return tensors, source | {key: metadata[key] for key in _KEPT_METADATA if key in metadata}, metadata


def _check_container(file: Path) -> None:
    """Raise LoraError for a checkpoint that unfolds to more than its size."""
    if file.suffix.lower() in (".safetensors", ".sft") or not zipfile.is_zipfile(file):
        return
    with zipfile.ZipFile(file) as archive:
        if any(record.compress_type != zipfile.ZIP_STORED for record in archive.infolist()):
            raise LoraError(f"{file.name} is compressed, which no checkpoint is; do not use it.")
