"""PeftConfig: the scales of a LoRA that PEFT and diffusers keep beside its tensors instead of among them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KEY = "lora_adapter_metadata"  # where diffusers keeps it in a safetensors file, for each network under its prefix
SIDE_FILE = "adapter_config.json"  # where PEFT's save_pretrained keeps it


@dataclass(frozen=True)
class PeftConfig:
    """Of `peft.LoraConfig`, what says how strong a LoRA is."""

    alpha: float
    patterns: Mapping[str, float]  # of layers with another alpha, by regular expressions for the end of their names
    rank_stabilized: bool  # scaled by alpha / sqrt(rank)

    def alpha_of(self, module: str, rank: int) -> float:
        """The alpha of kohya's files, which means a scale of alpha / rank."""
        matching = (value for key, value in self.patterns.items() if re.match(rf"(.*\.)?({key})$", module))
        alpha = next(matching, self.alpha)
        return alpha * rank**0.5 if self.rank_stabilized else alpha


def read_peft_config(path: Path, metadata: Mapping[str, str], module: str) -> PeftConfig | None:
    """What is known about a module of the file at `path`; None if neither PEFT nor diffusers left a word."""
    try:
        if KEY in metadata:
            return _of_network(json.loads(metadata[KEY]), module)
        side = path.with_name(SIDE_FILE)
        if path.name == "adapter_model.safetensors" and side.is_file():
            return _config(json.loads(side.read_text(encoding="utf-8")))
    except (ValueError, AttributeError):
        return None  # somebody else's metadata under the same name
    return None


def _of_network(fields: Mapping[str, Any], module: str) -> PeftConfig | None:
    """`fields` are those of one network, or of several, each name then with its network's prefix."""
    network = module.partition(".")[0] + "."
    own = {key.removeprefix(network): value for key, value in fields.items() if key.startswith(network)}
    return _config(own or fields)


def _config(fields: Mapping[str, Any]) -> PeftConfig | None:
    if not isinstance(fields.get("lora_alpha"), (int, float)):
        return None
    return PeftConfig(float(fields["lora_alpha"]), fields.get("alpha_pattern") or {}, bool(fields.get("use_rslora")))
