"""Storage: tensors and their metadata in a safetensors file, read with checks and written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import SaveError

_TEMPORARY = re.compile(r".+\.[0-9a-f]{32}\.tmp|\.tmp[0-9A-Za-z]{6}")  # ours, and what safetensors writes to first
LONGEST_KEY = 1000  # characters; those of real models have some dozens
STALE = 24 * 3600  # seconds after which a temporary file was left behind by a process that was killed


def read_safetensors(file: Path, error: type[Exception]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors and the metadata of a file; `error` names the file and what is wrong with it."""
    with _opened(file, error) as opened, unchanged(file, error):
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        return owned(tensors, file.name, error), opened.metadata() or {}


def read_metadata(file: Path, error: type[Exception]) -> dict[str, str]:
    """Only the metadata of a file, which takes no time; `error` as in `read_safetensors`."""
    with _opened(file, error) as opened:
        return opened.metadata() or {}


def owned(tensors: Mapping[str, Tensor], name: str, error: type[Exception]) -> dict[str, Tensor]:
    """Copies in memory of their own, once it is certain that they are plain numbers.

    What a reader gives are views of the file. Where it is overwritten later, they would change with it, and where it
    is cut, the process would be killed. `error` names the file by `name`, and the key.
    """
    for key, value in tensors.items():
        if len(key) > LONGEST_KEY:  # what is looked up in it by its parts would take for ever
            raise error(f"{name}: the key {key[:40]!r}... has {len(key)} characters; the file is damaged.")
        _check(value, f"{name}: {key!r}", error)
    return {key: value.clone() for key, value in tensors.items()}


@contextmanager
def unchanged(file: Path, error: type[Exception]) -> Iterator[None]:
    """Raises `error` if the file is another one at the end of the block than at its beginning."""
    before = _state(file)
    yield
    if _state(file) != before:
        raise error(f"{file.name} was written to while it was read; run again once it is complete.")


def write_safetensors(tensors: Mapping[str, Tensor], path: str | os.PathLike[str], metadata: Mapping[str, str]) -> None:
    """Write under a temporary name in the same folder, then rename: readers never see half a file.

    Temporary files that killed processes have left in the folder are removed.

    Raises:
        SaveError: the file cannot be written; names it and the cause.
    """
    target = Path(path)
    temporary = target.with_name(f"{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(target.parent)
        temporary.touch()
        mode = temporary.stat().st_mode  # what new files get here; save_file makes private ones
        save_file(dict(tensors), temporary, metadata=dict(metadata))
        temporary.chmod(mode)
        with temporary.open("rb+") as written:
            _order_metadata(written)
            os.fsync(written.fileno())  # else the name may outlive a power cut and the content not
        os.replace(temporary, target)
    except (SafetensorError, OSError) as cause:
        raise SaveError(
            f"{target} cannot be written ({cause}); free space, or choose a folder and a name that can be written to."
        ) from cause
    finally:
        _remove(temporary)


def sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        for block in iter(lambda: stream.read(2**20), b""):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def _opened(file: Path, error: type[Exception]) -> Iterator[Any]:
    if not file.is_file():
        raise error(f"{file} does not exist.")
    try:
        with safe_open(file, framework="pt") as opened:
            yield opened
    except (SafetensorError, OSError) as cause:
        raise error(f"{file.name} is not a whole safetensors file ({cause}); download or save it again.") from cause


def _check(value: object, where: str, error: type[Exception]) -> None:
    """Raise `error` unless `value` is a tensor of real numbers that is stored in full."""
    if not isinstance(value, Tensor):
        raise error(f"{where} is a {type(value).__name__}, not a tensor; it is no LoRA, or it is damaged.")
    if value.layout != torch.strided or value.is_quantized or value.device.type == "meta" or value.is_complex():
        raise error(f"{where} is kept in a form that no LoRA has ({value.dtype}, {value.layout}, {value.device}).")
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise error(f"{where} claims {tuple(value.shape)}, more than the file holds; it is damaged.")
    try:
        value.flatten()[:1].float()
    except (RuntimeError, TypeError) as cause:
        raise error(f"{where} is of {value.dtype}, which torch {torch.__version__} cannot compute with.") from cause


def _order_metadata(file: BinaryIO) -> None:
    """Put the metadata of a file in order: safetensors shuffles it, and the same content should be the same file."""
    length = int.from_bytes(file.read(8), "little")
    header = json.loads(file.read(length))
    if "__metadata__" in header:
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    ordered = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    if len(ordered) <= length:
        file.seek(8)
        file.write(ordered.ljust(length))  # the format pads headers with spaces


def _state(file: Path) -> tuple[int, ...]:
    found = file.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _remove_stale(folder: Path) -> None:
    for path in folder.iterdir():
        if _TEMPORARY.fullmatch(path.name) and time.time() - path.lstat().st_mtime > STALE:
            _remove(path)


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError:  # on a disk that cannot be written to any more; the error that brought us here tells more
        return
