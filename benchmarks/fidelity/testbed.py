# SPDX-License-Identifier: Apache-2.0
"""Testbed: a trained model, its LoRAs, and how far any other model is from each LoRA alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import cast
import comfy.sd
import host
import torch
import world
from torch import Tensor, nn
from train import BASE, folder_of
from training import storage
from training.captions import Captions, wordings
from training.latents import CHANNELS, PatchComponents
from training.lora import Recipe

Deltas = Mapping[str, Tensor]  # module -> dense difference of its weight, (out, in)

FLOAT32 = {"dtype": torch.float32}
STEPS = 8  # of the trajectories along which velocities are compared, and of the images
SEEDS = (1001,)
CALIBRATION_PLACES, HELD_OUT_PLACES = list(world.PLACES)[:4], list(world.PLACES)[4:]


def character_prompts(name: str, places: Sequence[str]) -> list[str]:
    """Each place in the long and in the short wording."""
    scenes = [world.Scene(name, "", place, 0, 1) for place in places]
    return [wordings(scene)[0] for scene in scenes] + [wordings(scene)[3] for scene in scenes]


def style_prompts(style: str, held_out: bool) -> list[str]:
    """Things in colours and places; the held-out ones are other combinations."""
    scenes = world.sample(world.ordinary_scenes(style), 12, seed=40)
    return [scene.caption for scene in (scenes[8:] if held_out else scenes[:8])]


@dataclass(frozen=True)
class Subject:
    """One LoRA, the prompts it may be calibrated on (8) and those it is judged by (4)."""

    name: str
    file: str
    calibration: list[str]
    held_out: list[str]

    @classmethod
    def of(cls, name: str, recipe: Recipe) -> Subject:
        if recipe.trigger in world.CHARACTERS:
            prompts = (character_prompts(recipe.trigger, p) for p in (CALIBRATION_PLACES, HELD_OUT_PLACES))
        else:
            prompts = (style_prompts(recipe.trigger, held_out) for held_out in (False, True))
        return cls(name, recipe.file, *prompts)


@dataclass(frozen=True)
class Reference:
    """What a LoRA alone does on its held-out prompts."""

    points: Tensor  # (STEPS * n, 16, 16, 16) latents that it passes through
    sigmas: Tensor  # (STEPS * n,)
    velocities: Tensor  # (STEPS * n, ...) its own
    images: Tensor  # (n, ...) latents where it ends
    velocity_scale: float  # squared error of the base model
    image_scale: float


class Testbed:
    """The model of one width. Everything is measured relative to what the base model does."""

    def __init__(self, width: int) -> None:
        cast.join_world()
        self.width = width
        self.patcher = comfy.sd.load_diffusion_model(str(folder_of(width) / f"{BASE}.safetensors"), FLOAT32)
        self.model = self.patcher.model.diffusion_model.eval()
        self.subjects = {name: Subject.of(name, recipe) for name, recipe in cast.recipes().items()}
        texts = sorted({t for s in self.subjects.values() for t in (*s.calibration, *s.held_out)})
        self._encoded, self._row = Captions.encode(texts), {text: i for i, text in enumerate(texts)}
        self._modules = dict(self.patcher.model.named_modules())
        self._references: dict[str, Reference] = {}
        self._updates: dict[str, Mapping[Any, Any]] = {}
        self._alone: dict[str, Deltas] = {}
        self._to_pixels = torch.linalg.pinv(PatchComponents(**storage.load("components")).components)

    def encoded(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token states (n, 16, 64) and pooled states (n, 64)."""
        rows = [self._row[prompt] for prompt in prompts]
        return self._encoded.tokens[rows], self._encoded.pooled[rows]

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

    def walk(self, prompts: Sequence[str], noise: Tensor, steps: int = STEPS) -> tuple[list[Tensor], list[Tensor]]:
        """Euler from noise to image: the latents passed through (steps + 1) and the velocities there (steps)."""
        tokens, pooled = self.encoded(prompts)
        points, velocities = [noise], []
        for sigma, following in pairwise(torch.linspace(1, 0, steps + 1)):
            velocities.append(self._velocity(points[-1], sigma.expand(len(noise)), tokens, pooled))
            points.append(points[-1] + velocities[-1] * (following - sigma))
        return points, velocities

    def errors(self, deltas: Deltas, names: Sequence[str], images: bool = True) -> dict[str, tuple[float, float]]:
        """{name: (velocity error, image error)} of the model with `deltas`; 0 = the LoRA alone, 1 = the base."""
        references = {name: self.reference(name) for name in names}
        with self.patched(deltas):
            return {name: self._error(name, reference, images) for name, reference in references.items()}

    def reference(self, name: str) -> Reference:
        if name not in self._references:
            self._references[name] = self._measured(name)
        return self._references[name]

    def task(self, name: str, prompts: int) -> Any:
        """The LoRA with the first so many of its calibration prompts, as SSR Add LoRA makes it."""
        subject = self.subjects[name]
        tokens, pooled = self.encoded(subject.calibration[:prompts])
        conditioning = [[t[None], {"pooled_output": p[None]}] for t, p in zip(tokens, pooled, strict=True)]
        path = folder_of(self.width) / f"{subject.file}.safetensors"
        return host.nodes.task.Task(name, path, 1.0, conditioning)

    def loaded(self, task: Any) -> Any:
        return host.nodes.patches.read_task(task, self.patcher)

    def updates(self, name: str) -> Mapping[Any, Any]:
        """One LoRA as the pack reads it."""
        if name not in self._updates:
            self._updates[name] = self.loaded(self.task(name, 1)).lora.updates
        return self._updates[name]

    def rank(self, names: Sequence[str]) -> int:
        """Of the largest of these LoRAs."""
        return max(update.rank for name in names for update in self.updates(name).values())

    def alone(self, name: str) -> Deltas:
        """One LoRA as dense differences."""
        if name not in self._alone:
            self._alone[name] = dense(self.updates(name))
        return self._alone[name]

    def _measured(self, name: str) -> Reference:
        prompts, noise = self._start(name)
        with self.patched(self.alone(name)):
            points, velocities = self.walk(prompts, noise)
        sigmas = torch.linspace(1, 0, STEPS + 1)[:-1].repeat_interleave(len(noise))
        found = Reference(torch.cat(points[:-1]), sigmas, torch.cat(velocities), points[-1], 1.0, 1.0)
        velocity, image = self._error(name, found, True)  # of the base model, as it is
        return replace(found, velocity_scale=velocity, image_scale=image)

    def _start(self, name: str) -> tuple[list[str], Tensor]:
        prompts = self.subjects[name].held_out
        noises = [torch.randn(len(prompts), CHANNELS, 16, 16, generator=_generator(seed)) for seed in SEEDS]
        return list(prompts) * len(SEEDS), torch.cat(noises)

    def _error(self, name: str, reference: Reference, images: bool) -> tuple[float, float]:
        prompts, noise = self._start(name)
        tokens, pooled = self.encoded(prompts * STEPS)
        found = self._velocity(reference.points, reference.sigmas, tokens, pooled)
        velocity = float((found - reference.velocities).square().mean()) / reference.velocity_scale
        if not images:
            return velocity, float("nan")
        drawn = self.walk(prompts, noise)[0][-1]
        return velocity, float(self.pixels(drawn - reference.images).square().mean()) / reference.image_scale

    @torch.no_grad()
    def _velocity(self, x: Tensor, sigma: Tensor, tokens: Tensor, pooled: Tensor) -> Tensor:
        parts = zip(*(t.split(64) for t in (x, sigma, tokens, pooled)), strict=True)
        return torch.cat([self.model(a, s, t, y=y) for a, s, t, y in parts])

    def pixels(self, latents: Tensor) -> Tensor:
        """(n, 16, 16, 16) -> (n, 16, 16, 192) linear, so differences of latents become differences of pixels."""
        return latents.permute(0, 2, 3, 1) @ self._to_pixels


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
