"""Calls this pack's nodes in this process the way ComfyUI's executor does, and samples with stock code."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tiny_flux import StateDict, conditioning, empty_latent


def execute(node: type, **inputs: Any) -> tuple[Any, ...]:
    """The outputs of a V3 node."""
    with torch.inference_mode():  # as ComfyUI executes
        return node.PREPARE_CLASS_CLONE(None).execute(**inputs).args  # type: ignore[attr-defined]


@contextmanager
def lora_folder(folder: Path) -> Iterator[Path]:
    """Inside, LoRA files of this folder are found by their names; after it they are not, as others have the same."""
    folder_paths = importlib.import_module("folder_paths")
    folder_paths.add_model_folder_path("loras", str(folder))
    folder_paths.filename_list_cache.pop("loras", None)
    try:
        yield folder
    finally:
        folder_paths.folder_names_and_paths["loras"][0].remove(str(folder))
        folder_paths.filename_list_cache.pop("loras", None)


def node(name: str) -> type:
    """A node class of the loaded pack, such as "solve.SSRSolve"."""
    module, _, cls = name.partition(".")
    return getattr(importlib.import_module(f"ssr_pack.nodes.{module}"), cls)


def task(
    lora: StateDict, name: str = "lora", strength: float = 1.0, seeds: tuple[int, ...] = (1,), images: Any = None
) -> Any:
    """One LoRA to merge, with a random prompt for each seed."""
    values = importlib.import_module("ssr_pack.nodes.reading.task")
    return values.Task(name, lora, strength, [entry for seed in seeds for entry in conditioning(seed)], images)


def collect(
    model: Any, *tasks: Any, steps: int = 4, batch: int = 1, seed: int = 0, context: int = 16, **more: Any
) -> Any:
    """SSR_STATS, without refinement unless `more` asks for it."""
    given = {"model": model, "tasks": tasks, "seed": seed, "steps": steps, "context": context, "refine": 0}
    sampling = {"sampler_name": "euler", "scheduler": "simple", "latent": empty_latent(batch=batch)}
    return execute(node("collect_stats.SSRCollectStats"), **{**given, **sampling, **more})[0]


def solve(
    stats: Any, ridge: float = 0.01, rank: int = 0, routing: float = 1.0, strengths: str = "", layers: str = ""
) -> tuple[Any, str]:
    """(LORA_MODEL, report)"""
    settings = {"ridge": ridge, "rank": rank, "routing": routing, "strengths": strengths, "layers": layers}
    return execute(node("solve.SSRSolve"), stats=stats, **settings)  # type: ignore[return-value]


def apply(model: Any, lora: Any, strength: float = 1.0) -> Any:
    """MODEL"""
    return execute(node("apply.SSRApply"), model=model, lora=lora, strength=strength)[0]


def load_lora(model: Any, lora: StateDict, strength: float = 1.0) -> Any:
    """What ComfyUI's own Load LoRA makes of a file."""
    sd = importlib.import_module("comfy.sd")
    return sd.load_lora_for_models(model, None, dict(lora), strength, 0)[0]


def sample(model: Any, seed: int = 0, steps: int = 4, prompt: int = 1) -> torch.Tensor:
    """A latent, by ComfyUI's own KSampler."""
    nodes = importlib.import_module("nodes")
    cond = conditioning(prompt)
    with torch.inference_mode():
        return nodes.common_ksampler(model, seed, steps, 1.0, "euler", "simple", cond, cond, empty_latent())[0][
            "samples"
        ]


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """|a - b| / |b|"""
    return float((a - b).norm() / b.norm())


def hooks(model: Any) -> int:
    """How many forward hooks sit anywhere on a ModelPatcher's model."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.model.modules())
