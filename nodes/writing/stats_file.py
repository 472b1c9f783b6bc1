"""A file of statistics: what SSR Save Stats writes and SSR Load Stats reads, with word of how it was measured."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ...ssr_core import Calibration, Lora, StatisticsError, parse_rules
from ...ssr_core.files.statistics_file import statistics_from, statistics_state
from ...ssr_core.files.storage import read_metadata, read_safetensors, write_safetensors
from ...ssr_core.lora.lora import find_order
from ..calibrating.circumstances import Circumstances
from ..calibrating.metadata import describe
from ..calibrating.stats import Stats
from ..calibrating.text_encoder import own_names, spelt_out
from ..reading.loaded_lora import LoadedLora
from ..reading.patches import read_tasks
from ..reading.task import Task

HEADER = "ssr.stats"
TEXT = "text/"  # before the names of all that belongs to the text encoder


def save(stats: Stats, path: Path, prompts: bool) -> None:
    """Write statistics, whole or not at all; `prompts` says whether the calibration prompts are told."""
    tensors, header = statistics_state(stats.calibration)
    if stats.text is not None:
        of_text = statistics_state(own_names(stats.text))
        for all_, more in zip((tensors, header), of_text, strict=True):
            all_.update({TEXT + key: value for key, value in more.items()})  # type: ignore[attr-defined]
    collections = [one if prompts else one.without_prompts() for one in stats.collections]
    known = {
        "with_clip": stats.with_clip,
        "silent": stats.silent,
        "notes": stats.notes,
        "collections": [one.as_json() for one in collections],
    }
    write_safetensors(tensors, path, {**header, HEADER: json.dumps(known)})


def load(path: Path, model: Any, tasks: Sequence[Task], clip: Any = None) -> Stats:
    """Read statistics for LoRAs at hand, in whichever order these are.

    Raises:
        StatisticsError: damaged or no file of statistics; measured on another model or with other LoRAs, and which.
    """
    known, collections = _header(path)
    kind = type(model.model).__name__
    if kind != collections[0].model:
        raise StatisticsError(f"{path.name} was measured on {collections[0].model}, but this model is {kind}.")
    if known["with_clip"] and clip is None:
        raise StatisticsError(f"{path.name} was collected with clip connected; connect it here, too.")
    clip = clip if known["with_clip"] else None
    loras = read_tasks(tasks, model, clip, collections[0].expand_rank, parse_rules(collections[0].layers))
    tensors, header = read_safetensors(path, StatisticsError)
    calibration = _read(tensors, header, [lora.lora for lora in loras], loras, path.name)
    text = None
    if f"{TEXT}ssr.format" in header:
        of_text = [lora.text_lora for lora in loras]
        text = spelt_out(_read(_below(TEXT, tensors), _below(TEXT, header), of_text, loras, path.name))
    order = _order(header, calibration.loras)
    collections = [one.reordered(order) for one in collections]
    return Stats(
        *(tuple(loras), calibration, text, known["with_clip"], tuple(known["silent"])),
        *(describe(model, loras, collections), tuple(collections)),
        notes=tuple(known["notes"]),
    )


def _header(path: Path) -> tuple[dict[str, Any], list[Circumstances]]:
    header = read_metadata(path, StatisticsError)
    if HEADER not in header:
        raise StatisticsError(f"{path.name} is no file of SSR Save Stats.")
    try:
        known = json.loads(header[HEADER])
        collections = [Circumstances.from_json(one) for one in known["collections"]]
        told = {"with_clip": known["with_clip"], "silent": known["silent"], "notes": known.get("notes", [])}
        return told, collections
    except (KeyError, TypeError, ValueError) as error:
        raise StatisticsError(f"{path.name} is damaged ({error!r}); collect and save the statistics again.") from error


def _read(
    tensors: Mapping[str, Tensor],
    header: Mapping[str, str],
    loras: Sequence[Lora],
    loaded: Sequence[LoadedLora],
    name: str,
) -> Calibration:
    try:
        return statistics_from(tensors, header, loras, name)
    except StatisticsError as error:
        if hints := _hints(header, loaded):
            raise StatisticsError(f"{error} {hints}") from error
        raise


def _hints(header: Mapping[str, str], loaded: Sequence[LoadedLora]) -> str:
    """Why the very same file may come out as another LoRA here."""
    hashes = {lora.get("sha256") for lora in json.loads(header.get("ssr.loras", "[]"))}
    hints = []
    for lora in loaded:
        if lora.source.get("sha256") not in hashes or not lora.account.expanded:
            continue
        if kinds := sorted({one.kind for one in lora.account.expanded if one.on_base}):
            hints.append(
                f"{lora.task.name} is the same file, but its {' and '.join(kinds)} depend on the base's weights and "
                "its strength: use the base it was collected on, with the same LoRAs on it, at the same strength."
            )
        else:
            hints.append(f"{lora.task.name} is the same file; made low-rank on another device, it differs by rounding.")
    return " ".join(hints)


def _order(header: Mapping[str, str], loras: Sequence[Lora]) -> tuple[int, ...]:
    """For each of the LoRAs at hand, where it stands in the file."""
    saved = json.loads(header["ssr.loras"])
    return find_order([lora["name"] for lora in saved], [lora["fingerprint"] for lora in saved], loras)


def _below(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {key.removeprefix(prefix): value for key, value in values.items() if key.startswith(prefix)}
