"""Where a merged LoRA comes from: the metadata of its file, in the field's own keys where there are any.

Values are strings, as safetensors wants them. `modelspec.*` follows the Stability AI model metadata standard, `ss_*`
the keys that kohya's trainers write and other tools read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import PurePath
from typing import Any

import comfy.model_base

from ...ssr_core import MergeSettings, Report
from ..reading.loaded_lora import LoadedLora
from ..reading.training_notes import TRIGGER
from .circumstances import Circumstances

_ARCHITECTURES = (  # only where the class of the model leaves no doubt: Flux may be dev or schnell, SD3 of any size
    ("SDXLRefiner", "stable-diffusion-xl-v1-refiner/lora"),
    ("SDXL", "stable-diffusion-xl-v1-base/lora"),
)


def describe(model: Any, loras: Sequence[LoadedLora], collections: Sequence[Circumstances]) -> dict[str, str]:
    """What is known once the statistics are collected. The prompts are not told."""
    sources = [
        {
            **lora.source,
            "strength": lora.task.strength,
            "strength_clip": lora.task.text_strength,
        }
        for lora in loras
    ]
    metadata = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.implementation": "https://github.com/comfyanonymous/ComfyUI",
        "ssr.sources": json.dumps(sources),
        **_credits(sources),
    }
    if architecture := _architecture(model.model, sources):
        metadata["modelspec.architecture"] = architecture
    if base := _common(sources, "ss_base_model_version"):
        metadata["ss_base_model_version"] = base
    return with_collections(metadata, collections)


def _credits(sources: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Whom a merge is made of, and the words that call them."""
    triggers = [str(s[TRIGGER]) for s in sources if s.get(TRIGGER)]
    found = {"modelspec.merged_from": ", ".join(str(source["file"]) for source in sources)}
    return found | ({TRIGGER: ", ".join(triggers)} if triggers else {})


def with_collections(provenance: Mapping[str, str], collections: Sequence[Circumstances]) -> dict[str, str]:
    """How it was measured: once, or several times."""
    sources = json.loads(provenance["ssr.sources"])
    for task, source in enumerate(sources):
        source["prompts"] = sum(collection.counts[task] for collection in collections)
    calibration = [
        {
            **{**one.sampling, "context": one.context, "refine": one.refine, "model": one.model},
            "combinations": [{"loras": heard.speakers, "prompts": heard.count} for heard in one.combinations],
        }
        for one in collections
    ]
    return {
        **provenance,
        "ssr.sources": json.dumps(sources),
        "ssr.calibration": json.dumps(calibration[0] if len(calibration) == 1 else calibration),
    }


def with_settings(
    provenance: Mapping[str, str],
    settings: MergeSettings,
    report: Report,
    strengths: Sequence[float] | None = None,
) -> dict[str, str]:
    """What is known once the merge is made.

    Args:
        strengths: of all sources, where the report is not of those at strength 0.
    """
    sources = json.loads(provenance["ssr.sources"])
    for source, strength in zip(sources, report.strengths if strengths is None else strengths, strict=True):
        if source["strength"] and not strength:  # turned off as a whole
            source["strength_clip"] = 0.0
        source["strength"] = strength
    return {
        **{key: value for key, value in provenance.items() if key != TRIGGER},
        **_credits([source for source in sources if source["strength"] or source["strength_clip"]]),
        "modelspec.title": " + ".join(PurePath(name).stem for name in report.names),
        "ss_network_module": "networks.lora",
        "ss_network_dim": "Dynamic",
        "ss_network_alpha": "Dynamic",
        "ssr.sources": json.dumps(sources),
        "ssr.settings": json.dumps(asdict(settings)),
    }


def of_part(metadata: Mapping[str, str], task: int) -> dict[str, str]:
    """Of what is left of one LoRA where a merge is split: the others stay named, the trigger words are its own."""
    source = json.loads(metadata["ssr.sources"])[task]
    kept = {key: value for key, value in metadata.items() if key != TRIGGER}
    own = {TRIGGER: trigger} if (trigger := source.get(TRIGGER)) else {}
    return {**kept, **own, "modelspec.title": PurePath(source["file"]).stem, "ssr.part": json.dumps(source)}


def _architecture(model: Any, sources: Sequence[Mapping[str, Any]]) -> str | None:
    """What the sources agree on, or what the model certainly is."""
    if agreed := _common(sources, "modelspec.architecture"):
        return agreed
    for name, architecture in _ARCHITECTURES:
        if type(model) is getattr(comfy.model_base, name, None):
            return architecture
    return None


def _common(sources: Sequence[Mapping[str, Any]], key: str) -> str | None:
    values = {source.get(key) for source in sources}
    return str(values.pop()) if len(values) == 1 and None not in values else None
