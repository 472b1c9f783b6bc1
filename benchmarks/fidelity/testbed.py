# SPDX-License-Identifier: Apache-2.0
"""Testbed: a trained model, its LoRAs, and how far any other model is from what a LoRA, or two at once, would do."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import cast
import comfy.sd
import host
import torch
import world
from torch import Tensor, nn
from train import BASE, folder_of
from training import storage
from training.captions import wordings
from training.latents import CHANNELS, PatchComponents
from training.lora import Recipe

import tiny_clip

Deltas = Mapping[str, Tensor]  # module -> dense difference of its weight, (out, in)
Ask = tuple[str, ...]  # the LoRAs that a prompt asks for: one, or a character and a style
Prompt = Hashable  # a text; a testbed of its own may have pictures with them
Told = tuple[Tensor, ...]  # what the model is told of n prompts, each (n, ...)

FLOAT32 = {"dtype": torch.float32}
STEPS = 8  # of the trajectories along which velocities are compared, and of the images
SEEDS = (1001,)
LATENT = (CHANNELS, 16, 16)
CALIBRATION_PLACES, HELD_OUT_PLACES = list(world.PLACES)[:4], list(world.PLACES)[4:]


def character_prompts(name: str, places: Sequence[str]) -> list[str]:
    """Each place in the long and in the short wording."""
    scenes = [world.Scene(name, "", place, 0, 1) for place in places]
    return [wordings(scene)[0] for scene in scenes] + [wordings(scene)[3] for scene in scenes]


def joint_prompts(name: str, style: str, held_out: bool) -> list[str]:
    """A character in a style; four, in the long wording of the calibration places, or both of the held-out ones."""
    prompts = character_prompts(name, HELD_OUT_PLACES if held_out else CALIBRATION_PLACES)
    return [f"{prompt}, {style}" for prompt in prompts[:4]]


def style_prompts(style: str, held_out: bool) -> list[str]:
    """Things in colours and places; the held-out ones are other combinations."""
    scenes = world.sample(world.ordinary_scenes(style), 12, seed=40)
    return [scene.caption for scene in (scenes[8:] if held_out else scenes[:8])]


@dataclass(frozen=True)
class Subject:
    """One LoRA, the prompts it may be calibrated on (8) and those it is judged by (4)."""

    name: str
    file: str
    trigger: str
    calibration: list[Any]
    held_out: list[Any]

    @classmethod
    def of(cls, name: str, recipe: Recipe) -> Subject:
        if recipe.trigger in world.CHARACTERS:
            prompts = (character_prompts(recipe.trigger, p) for p in (CALIBRATION_PLACES, HELD_OUT_PLACES))
        else:
            prompts = (style_prompts(recipe.trigger, held_out) for held_out in (False, True))
        return cls(name, recipe.file, recipe.trigger, *prompts)

    @property
    def is_style(self) -> bool:
        return self.trigger not in world.CHARACTERS


@dataclass(frozen=True)
class Reference:
    """What a LoRA alone does on its held-out prompts; or two, stacked as a person would load them."""

    points: Tensor  # (STEPS * n, 16, 16, 16) latents that it passes through
    sigmas: Tensor  # (STEPS * n,)
    velocities: Tensor  # (STEPS * n, ...) its own
    images: Tensor  # (n, ...) latents where it ends
    velocity_scale: float  # squared error of the base model
    image_scale: float


class Testbed:
    """A model and LoRAs for it. Everything is measured relative to what the base model does.

    Args:
        folder: <BASE>.safetensors and the LoRAs' files.
    """

    def __init__(self, folder: Path, subjects: Mapping[str, Subject]) -> None:
        self.folder, self.subjects = folder, subjects
        self.patcher = comfy.sd.load_diffusion_model(str(folder / f"{BASE}.safetensors"), FLOAT32)
        self.model = self.patcher.model.diffusion_model.eval()
        self._clip = tiny_clip.build(storage.load("tiny_clip"))
        self._conditioning: dict[Prompt, list[Any]] = {}
        self._modules = dict(self.patcher.model.named_modules())
        self._references: dict[Ask, Reference] = {}
        self._loras: dict[str, Any] = {}
        self._alone: dict[str, Deltas] = {}
        self.space = PatchComponents(**storage.load("components"))

    @classmethod
    def of_width(cls, width: int) -> Testbed:
        """The characters and styles of `cast`, with a base model of this width."""
        cast.join_world()
        return cls(folder_of(width), {name: Subject.of(name, recipe) for name, recipe in cast.recipes().items()})

    def conditioning(self, prompts: Sequence[Prompt]) -> list[Any]:
        """ComfyUI's CONDITIONING that remembers its texts, as SSR Prompts makes it."""
        for prompt in prompts:
            if prompt not in self._conditioning:
                self._conditioning[prompt] = self.entries(prompt)
        return [entry for prompt in prompts for entry in self._conditioning[prompt]]

    def entries(self, prompt: Prompt) -> list[Any]:
        """CONDITIONING of one prompt."""
        return host.nodes.prompt.encode(self._clip, prompt)

    def told(self, prompts: Sequence[Prompt]) -> Told:
        """Token states (n, 16, 64) and pooled states (n, 64)."""
        tokens, options = zip(*self.conditioning(prompts), strict=True)
        return torch.cat(tokens), torch.cat([one["pooled_output"] for one in options])

    def asks(self, names: Sequence[str]) -> list[Ask]:
        """Each of them by itself, then every character in every style."""
        styles = [name for name in names if self.subjects[name].is_style]
        return [*((name,) for name in names), *((c, s) for c in names if c not in styles for s in styles)]

    def prompts(self, ask: Ask, held_out: bool) -> list[Any]:
        """Those that may be calibrated on, or those that it is judged by."""
        first, *others = (self.subjects[name] for name in ask)
        if others:
            return joint_prompts(first.trigger, others[0].trigger, held_out)
        return first.held_out if held_out else first.calibration

    @contextmanager
    def patched(self, deltas: Deltas) -> Iterator[nn.Module]:
        """The model with `deltas` added to its weights."""
        kept = {name: self._modules[name].weight.data for name in deltas}
        try:
            for name, delta in deltas.items():
                self._modules[name].weight.data = kept[name] + delta.reshape(kept[name].shape)
            yield self.model
        finally:
            for name, weight in kept.items():
                self._modules[name].weight.data = weight

    def walk(self, prompts: Sequence[Prompt], noise: Tensor, steps: int = STEPS) -> tuple[list[Tensor], list[Tensor]]:
        """Euler from noise to image: the latents passed through (steps + 1) and the velocities there (steps)."""
        return self.follow(self.told(prompts), noise, steps)

    def follow(self, told: Told, noise: Tensor, steps: int = STEPS) -> tuple[list[Tensor], list[Tensor]]:
        """`walk` for what the model is told."""
        points, velocities = [noise], []
        for sigma, following in pairwise(torch.linspace(1, 0, steps + 1)):
            velocities.append(self._velocity(points[-1], sigma.expand(len(noise)), *told))
            points.append(points[-1] + velocities[-1] * (following - sigma))
        return points, velocities

    def inputs(
        self, deltas: Deltas, modules: Sequence[str], prompts: Sequence[Prompt], x: Tensor, sigma: Tensor
    ) -> dict[str, Tensor]:
        """What these layers see in the model with `deltas`, each (tokens, in)."""
        found: dict[str, list[Tensor]] = {module: [] for module in modules}

        def keep(module: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            return lambda _, given: found[module].append(given[0].flatten(0, -2))

        hooks = [self._modules[module].register_forward_pre_hook(keep(module)) for module in modules]
        try:
            with self.patched(deltas):
                self._velocity(x, sigma.expand(len(x)), *self.told(prompts))
        finally:
            for hook in hooks:
                hook.remove()
        return {module: torch.cat(parts) for module, parts in found.items()}

    def weight(self, module: str) -> Tensor:
        """Of the base model."""
        return self._modules[module].weight.data

    def errors(self, deltas: Deltas, asks: Sequence[Ask], images: bool = True) -> dict[Ask, tuple[float, float]]:
        """{ask: (velocity error, image error)} of the model with `deltas`; 0 = these LoRAs alone, 1 = the base."""
        references = {ask: self.reference(ask) for ask in asks}
        with self.patched(deltas):
            return {ask: self._error(ask, reference, images) for ask, reference in references.items()}

    def reference(self, ask: Ask) -> Reference:
        if ask not in self._references:
            self._references[ask] = self._measured(ask)
        return self._references[ask]

    def task(self, name: str, prompts: int) -> Any:
        """The LoRA with the first so many of its calibration prompts, as SSR Add LoRA makes it."""
        subject = self.subjects[name]
        path = self.folder / f"{subject.file}.safetensors"
        return host.nodes.task.Task(name, path, 1.0, self.conditioning(subject.calibration[:prompts]))

    def combinations(self, names: Sequence[str], prompts: int = 4) -> list[Any]:
        """Every character in every style with so many prompts of its own, as SSR Add Combination makes it."""
        return [
            host.nodes.combination.Combination(", ".join(ask), self.conditioning(self.prompts(ask, False)[:prompts]))
            for ask in self.asks(names)
            if len(ask) > 1
        ]

    def loaded(self, task: Any) -> Any:
        return host.nodes.patches.read_task(task, self.patcher)

    def lora(self, name: str) -> Any:
        """One LoRA as the pack reads it."""
        if name not in self._loras:
            self._loras[name] = self.loaded(self.task(name, 1)).lora
        return self._loras[name]

    def updates(self, name: str) -> Mapping[Any, Any]:
        """Its updates by site."""
        return self.lora(name).updates

    def rank(self, names: Sequence[str]) -> int:
        """Of the largest of these LoRAs."""
        return max(update.rank for name in names for update in self.updates(name).values())

    def alone(self, name: str) -> Deltas:
        """One LoRA as dense differences."""
        if name not in self._alone:
            self._alone[name] = dense(self.updates(name))
        return self._alone[name]

    def stacked(self, names: Sequence[str]) -> Deltas:
        """The sum of these LoRAs' differences."""
        found: dict[str, Tensor] = {}
        for deltas in map(self.alone, names):
            for module, delta in deltas.items():
                found[module] = found[module] + delta if module in found else delta
        return found

    def _measured(self, ask: Ask) -> Reference:
        prompts, noise = self._start(ask)
        with self.patched(self.stacked(ask)):
            points, velocities = self.walk(prompts, noise)
        sigmas = torch.linspace(1, 0, STEPS + 1)[:-1].repeat_interleave(len(noise))
        found = Reference(torch.cat(points[:-1]), sigmas, torch.cat(velocities), points[-1], 1.0, 1.0)
        velocity, image = self._error(ask, found, True)  # of the base model, as it is
        return replace(found, velocity_scale=velocity, image_scale=image)

    def _start(self, ask: Ask) -> tuple[list[Prompt], Tensor]:
        prompts = self.prompts(ask, True)
        noises = [torch.randn(len(prompts), *LATENT, generator=_generator(seed)) for seed in SEEDS]
        return list(prompts) * len(SEEDS), torch.cat(noises)

    def _error(self, ask: Ask, reference: Reference, images: bool) -> tuple[float, float]:
        prompts, noise = self._start(ask)
        found = self._velocity(reference.points, reference.sigmas, *self.told(prompts * STEPS))
        velocity = float((found - reference.velocities).square().mean()) / reference.velocity_scale
        if not images:
            return velocity, float("nan")
        drawn = self.walk(prompts, noise)[0][-1]
        difference = self.space.decode(drawn) - self.space.decode(reference.images)
        return velocity, float(difference.square().mean()) / reference.image_scale

    @torch.no_grad()
    def _velocity(self, x: Tensor, sigma: Tensor, *told: Tensor) -> Tensor:
        parts = zip(*(t.split(64) for t in (x, sigma, *told)), strict=True)
        return torch.cat([self.velocity(*part) for part in parts])

    def velocity(self, x: Tensor, sigma: Tensor, *told: Tensor) -> Tensor:
        """What the model as it is makes of noisy latents (n, ...)."""
        tokens, pooled = told
        return self.model(x, sigma, tokens, y=pooled)


def dense(updates: Mapping[Any, Any]) -> Deltas:
    """Updates by site as dense differences by module."""
    found: dict[str, Tensor] = {}
    for site, update in updates.items():
        rows = update.dense().float()
        whole = found.setdefault(site.module, torch.zeros(site.out_features, rows[0].numel()))
        whole[site.start : site.stop] += rows.flatten(1)
    return found


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
