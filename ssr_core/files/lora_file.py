"""Files: LoRAs as safetensors, read with checks and written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..errors import LoraError
from ..lora.lora import Lora
from ..lora.low_rank_update import LowRankUpdate
from ..lora.site import Site, Updates, join_rows, sum_by_site
from .peft_config import read_peft_config
from .storage import read_safetensors, sha256, write_safetensors

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
    pairs, rest = read_pairs({**_kept_alphas(file, tensors, metadata), **tensors}, file.name)
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


def _kept_alphas(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Tensor]:
    """Alphas that are not among the tensors but in what PEFT or diffusers wrote beside them."""
    alphas = {}
    for prefix, (down, _) in find_pairs(tensors, file.name).items():
        if config := read_peft_config(file, metadata, prefix.removeprefix("base_model.model.")):
            alphas[f"{prefix}.alpha"] = torch.tensor(config.alpha_of(prefix, tensors[down].shape[0]))
    return alphas


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
    of_module: dict[str, dict[Site, LowRankUpdate]] = {}
    for site, update in updates.items():
        of_module.setdefault(site.module, {})[site] = update
    for module, pieces in of_module.items():  # one at a time: together they are as large as the result
        update = join_rows(pieces)[module]
        if dtype == torch.float16:  # the smallest values of some LoRAs are below what it holds in full
            update = LowRankUpdate(update.down.float(), update.up.float()).balanced()
        up = update.up.reshape(*update.up.shape, *(1,) * (update.down.ndim - 2))
        for end, value in (("lora_A", update.down), ("lora_B", up)):
            stored = value.to(dtype).contiguous()
            if stored.untyped_storage()._cdata == value.untyped_storage()._cdata:
                stored = stored.clone()
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


def _strip(key: str) -> str:
    """A key without the first of the usual prefixes that it has; only one, a module may be called like another."""
    return next((key.removeprefix(prefix) for prefix in _PREFIXES if key.startswith(prefix)), key)
