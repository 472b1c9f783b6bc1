# SPDX-License-Identifier: Apache-2.0
"""The three LoRAs, each in another of the key formats that ComfyUI reads for Flux."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import world
from torch import Tensor, nn

from . import storage
from .captions import wordings
from .diffusion import Lesson, base_model
from .optimization import optimize

Keys = Callable[[str], tuple[str, str, str]]  # module -> keys of down, up, alpha


def kohya_keys(module: str) -> tuple[str, str, str]:
    name = f"lora_unet_{module.replace('.', '_')}"
    return f"{name}.lora_down.weight", f"{name}.lora_up.weight", f"{name}.alpha"


def peft_keys(module: str) -> tuple[str, str, str]:
    name = f"diffusion_model.{module}"
    return f"{name}.lora_A.weight", f"{name}.lora_B.weight", f"{name}.alpha"


def bare_keys(module: str) -> tuple[str, str, str]:
    return f"{module}.lora_A.weight", f"{module}.lora_B.weight", f"{module}.alpha"


@dataclass(frozen=True)
class Recipe:
    file: str
    trigger: str
    rank: int
    keys: Keys
    scenes: Callable[[str], Iterator[world.Scene]]
    steps: int
    seed: int


RECIPES = {
    "mochi": Recipe("mochi_cat", "mochi the cat", 8, kohya_keys, world.character_scenes, 300, 10),
    "robo": Recipe("robo_robot", "robo the robot", 8, peft_keys, world.character_scenes, 300, 11),
    "blueprint": Recipe("blueprint_style", world.STYLE, 16, bare_keys, world.ordinary_scenes, 400, 12),
}


class Adapter(nn.Module):
    """up(down(x)) beside a frozen Linear; alpha = rank."""

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(rank, linear.in_features) * linear.in_features**-0.5)
        self.up = nn.Parameter(torch.zeros(linear.out_features, rank))
        linear.register_forward_hook(lambda _, inputs, out: out + inputs[0] @ self.down.T @ self.up.T)


def adapters_for(model: nn.Module, rank: int) -> dict[str, Adapter]:
    """One for every Linear of the double and the single blocks."""
    return {
        name: Adapter(module, rank)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(("double_blocks.", "single_blocks."))
    }


def train_lora(name: str, batch: int) -> None:
    """Makes one LoRA's file, from pictures of its own subject or style only."""
    recipe = RECIPES[name]
    torch.manual_seed(recipe.seed)
    course = Lesson.on(world.sample(recipe.scenes(recipe.trigger), 600, seed=7), wordings)
    model = base_model()
    adapters = adapters_for(model, recipe.rank)
    parameters = [p for adapter in adapters.values() for p in (adapter.down, adapter.up)]

    def checkpoint(values: Sequence[Tensor]) -> None:
        save_lora(recipe, list(adapters), values)

    optimize(name, parameters, lambda: course.loss(model, batch), recipe.steps, 2e-3, checkpoint)


def save_lora(recipe: Recipe, modules: list[str], factors: Sequence[Tensor]) -> None:
    """`factors` alternates between a module's down and its up."""
    tensors = {}
    for module, down, up in zip(modules, factors[::2], factors[1::2], strict=True):
        tensors |= dict(zip(recipe.keys(module), (down, up, torch.tensor(float(recipe.rank))), strict=True))
    about = {
        "description": f"LoRA for the demo model: {recipe.trigger}",
        "modelspec.trigger_phrase": recipe.trigger,
        "ss_network_dim": recipe.rank,
        "ss_network_alpha": recipe.rank,
        "steps": recipe.steps,
    }
    storage.save(recipe.file, tensors, torch.float16, **about)
