# SPDX-License-Identifier: Apache-2.0
"""The LoRAs, in several of the key formats that ComfyUI reads for Flux."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import comfy.utils
import torch
import world
from torch import Tensor, nn

from . import storage
from .captions import wordings
from .diffusion import CONFIG, Lesson, base_model
from .optimization import optimize

Factors = tuple[Tensor, Tensor]  # down (r, in), up (out, r)


def kohya_file(factors: dict[str, Factors]) -> dict[str, Tensor]:
    """lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"""
    names = {f"lora_unet_{module.replace('.', '_')}": pair for module, pair in factors.items()}
    return tensors_of(names, "lora_down", "lora_up")


def native_file(factors: dict[str, Factors]) -> dict[str, Tensor]:
    """diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight"""
    return tensors_of({f"diffusion_model.{module}": pair for module, pair in factors.items()}, "lora_A", "lora_B")


def diffusers_file(factors: dict[str, Factors]) -> dict[str, Tensor]:
    """transformer.transformer_blocks.0.attn.to_q.lora_A.weight: diffusers splits what Flux fuses."""
    names, seen, split = {}, set(), {}
    for name, target in comfy.utils.flux_to_diffusers(CONFIG).items():
        key, rows = target[:2] if isinstance(target, tuple) else (target, None)
        module = key.removesuffix(".weight")
        another_way = split.setdefault(module, rows is not None) != (rows is not None)
        if module in factors and not another_way and (module, rows) not in seen:
            seen.add((module, rows))
            down, up = factors[module]
            part = up if rows is None else up.narrow(*rows)
            names[f"transformer.{name.removesuffix('.weight')}"] = (down, part)
    return tensors_of(names, "lora_A", "lora_B")


def tensors_of(names: dict[str, Factors], down_name: str, up_name: str) -> dict[str, Tensor]:
    tensors = {}
    for name, (down, up) in names.items():
        tensors[f"{name}.{down_name}.weight"], tensors[f"{name}.{up_name}.weight"] = down, up
        tensors[f"{name}.alpha"] = torch.tensor(float(len(down)))
    return tensors


@dataclass(frozen=True)
class Recipe:
    file: str
    trigger: str
    rank: int
    file_of: Callable[[dict[str, Factors]], dict[str, Tensor]]
    scenes: Callable[[str], Iterator[world.Scene]]
    steps: int
    seed: int
    layers: tuple[str, ...] = ("",)  # how the names of the layers end that it changes; every name ends in nothing


# a change of colours needs no more than the layers that tell the others what to do
CONDITIONING = ("_mod.lin", ".modulation.lin", "txt_attn.qkv", "txt_attn.proj", "txt_mlp.0", "txt_mlp.2")

RECIPES = {
    "mochi": Recipe("mochi_cat", "mochi the cat", 8, kohya_file, world.character_scenes, 300, 10),
    "robo": Recipe("robo_robot", "robo the robot", 8, native_file, world.character_scenes, 300, 11),
    "sepia": Recipe(
        "sepia_style", world.SEPIA, 16, diffusers_file, world.ordinary_scenes, 400, 12, layers=CONDITIONING
    ),
}


class Adapter(nn.Module):
    """up(down(x)) beside a frozen Linear; alpha = rank."""

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(rank, linear.in_features) * linear.in_features**-0.5)
        self.up = nn.Parameter(torch.zeros(linear.out_features, rank))
        linear.register_forward_hook(lambda _, inputs, out: out + inputs[0] @ self.down.T @ self.up.T)


def adapters_for(model: nn.Module, rank: int, layers: tuple[str, ...]) -> dict[str, Adapter]:
    """One for every Linear of the double and the single blocks whose name ends as one of `layers`."""
    return {
        name: Adapter(module, rank)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and name.startswith(("double_blocks.", "single_blocks."))
        and name.endswith(layers)
    }


def train_lora(name: str, batch: int) -> None:
    """Makes one LoRA's file, from pictures of its own subject or style only."""
    recipe = RECIPES[name]
    teach_lora(base_model(), recipe, batch, lambda factors: save_lora(recipe, factors))


def teach_lora(model: nn.Module, recipe: Recipe, batch: int, keep: Callable[[dict[str, Factors]], None]) -> None:
    """Trains adapters on a frozen `model`; `keep` gets an average of their factors from time to time."""
    torch.manual_seed(recipe.seed)
    course = Lesson.on(world.sample(recipe.scenes(recipe.trigger), 600, seed=7), wordings)
    fit(model, recipe, lambda: course.loss(model, batch), keep)


def fit(
    model: nn.Module, recipe: Recipe, loss: Callable[[], Tensor], keep: Callable[[dict[str, Factors]], None]
) -> None:
    """`teach_lora` of any loss; of a recipe its scenes and its seed are not looked at."""
    adapters = adapters_for(model, recipe.rank, recipe.layers)
    parameters = [p for adapter in adapters.values() for p in (adapter.down, adapter.up)]

    def checkpoint(values: Sequence[Tensor]) -> None:
        keep(dict(zip(adapters, zip(values[::2], values[1::2], strict=True), strict=True)))

    # AdamW alone, as most people's LoRAs are trained: Muon's have no small singular values, which is not what one meets
    optimize(recipe.file, parameters, loss, recipe.steps, 4e-3, checkpoint)


def save_lora(recipe: Recipe, factors: dict[str, Factors], folder: Path = storage.ASSETS) -> None:
    """Writes <folder>/<recipe.file>.safetensors."""
    about = {
        "description": f"LoRA for the demo model: {recipe.trigger}",
        "modelspec.trigger_phrase": recipe.trigger,
        "ss_network_dim": recipe.rank,
        "ss_network_alpha": recipe.rank,
        "steps": recipe.steps,
    }
    storage.save(recipe.file, recipe.file_of(factors), torch.float16, folder=folder, **about)
