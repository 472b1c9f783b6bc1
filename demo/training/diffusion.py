# SPDX-License-Identifier: Apache-2.0
"""ComfyUI's Flux at 256 channels, trained by flow matching: x_sigma = (1 - sigma) x + sigma noise, and the model
predicts noise - x."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.ldm.flux.model
import comfy.ops
import torch
import world
from torch import Tensor, nn
from torch.nn import functional

import tiny_clip

from . import storage
from .autoencoder import keeper, latents_of, pixels_of
from .captions import Captions, stray_words, wordings_with_strays
from .latents import CHANNELS
from .optimization import Checkpoint, optimize

# what comfy.model_detection reads from the shapes of the weights (FluxSchnell: no guidance, shift 1)
CONFIG = {
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "patch_size": 2,
    "hidden_size": 256,
    "num_heads": 2,
    "mlp_ratio": 4.0,
    "depth": 1,
    "depth_single_blocks": 3,
    "context_in_dim": tiny_clip.WIDTH,
    "vec_in_dim": tiny_clip.WIDTH,
    "axes_dim": [16, 56, 56],
    "theta": 10000,
    "qkv_bias": True,
    "guidance_embed": False,
    "txt_ids_dims": [],
}
ABOUT = "Flux architecture with 256 channels, 1 double and 3 single blocks, for pictures of 128 x 128 pixels"


def new_model(config: dict[str, Any] = CONFIG) -> nn.Module:
    """Fresh weights: every block starts as the identity and the output as zero."""
    model = comfy.ldm.flux.model.Flux(dtype=torch.float32, operations=comfy.ops.disable_weight_init, **config)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.ones_(parameter)
        elif name.endswith("bias") or any(part in name for part in ("_mod.", "modulation.", "final_layer.")):
            nn.init.zeros_(parameter)
        else:
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    for norm in (m for m in model.modules() if isinstance(m, nn.LayerNorm)):
        # the blocks add to their input in place, but autograd needs what the norms saw
        norm.register_forward_pre_hook(lambda _, inputs: (inputs[0].clone(),))
    return model


def base_model(name: str = "tiny_flux", folder: Path = storage.ASSETS, config: dict[str, Any] = CONFIG) -> nn.Module:
    """A trained model, frozen."""
    model = new_model(config)
    model.load_state_dict(storage.load(name, folder))
    return model.requires_grad_(False)


def train_base(steps: int, batch: int) -> None:
    """Makes tiny_flux.safetensors from ordinary scenes only: no character, no style, none of their names."""
    model, scenes = new_model(), world.ordinary_scenes("", world.ANYWHERE)
    teach(model, scenes, steps, batch, 2e-3, keep(model, batch), torch.bfloat16)


def finish_base(steps: int, batch: int) -> None:
    """Trains tiny_flux.safetensors further on things that stand in the middle, which makes its lines sharper."""
    model = base_model()
    teach(model, world.ordinary_scenes(), steps, batch, 1e-3, keep(model, batch))


def narrow_base() -> None:
    """Rounds the matrices of tiny_flux.safetensors to 8 bits a weight, which halves the file. LoRAs come after it."""
    weights = storage.load("tiny_flux")
    narrow = {
        name: value.to(torch.float8_e4m3fn if is_matrix_of_block(name, value) else torch.float16)
        for name, value in weights.items()
    }
    storage.save("tiny_flux", narrow, description=ABOUT)


def is_matrix_of_block(name: str, weight: Tensor) -> bool:
    return "_blocks." in name and weight.ndim == 2


def keep(model: nn.Module, batch: int) -> Checkpoint:
    return keeper("tiny_flux", model, description=ABOUT, batch=batch)


def teach(
    model: nn.Module,
    scenes: Iterator[world.Scene],
    steps: int,
    batch: int,
    rate: float,
    checkpoint: Checkpoint,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Teaches all weights of `model` to draw `scenes`, with products in `dtype`."""
    words, rng = stray_words(1500), random.Random(6)
    course = Lesson.on(list(scenes), lambda scene: wordings_with_strays(scene, words, rng))
    fit(model, lambda: course.loss(model, batch, dtype), steps, rate, checkpoint)


def fit(model: nn.Module, loss: Callable[[], Tensor], steps: int, rate: float, checkpoint: Checkpoint) -> None:
    """`teach` of any loss."""
    model.requires_grad_(True)
    matrices = [p for name, p in model.named_parameters() if is_matrix_of_block(name, p)]
    optimize("base", list(model.parameters()), loss, steps, rate, checkpoint, matrices)


@dataclass(frozen=True)
class Lesson:
    """Latents (N, 16, 16, 16) with C wordings each: wording c of picture n is caption n C + c."""

    latents: Tensor
    captions: Captions

    @classmethod
    def on(cls, scenes: list[world.Scene], wording: Callable[[world.Scene], list[str]]) -> Lesson:
        texts = [text for scene in scenes for text in wording(scene)]
        return cls(latents_of(pixels_of(scenes)), Captions.encode(texts))

    def loss(self, model: nn.Module, batch: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Mean squared error of the velocity over a random batch with stratified noise levels."""
        n = torch.randint(len(self.latents), (batch,))
        wordings = len(self.captions.pooled) // len(self.latents)
        c = n * wordings + torch.randint(wordings, (batch,))
        x, noise = self.latents[n], torch.randn(batch, *self.latents.shape[1:])
        sigma = (torch.randperm(batch) + torch.rand(batch)) / batch
        noisy = torch.lerp(x, noise, sigma.view(-1, 1, 1, 1))
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            velocity = model(noisy, sigma, self.captions.tokens[c], y=self.captions.pooled[c])
        return functional.mse_loss(velocity.float(), noise - x)
