"""Statistics files: what was measured with some LoRAs, without the LoRAs themselves, as safetensors."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import StatisticsError
from ..lora.lora import Lora, find_order
from ..lora.site import Site, canonical
from ..lora.subspace import Subspace, join_loras
from ..statistics.calibration import Calibration
from ..statistics.case import Case, singles
from ..statistics.correction import NOT_RUN, Correction
from ..statistics.grams import Grams, unpack
from ..statistics.sufficient_statistics import SufficientStatistics
from .statistics_entry import Entry, check_sums
from .storage import read_safetensors, write_safetensors

PLAIN, WITH_CASES = "statistics 1", "statistics 2"  # formats: each LoRA by itself, or combinations, too


def save_statistics(
    calibration: Calibration, path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None
) -> None:
    """Write what was measured, without the LoRAs themselves. The file appears whole or not at all."""
    tensors, header = statistics_state(calibration)
    write_safetensors(tensors, path, {**(metadata or {}), **header})


def statistics_state(calibration: Calibration) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What was measured as tensors and a header of strings: the upper triangles only.

    Raises:
        StatisticsError: nothing was measured.
    """
    calibration.check_measured()
    tensors, sites = _context_rows(calibration), []
    for index, (site, statistics) in enumerate(calibration.statistics.items()):
        tensors |= {f"gram/{index}/{task}": gram for task, gram in enumerate(statistics.grams.packed) if len(gram)}
        where = [site.module, site.start, site.stop, site.out_features]
        counts: dict[str, tuple[float, ...] | bool] = {"tokens": statistics.tokens, "samples": statistics.samples}
        levels = [sorted(levels) for levels in statistics.levels]
        if correction := calibration.corrections.get(site):
            tensors |= {f"correction.gram/{index}/{k}": g for k, g in enumerate(correction.grams.packed) if len(g)}
            tensors |= {f"correction.target/{index}/{k}": t for k, t in enumerate(correction.targets) if len(t)}
            counts |= {"strengths": correction.strengths, **({"folded": True} if correction.is_folded else {})}
        sites.append({"site": where, "fingerprint": statistics.fingerprint, "levels": levels, **counts})
    loras = [
        {**lora.source, "name": lora.name, "strength": lora.strength, "fingerprint": lora.fingerprint}
        for lora in calibration.loras
    ]
    cases = [case.speakers for case in calibration.cases]
    plain = len(cases) == len(loras)  # as all were in format 1, and are still written
    return _apart(tensors), {
        **({"ssr.format": PLAIN} if plain else {"ssr.format": WITH_CASES, "ssr.cases": json.dumps(cases)}),
        "ssr.sites": json.dumps(sites),
        "ssr.loras": json.dumps(loras),
    }


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
    _check_format(metadata.get("ssr.format", ""), file)
    try:
        described = json.loads(metadata["ssr.loras"])
        names, fingerprints = ([str(lora[key]) for lora in described] for key in ("name", "fingerprint"))
        cases = _cases(json.loads(metadata.get("ssr.cases", "null")), len(names))
        entries = [Entry.parse(facts, len(names), len(cases)) for facts in json.loads(metadata["ssr.sites"])]
        if len({entry.site for entry in entries}) != len(entries):
            raise ValueError("a site is named twice")
    except (LookupError, TypeError, ValueError, RecursionError, OverflowError, StatisticsError) as error:
        raise _damaged(file, error) from error
    try:
        order = find_order(names, fingerprints, loras)
    except StatisticsError as error:
        raise StatisticsError(f"{file} was {error}") from None
    saved = [loras[order.index(task)] for task in range(len(order))]
    modules = {canonical(entry.site.module): entry.site.module for entry in entries}
    saved = [lora.renamed({m: modules.get(canonical(m), m) for m in lora.modules}) for lora in saved]
    subspaces = _with_contexts(join_loras(saved), tensors, file)
    other = StatisticsError(f"{file} does not hold the layers of these LoRAs; collect and save them again.")
    if {entry.site for entry in entries} != {site for site, space in subspaces.items() if space.is_routed}:
        raise other
    if any(entry.fingerprint != subspaces[entry.site].fingerprint for entry in entries):
        raise other
    try:
        read = {e.site: _statistics(tensors, i, e, subspaces[e.site]) for i, e in enumerate(entries)}
        corrections = {
            e.site: _correction(tensors, i, e, e.strengths, subspaces[e.site])
            for i, e in enumerate(entries)
            if e.strengths is not None
        }
    except (LookupError, ValueError) as error:
        raise _damaged(file, error) from error
    for site, statistics in read.items():
        statistics.check(subspaces[site], f"{file}: {site}")
    for site, correction in corrections.items():
        correction.check(subspaces[site], f"{file}: {site}")
    return Calibration(tuple(saved), subspaces, read, corrections, cases).reordered(order)


def _check_format(format_: str, file: str) -> None:
    if format_ in (PLAIN, WITH_CASES):
        return
    if format_.startswith("statistics "):
        raise StatisticsError(f"{file} was written by a newer version of this package ({format_}); update it.")
    raise StatisticsError(f"{file} is no statistics file of this package; collect and save them again.")


def _cases(told: Any, loras: int) -> tuple[Case, ...]:
    """What a header tells of who speaks; nothing in files of single LoRAs."""
    if told is None:
        return singles(loras)
    cases = tuple(Case.of(speakers, loras) for speakers in told)
    if cases[:loras] != singles(loras) or len(set(cases)) != len(cases):
        raise ValueError(f"its cases are {str(told)[:100]}")
    return cases


def _damaged(file: str, error: Exception) -> StatisticsError:
    return StatisticsError(f"{file} is damaged ({str(error)[:200]}); collect and save the statistics again.")


def _with_contexts(joined: Mapping[Site, Subspace], tensors: Mapping[str, Tensor], file: str) -> dict[Site, Subspace]:
    """The subspaces with the context rows that a statistics file has for their modules."""
    found = {}
    for site, space in joined.items():
        context = tensors.get(f"context/{site.module}") if space.is_routed else None
        if context is not None and (context.ndim != 2 or context.shape[1] != space.down.shape[1]):
            raise StatisticsError(
                f"{file} was measured with other LoRAs ({site} has context rows of {tuple(context.shape)} and "
                f"{space.down.shape[1]} inputs); collect them again."
            )
        found[site] = space if context is None else space.with_context(context)
    return found


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each in memory of its own, as safetensors wants it: sites that see the same share their sums."""
    seen: set[int] = set()
    apart = {}
    for key, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        apart[key] = tensor.clone() if place in seen else tensor
        seen.add(place)
    return apart


def _context_rows(calibration: Calibration) -> dict[str, Tensor]:
    """The context rows of each module, (context, in); its sites share them."""
    rows = {}
    for site, space in calibration.subspaces.items():
        if space.context:
            rows[f"context/{site.module}"] = space.context_rows.contiguous()
    return rows


def _statistics(tensors: Mapping[str, Tensor], index: int, entry: Entry, space: Subspace) -> SufficientStatistics:
    grams = _grams(tensors, f"gram/{index}", [n > 0 for n in entry.tokens], entry.site, space)
    return SufficientStatistics(grams, entry.tokens, entry.fingerprint, entry.samples, entry.levels)


def _correction(
    tensors: Mapping[str, Tensor], index: int, entry: Entry, strengths: tuple[float, ...], space: Subspace
) -> Correction:
    ran = [f"correction.target/{index}/{case}" in tensors for case in range(len(entry.tokens))]
    targets = tuple(
        _kept(_expected(tensors[f"correction.target/{index}/{case}"], (len(space.up), len(space.down)), entry.site))
        if there
        else NOT_RUN
        for case, there in enumerate(ran)
    )
    grams = _grams(tensors, f"correction.gram/{index}", ran, entry.site, space)
    return Correction(grams, targets, entry.fingerprint, strengths, entry.is_folded)


def _grams(tensors: Mapping[str, Tensor], prefix: str, there: Sequence[bool], site: Site, space: Subspace) -> Grams:
    size = len(space.down)
    grams = Grams.zeros(len(there), size)
    for task in (task for task, seen in enumerate(there) if seen):
        packed = _expected(tensors[f"{prefix}/{task}"], (size * (size + 1) // 2,), site)
        grams = grams.replaced(task, packed if packed.dtype == torch.float32 else packed.double())
        check_sums(unpack(packed, size), site)
    return grams


def _expected(tensor: Tensor, shape: tuple[int, ...], site: Site) -> Tensor:
    if tuple(tensor.shape) != shape or not tensor.is_floating_point():
        raise ValueError(f"{site} has sums of {tuple(tensor.shape)} {tensor.dtype}, not {shape}")
    return tensor


def _kept(target: Tensor) -> Tensor:
    return target if target.dtype == torch.bfloat16 else target.float()
