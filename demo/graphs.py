# SPDX-License-Identifier: Apache-2.0
"""The demo's comparisons as ComfyUI graphs in API format, out of stock nodes (and one that measures)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .scenes import LORAS, Row

Graph = dict[str, dict[str, Any]]

STEPS = 12

REFERENCE = "LoRAs asked for"  # the one alone, or those that a joint prompt asks for, stacked as a person would
MERGE, POLISHED = "SSR merge", "polished"
COLUMNS = ("base", REFERENCE, "plain stack", "stack at 0.7", MERGE, POLISHED)


def comparison(rows: Sequence[Row], merged: Mapping[str, str]) -> tuple[Graph, dict[str, tuple[int, int]]]:
    """A picture for every row and column, and which node saves which: {node id: (row, column)}.

    Args:
        merged: file by column.
    """
    graph, models = _models(merged, rows), {}
    for number, row in enumerate(rows):
        graph[f"prompt {number}"] = _node("CLIPTextEncode", clip=["clip", 0], text=row.prompt)
        for column, name in enumerate(COLUMNS):
            at = f"{number} {column}"
            graph[f"sample {at}"] = _node(
                "KSampler",
                **{"model": _model(name, row), "latent_image": ["latent", 0], "seed": row.seed, "steps": STEPS},
                **{"positive": [f"prompt {number}", 0], "negative": [f"prompt {number}", 0], "cfg": 1.0},
                **{"sampler_name": "euler", "scheduler": "simple", "denoise": 1.0},
            )
            graph[f"decode {at}"] = _node("VAEDecode", samples=[f"sample {at}", 0], vae=["vae", 0])
            graph[f"save {at}"] = _node("SaveImage", images=[f"decode {at}", 0], filename_prefix=f"comparison/{at}")
            models[f"save {at}"] = (number, column)
    return graph, models


def measurement(
    rows: Sequence[Row], seeds: Sequence[int], merged: Mapping[str, str]
) -> tuple[Graph, dict[str, tuple[str, str]]]:
    """The velocity error of every column against the LoRAs asked for: {node id: (what is asked for, column)}."""
    graph, measured = _models(merged, rows), {}
    for number, row in enumerate(rows):
        graph[f"prompt {number}"] = _node("CLIPTextEncode", clip=["clip", 0], text=row.prompt)
        for name in COLUMNS:
            if name == REFERENCE:
                continue
            for seed in seeds:
                at = f"error {number} {name} {seed}"
                graph[at] = _node(
                    "SSRDemoVelocityError",
                    **{"reference": _model(REFERENCE, row), "model": _model(name, row)},
                    **{"prompt": [f"prompt {number}", 0], "latent": ["latent", 0], "seed": seed, "steps": STEPS},
                )
                measured[at] = (row.asked, name)
    return graph, measured


def errors(outputs: Mapping[str, Any], measured: Mapping[str, tuple[str, str]]) -> dict[tuple[str, str], float]:
    """{(what is asked for, column): mean error relative to the base model's}, from what a run of `measurement` gave."""
    sums: dict[tuple[str, str], float] = {}
    for node, what in measured.items():
        sums[what] = sums.get(what, 0.0) + float(outputs[node]["text"][0])
    return {(asked, column): total / sums[asked, "base"] for (asked, column), total in sums.items()}


def _models(merged: Mapping[str, str], rows: Sequence[Row]) -> Graph:
    """The loaders, and every model of the comparison."""
    graph = {
        "base": _node("UNETLoader", unet_name="tiny_flux.safetensors", weight_dtype="default"),
        "clip": _node("SSRDemoLoadTinyCLIP", clip_name="tiny_clip.safetensors"),
        "vae": _node("VAELoader", vae_name="taef1"),
        "latent": _node("EmptySD3LatentImage", width=128, height=128, batch_size=1),
        **{column: _lora(["base", 0], file, 1.0) for column, file in merged.items()},
    }
    graph |= _stack("plain stack", LORAS, 1.0) | _stack("stack at 0.7", LORAS, 0.7)
    for row in rows:
        graph |= _stack(row.asked, row.loras, 1.0)
    return graph


def _stack(name: str, loras: Sequence[str], strength: float) -> Graph:
    """The LoRAs one after the other; the last node bears the name."""
    graph, model = {}, "base"
    for number, lora in enumerate(loras, 1):
        at = name if number == len(loras) else f"{name}, {number}"
        graph[at] = _lora([model, 0], lora, strength)
        model = at
    return graph


def _model(column: str, row: Row) -> list[Any]:
    return [row.asked if column == REFERENCE else column, 0]


def _lora(model: list[Any], name: str, strength: float) -> dict[str, Any]:
    return _node("LoraLoaderModelOnly", model=model, lora_name=name, strength_model=strength)


def _node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}
