"""Storage: safetensors files, read whole or refused by name, and written whole or not at all."""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


def read_safetensors(file: Path, error: type[Exception]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors and the metadata of a file; `error` names the file and what is wrong with it."""
    with _opened(file, error) as opened:
        return {key: opened.get_tensor(key) for key in opened.keys()}, opened.metadata() or {}  # noqa: SIM118


def read_metadata(file: Path, error: type[Exception]) -> dict[str, str]:
    """Only the metadata of a file, which takes no time; `error` as in `read_safetensors`."""
    with _opened(file, error) as opened:
        return opened.metadata() or {}


def write_safetensors(tensors: Mapping[str, Tensor], path: str | os.PathLike[str], metadata: Mapping[str, str]) -> None:
    """Write under a temporary name in the same folder, then rename: readers never see half a file."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f"{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # what new files get here; save_file makes private ones
        save_file(dict(tensors), temporary, metadata=dict(metadata))
        temporary.chmod(mode)
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


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
