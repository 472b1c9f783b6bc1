"""Statistics files: what was measured with some LoRAs, without the LoRAs themselves, as safetensors."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .calibration import Calibration
from .correction import Correction
from .errors import StatisticsError
from .grams import Grams
from .lora import Lora, find_order
from .site import Site, canonical
from .storage import read_safetensors, write_safetensors
from .subspace import Subspace, join_loras
from .sufficient_statistics import SufficientStatistics


def save_statistics(
    calibration: Calibration, path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None
) -> None:
    """Write what was measured, without the LoRAs themselves. The file appears whole or not at all."""
    tensors, header = statistics_state(calibration)
    write_safetensors(tensors, path, {**(metadata or {}), **header})


def statistics_state(calibration: Calibration) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What was measured as tensors and a header of strings: the upper triangles only."""
    tensors, sites = _context_rows(calibration), []
    for index, (site, statistics) in enumerate(calibration.statistics.items()):
        tensors |= {f"gram/{index}/{task}": gram for task, gram in enumerate(statistics.grams.packed) if len(gram)}
        where = [site.module, site.start, site.stop, site.out_features]
        counts: dict[str, tuple[float, ...]] = {"tokens": statistics.tokens, "samples": statistics.samples}
        levels = [sorted(levels) for levels in statistics.levels]
        if correction := calibration.corrections.get(site):
            tensors |= {f"correction.gram/{index}/{k}": g for k, g in enumerate(correction.grams.packed) if len(g)}
            tensors |= {f"correction.target/{index}/{k}": t for k, t in enumerate(correction.targets) if len(t)}
            counts["strengths"] = correction.strengths
        sites.append({"site": where, "fingerprint": statistics.fingerprint, "levels": levels, **counts})
    loras = [
        {**lora.source, "name": lora.name, "strength": lora.strength, "fingerprint": lora.fingerprint}
        for lora in calibration.loras
    ]
    return tensors, {"ssr.format": "statistics 1", "ssr.sites": json.dumps(sites), "ssr.loras": json.dumps(loras)}


def load_statistics(path: str | os.PathLike[str], loras: Sequence[Lora]) -> Calibration:
    """Read what was measured with these LoRAs, in whichever order they are given.

    Raises:
        StatisticsError: missing, damaged or no statistics file; measured with other LoRAs.
    """
    file = Path(path)
    return statistics_from(*read_safetensors(file, StatisticsError), loras, file.name)


def statistics_from(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], loras: Sequence[Lora], file: str
) -> Calibration:
    """What `statistics_state` gave, read with these LoRAs, in whichever order they are given; errors name `file`."""
    if metadata.get("ssr.format") != "statistics 1":
        raise StatisticsError(f"{file} is no statistics file of this package; collect and save them again.")
    damaged = (KeyError, TypeError, ValueError, RuntimeError)
    try:
        entries = [(Site(*entry["site"]), entry) for entry in json.loads(metadata["ssr.sites"])]
        known = {key: [lora[key] for lora in json.loads(metadata["ssr.loras"])] for key in ("name", "fingerprint")}
    except damaged as error:
        raise StatisticsError(f"{file} is damaged ({error!r}); collect and save the statistics again.") from error
    try:
        order = find_order(known["name"], known["fingerprint"], loras)
    except StatisticsError as error:
        raise StatisticsError(f"{file} was {error}") from None
    saved = [loras[order.index(task)] for task in range(len(order))]
    modules = {canonical(site.module): site.module for site, _ in entries}
    saved = [lora.renamed({m: modules.get(canonical(m), m) for m in lora.modules}) for lora in saved]
    joined = join_loras(saved)
    other = StatisticsError(f"{file} does not hold the layers of these LoRAs; collect and save them again.")
    if {site for site, _ in entries} != {site for site, space in joined.items() if space.is_routed}:
        raise other
    subspaces = {}
    for site, space in joined.items():
        context = tensors.get(f"context/{site.module}") if space.is_routed else None
        if context is not None and (context.ndim != 2 or context.shape[1] != space.down.shape[1]):
            raise other
        subspaces[site] = space if context is None else space.with_context(context)
    for site, entry in entries:
        if entry.get("fingerprint") != subspaces[site].fingerprint:
            raise other
    try:
        read = {s: _statistics(tensors, i, e, subspaces[s]) for i, (s, e) in enumerate(entries)}
        corrections = {
            s: _correction(tensors, i, e, subspaces[s]) for i, (s, e) in enumerate(entries) if "strengths" in e
        }
    except damaged as error:
        raise StatisticsError(f"{file} is damaged ({error!r}); collect and save the statistics again.") from error
    for site, statistics in read.items():
        statistics.check(subspaces[site], f"{file}: {site}")
    for site, correction in corrections.items():
        correction.check(subspaces[site], f"{file}: {site}")
    return Calibration(tuple(saved), subspaces, read, corrections).reordered(order)


def _context_rows(calibration: Calibration) -> dict[str, Tensor]:
    """The context rows of each module, (context, in); its sites share them."""
    rows = {}
    for site, space in calibration.subspaces.items():
        if space.context:
            rows[f"context/{site.module}"] = space.context_rows.contiguous()
    return rows


def _statistics(
    tensors: Mapping[str, Tensor], index: int, entry: Mapping[str, Any], space: Subspace
) -> SufficientStatistics:
    tokens, samples = (tuple(map(int, entry[name])) for name in ("tokens", "samples"))
    levels = tuple(frozenset(map(float, seen)) for seen in entry["levels"])
    if not len(tokens) == len(samples) == len(levels) == len(space.ranks):
        raise ValueError(f"a site has counts of {len(tokens)} LoRAs")
    grams = _grams(tensors, f"gram/{index}", [n > 0 for n in tokens], space)
    return SufficientStatistics(grams, tokens, space.fingerprint, samples, levels)


def _correction(tensors: Mapping[str, Tensor], index: int, entry: Mapping[str, Any], space: Subspace) -> Correction:
    ran = [f"correction.target/{index}/{task}" in tensors for task in range(len(space.ranks))]
    shape = (len(space.up), len(space.down))
    targets = tuple(
        _checked(tensors[f"correction.target/{index}/{task}"], shape) if there else torch.zeros(0, 0)
        for task, there in enumerate(ran)
    )
    strengths = tuple(map(float, entry["strengths"]))
    return Correction(_grams(tensors, f"correction.gram/{index}", ran, space), targets, space.fingerprint, strengths)


def _grams(tensors: Mapping[str, Tensor], prefix: str, there: Sequence[bool], space: Subspace) -> Grams:
    size = len(space.down)
    grams = Grams.zeros(len(there), size)
    for task in (task for task, seen in enumerate(there) if seen):
        grams = grams.replaced(task, _checked(tensors[f"{prefix}/{task}"], (size * (size + 1) // 2,)))
    return grams


def _checked(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    if tuple(tensor.shape) != shape or not tensor.is_floating_point():
        raise ValueError(f"a tensor is {tensor.dtype} {tuple(tensor.shape)}, not floating point {shape}")
    return tensor
