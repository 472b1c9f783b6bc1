"""Files: LoRAs and statistics as safetensors, and what is wrong with those that cannot be read."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from .calibration import Calibration
from .correction import Correction
from .entry import Entry, check_sums
from .errors import LoraError, StatisticsError
from .lora import Lora
from .low_rank_update import LowRankUpdate
from .site import Site, Updates, canonical, join_rows, sum_by_site
from .storage import read_safetensors, sha256, write_safetensors
from .subspace import Subspace, join_loras
from .sufficient_statistics import SufficientStatistics

_HALVES = (  # down, up: kohya, PEFT, diffusers
    (".lora_down.weight", ".lora_up.weight"),
    (".lora_A.weight", ".lora_B.weight"),
    (".lora_A.default.weight", ".lora_B.default.weight"),
    (".lora.down.weight", ".lora.up.weight"),
    ("_lora.down.weight", "_lora.up.weight"),
)
_PREFIXES = ("base_model.model.", "diffusion_model.", "transformer.", "unet.", "lora_unet_", "lora_transformer_")


def load_lora(path: str | os.PathLike[str], strength: float = 1.0) -> Lora:
    """Read a LoRA file whose keys name a model's modules, in kohya's, PEFT's or ComfyUI's generic spelling.

    Raises:
        LoraError: missing, damaged or no safetensors file; half a pair; adapters that are not plain LoRA.
    """
    file = Path(path)
    tensors, metadata = read_safetensors(file, LoraError)
    pairs, rest = read_pairs(tensors, file.name)
    if rest:
        raise LoraError(
            f"{file.name} holds tensors that are not plain LoRA, such as {rest[0]!r} ({len(rest)} in all); "
            "expand LoHa, LoKr or DoRA to plain LoRA first."
        )
    if not pairs:
        raise LoraError(f"{file.name} holds no LoRA: it has no pair of down and up factors.")
    # a file may name one module in two spellings
    updates = sum_by_site((Site.whole(_strip(key), update.out_features), update) for key, update in pairs.items())
    source = {"file": file.name, "sha256": sha256(file), **({"metadata": json.dumps(metadata)} if metadata else {})}
    return Lora(file.stem, updates, strength, source)


def read_pairs(tensors: Mapping[str, Tensor], name: str) -> tuple[dict[str, LowRankUpdate], list[str]]:
    """The plain LoRA pairs of a state dict by key prefix, and the keys that belong to none.

    Raises:
        LoraError: half a pair, or a damaged one; names `name` and the key.
    """
    found = find_pairs(tensors, name)
    pairs = {}
    for prefix, (down, up) in found.items():
        alpha = tensors.get(f"{prefix}.alpha")
        mid = tensors.get(f"{prefix}.lora_mid.weight")
        pairs[prefix] = LowRankUpdate.from_factors(
            tensors[down], tensors[up], None if alpha is None else float(alpha), mid, f"{name}: {prefix}"
        )
    ends = (".alpha", ".lora_mid.weight")
    used = {key for prefix, halves in found.items() for key in (*halves, *(prefix + end for end in ends))}
    return pairs, [key for key in tensors if key not in used]


def find_pairs(tensors: Mapping[str, Tensor], name: str) -> dict[str, tuple[str, str]]:
    """By key prefix, the keys of down and up of each pair. Their values are not looked at, but for alpha's size.

    Raises:
        LoraError: half a pair, or an alpha that is not one number; names `name` and the key.
    """
    found: dict[str, tuple[str, str]] = {}
    for key in tensors:
        for ends in _HALVES:
            end = next((end for end in ends if key.endswith(end)), None)
            if end is None:
                continue
            prefix = key.removesuffix(end)
            down, up = (prefix + half for half in ends)
            if down not in tensors or up not in tensors:
                other = up if key == down else down
                raise LoraError(f"{name}: {key} has no other half {other}; the file is incomplete.")
            alpha = tensors.get(f"{prefix}.alpha")
            if alpha is not None and alpha.numel() != 1:
                raise LoraError(f"{name}: {prefix}.alpha holds {alpha.numel()} numbers, not one; it is damaged.")
            found[prefix] = (down, up)
    return found


def to_state_dict(
    updates: Updates, prefix: str = "diffusion_model.", dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Updates in the generic spelling that ComfyUI loads for every model: `lora_A`, `lora_B`, alpha = rank.

    Raises:
        LoraError: `dtype` cannot hold the values.
    """
    state: dict[str, Tensor] = {}
    for module, update in join_rows(updates).items():
        up = update.up.reshape(*update.up.shape, *(1,) * (update.down.ndim - 2))
        for end, value in (("lora_A", update.down), ("lora_B", up)):
            stored = value.to(dtype).contiguous().clone()
            if not torch.isfinite(stored).all():
                raise LoraError(f"{prefix}{module}: values do not fit into {dtype}; save as bfloat16 or float32.")
            state[f"{prefix}{module}.{end}.weight"] = stored
        state[f"{prefix}{module}.alpha"] = torch.tensor(float(update.rank))
    return state


def save_lora(
    updates: Updates,
    path: str | os.PathLike[str],
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype = torch.float32,
    prefix: str = "diffusion_model.",
) -> None:
    """Write a merged LoRA. The file appears whole or not at all."""
    write_safetensors(to_state_dict(updates, prefix, dtype), path, metadata or {})


def save_statistics(calibration: Calibration, path: str | os.PathLike[str]) -> None:
    """Write what was measured, without the LoRAs themselves: float64, the upper triangles only."""
    tensors, sites = _context_rows(calibration), []
    for index, (site, statistics) in enumerate(calibration.statistics.items()):
        rows, columns = torch.triu_indices(*statistics.gram.shape[1:]).unbind()
        tensors[f"gram/{index}"] = statistics.gram[:, rows, columns].contiguous()
        where = [site.module, site.start, site.stop, site.out_features]
        counts: dict[str, tuple[float, ...]] = {"tokens": statistics.tokens, "samples": statistics.samples}
        levels = [sorted(levels) for levels in statistics.levels]
        if correction := calibration.corrections.get(site):
            tensors[f"correction.gram/{index}"] = correction.gram.contiguous()
            tensors[f"correction.target/{index}"] = correction.target.contiguous()
            counts["strengths"] = correction.strengths
        sites.append({"site": where, "fingerprint": statistics.fingerprint, "levels": levels, **counts})
    loras = [{"name": lora.name, "strength": lora.strength, **lora.source} for lora in calibration.loras]
    header = {"ssr.format": "statistics 1", "ssr.sites": json.dumps(sites), "ssr.loras": json.dumps(loras)}
    write_safetensors(tensors, path, header)


def load_statistics(path: str | os.PathLike[str], loras: Sequence[Lora]) -> Calibration:
    """Read what was measured with these LoRAs, given in the same order.

    Raises:
        StatisticsError: missing, damaged or no statistics file; measured with other LoRAs.
    """
    file = Path(path)
    tensors, metadata = read_safetensors(file, StatisticsError)
    if metadata.get("ssr.format") != "statistics 1":
        raise StatisticsError(f"{file.name} is no statistics file of this package; collect and save them again.")
    try:
        names = [str(lora["name"]) for lora in json.loads(metadata["ssr.loras"])]
        entries = [Entry.parse(facts, len(names)) for facts in json.loads(metadata["ssr.sites"])]
        indices = {entry.site: index for index, entry in enumerate(entries)}
        if len(indices) != len(entries):
            raise ValueError("a site is named twice")
    except (LookupError, TypeError, ValueError, RecursionError, OverflowError) as error:
        raise _damaged(file, error) from error
    other = StatisticsError(f"{file.name} was measured with other LoRAs ({', '.join(names)}); collect them again.")
    if len(names) != len(loras):
        raise other
    modules = {canonical(entry.site.module): entry.site.module for entry in entries}
    loras = [lora.renamed({m: modules.get(canonical(m), m) for m in lora.modules}) for lora in loras]
    subspaces = _with_contexts(join_loras(loras), tensors, file)
    if indices.keys() != {site for site, space in subspaces.items() if space.is_routed}:
        raise other
    if any(entry.fingerprint != subspaces[entry.site].fingerprint for entry in entries):
        raise other
    try:
        read = {e.site: _unpack(tensors[f"gram/{i}"], e, subspaces[e.site]) for i, e in enumerate(entries)}
        corrections = {
            e.site: _correction(tensors, i, e, e.strengths, subspaces[e.site])
            for i, e in enumerate(entries)
            if e.strengths is not None
        }
    except (LookupError, ValueError) as error:
        raise _damaged(file, error) from error
    for site, statistics in read.items():
        statistics.check(subspaces[site], f"{file.name}: {site}")
    for site, correction in corrections.items():
        correction.check(subspaces[site], f"{file.name}: {site}")
    return Calibration(tuple(loras), subspaces, read, corrections)


def _damaged(file: Path, error: Exception) -> StatisticsError:
    return StatisticsError(f"{file.name} is damaged ({str(error)[:200]}); collect and save the statistics again.")


def _with_contexts(joined: Mapping[Site, Subspace], tensors: Mapping[str, Tensor], file: Path) -> dict[Site, Subspace]:
    """The subspaces with the context rows that a statistics file has for their modules."""
    found = {}
    for site, space in joined.items():
        context = tensors.get(f"context/{site.module}") if space.is_routed else None
        if context is not None and (context.ndim != 2 or context.shape[1] != space.down.shape[1]):
            raise StatisticsError(
                f"{file.name} was measured with other LoRAs ({site} has context rows of {tuple(context.shape)} and "
                f"{space.down.shape[1]} inputs); collect them again."
            )
        found[site] = space if context is None else space.with_context(context)
    return found


def _context_rows(calibration: Calibration) -> dict[str, Tensor]:
    """The context rows of each module, (context, in); its sites share them."""
    rows = {}
    for site, space in calibration.subspaces.items():
        if space.context:
            rows[f"context/{site.module}"] = space.context_rows.contiguous()
    return rows


def _unpack(packed: Tensor, entry: Entry, space: Subspace) -> SufficientStatistics:
    size = len(space.down)
    _expect(packed, (len(space.ranks), size * (size + 1) // 2), entry.site)
    rows, columns = torch.triu_indices(size, size).unbind()
    gram = torch.zeros(packed.shape[0], size, size, dtype=torch.float64)
    gram[:, rows, columns] = packed.double()
    gram[:, columns, rows] = packed.double()
    check_sums(gram, entry.site)
    return SufficientStatistics(gram, entry.tokens, entry.fingerprint, entry.samples, entry.levels)


def _correction(
    tensors: Mapping[str, Tensor], index: int, entry: Entry, strengths: tuple[float, ...], space: Subspace
) -> Correction:
    gram, target = (tensors[f"correction.{kind}/{index}"].double() for kind in ("gram", "target"))
    tasks, size = len(space.ranks), len(space.down)
    _expect(gram, (tasks, size, size), entry.site)
    _expect(target, (tasks, len(space.up), size), entry.site)
    check_sums(gram, entry.site)
    return Correction(gram, target.float(), entry.fingerprint, strengths)


def _expect(tensor: Tensor, shape: tuple[int, ...], site: Site) -> None:
    if tuple(tensor.shape) != shape or not tensor.is_floating_point():
        raise ValueError(f"{site} has sums of {tuple(tensor.shape)} {tensor.dtype}, not {shape}")


def _strip(key: str) -> str:
    """A key without the first of the usual prefixes that it has; only one, a module may be called like another."""
    return next((key.removeprefix(prefix) for prefix in _PREFIXES if key.startswith(prefix)), key)
