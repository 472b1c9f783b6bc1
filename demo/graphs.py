# SPDX-License-Identifier: Apache-2.0
"""The demo's comparisons as ComfyUI graphs in API format, out of stock nodes (and one that measures)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .scenes import LORAS, Row

Graph = dict[str, dict[str, Any]]

STEPS = 12

COLUMNS = ("base", "LoRA alone", "plain stack", "stack at 0.7", "SSR merge")


def comparison(rows: Sequence[Row], merged: str) -> tuple[Graph, dict[str, tuple[int, int]]]:
    """A picture for every row and column, and which node saves which: {node id: (row, column)}."""
    graph, models = _models(merged), {}
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


def measurement(rows: Sequence[Row], seeds: Sequence[int], merged: str) -> tuple[Graph, dict[str, tuple[str, str]]]:
    """The velocity error of every column against the LoRA alone: {node id: (LoRA, column)}."""
    graph, measured = _models(merged), {}
    for number, row in enumerate(rows):
        graph[f"prompt {number}"] = _node("CLIPTextEncode", clip=["clip", 0], text=row.prompt)
        for name in COLUMNS:
            if name == "LoRA alone":
                continue
            for seed in seeds:
                at = f"error {number} {name} {seed}"
                graph[at] = _node(
                    "SSRDemoVelocityError",
                    **{"reference": _model("LoRA alone", row), "model": _model(name, row)},
                    **{"prompt": [f"prompt {number}", 0], "latent": ["latent", 0], "seed": seed, "steps": STEPS},
                )
                measured[at] = (row.lora, name)
    return graph, measured


def errors(outputs: Mapping[str, Any], measured: Mapping[str, tuple[str, str]]) -> dict[tuple[str, str], float]:
    """{(LoRA, column): mean error relative to the base model's}, from the outputs of a run of `measurement`."""
    sums: dict[tuple[str, str], float] = {}
    for node, what in measured.items():
        sums[what] = sums.get(what, 0.0) + float(outputs[node]["text"][0])
    return {(lora, column): total / sums[lora, "base"] for (lora, column), total in sums.items()}


def _models(merged: str) -> Graph:
    """The loaders, and every model of the comparison."""
    graph = {
        "base": _node("UNETLoader", unet_name="tiny_flux.safetensors", weight_dtype="default"),
        "clip": _node("SSRDemoLoadTinyCLIP", clip_name="tiny_clip.safetensors"),
        "vae": _node("VAELoader", vae_name="taef1"),
        "latent": _node("EmptySD3LatentImage", width=128, height=128, batch_size=1),
        "SSR merge": _lora(["base", 0], merged, 1.0),
    }
    for name, strength in (("plain stack", 1.0), ("stack at 0.7", 0.7)):
        model = ["base", 0]
        for number, lora in enumerate(LORAS):
            at = name if number == len(LORAS) - 1 else f"{name} {number}"
            graph[at] = _lora(model, lora, strength)
            model = [at, 0]
    return graph | {lora: _lora(["base", 0], lora, 1.0) for lora in LORAS}


def _model(column: str, row: Row) -> list[Any]:
    return [row.lora if column == "LoRA alone" else column, 0]


def _lora(model: list[Any], name: str, strength: float) -> dict[str, Any]:
    return _node("LoraLoaderModelOnly", model=model, lora_name=name, strength_model=strength)


def _node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}
