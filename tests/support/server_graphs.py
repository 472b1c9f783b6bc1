"""Graphs in API format for the tests' own server: a merge of its LoRAs on its tiny model, and a picture of it."""

from typing import Any

import numpy

from hosting.server import ComfyServer


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def prompt(seed: int) -> dict[str, Any]:
    return node("TestConditioning", seed=seed, tokens=8, context_width=32, pooled_width=16)


def sampler(model: list, name: str, seed: int = 5) -> dict[str, Any]:
    choice = {"sampler_name": "euler", "scheduler": "simple", "steps": 4, "cfg": 1.0, "denoise": 1.0}
    return {
        f"sample {name}": node(
            "KSampler",
            **{"model": model, "positive": ["p0", 0], "negative": ["p0", 0], "latent_image": ["latent", 0]},
            **{"seed": seed, **choice},
        ),
        f"save {name}": node("TestSaveTensor", latent=[f"sample {name}", 0], name=name),
    }


def merge_graph(
    ridge: float = 0.01, steps: int = 4, seed: int = 0, loras: tuple[str, ...] = ("kohya", "generic")
) -> dict:
    graph = {
        "model": node("UNETLoader", unet_name="tiny-flux.safetensors", weight_dtype="default"),
        "latent": node("EmptySD3LatentImage", width=64, height=64, batch_size=1),
        "collect": node(
            "SSRCollectStats",
            **{"model": ["model", 0], "tasks": [f"lora{len(loras) - 1}", 0], "latent": ["latent", 0]},
            **{"seed": seed, "steps": steps, "sampler_name": "euler", "scheduler": "simple"},
        ),
        "solve": node("SSRSolve", stats=["collect", 0], ridge=ridge, rank=0, routing=1.0, strengths=""),
        "apply": node("SSRApply", model=["model", 0], lora=["solve", 0], strength=1.0),
        "report": node("PreviewAny", source=["solve", 1]),
    }
    for i, lora in enumerate(loras):
        graph[f"p{i}"] = prompt(i)
        inputs = {"lora_name": f"{lora}.safetensors", "strength": 1.0, "calibration": [f"p{i}", 0]}
        graph[f"lora{i}"] = node("SSRAddLoRA", **inputs, **({"tasks": [f"lora{i - 1}", 0]} if i else {}))
    return graph | sampler(["apply", 0], "merged")


def latent(server: ComfyServer, name: str) -> numpy.ndarray:
    return numpy.load(server.base_directory / "output" / f"{name}.npy")
