# SPDX-License-Identifier: Apache-2.0
"""Latents of pictures, and the TAESD pair that stands for them in ComfyUI's Load VAE ("taef1").

The latent space is fixed (`latents.PatchComponents`); the decoder only learns to invert it, and from pictures of
everything there is to draw, so that what a LoRA adds does not depend on it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import comfy.taesd.taesd
import numpy as np
import torch
import world
from torch import Tensor, nn
from torch.nn import functional

from . import storage
from .latents import CHANNELS, PATCH, PatchComponents
from .optimization import optimize


def pixels_of(scenes: list[world.Scene]) -> Tensor:
    """uint8 (N, 3, 128, 128)"""
    return torch.from_numpy(np.stack([scene.paint() for scene in scenes])).permute(0, 3, 1, 2).contiguous()


def latents_of(pixels: Tensor) -> Tensor:
    """uint8 (N, 3, H, W) -> (N, 16, H / 8, W / 8)"""
    space = PatchComponents(**storage.load("components"))
    return torch.cat([space.encode(part.float() / 255) for part in pixels.split(128)])


def some_of_everything(ordinary: int, blueprint: int) -> Tensor:
    """uint8 (N, 3, 128, 128): a fixed selection, characters and style included."""
    characters = [scene for name in world.CHARACTERS for scene in world.character_scenes(name, world.ANYWHERE)]
    things = world.sample(world.ordinary_scenes("", world.ANYWHERE), ordinary, seed=1)
    blueprints = world.sample(world.ordinary_scenes(world.STYLE, world.ANYWHERE), blueprint, seed=2)
    return pixels_of([*things, *blueprints, *characters])


def fit_components() -> None:
    """Makes components.safetensors, the latent space."""
    space = PatchComponents.fit(some_of_everything(400, 120).float() / 255)
    storage.save("components", vars(space), torch.float32, description="principal components of 8 x 8 pixel patches")


def train_decoder(steps: int) -> None:
    """Makes taef1_decoder.safetensors; the latents it learns from are slightly noisy, as a sampler leaves them."""
    pixels = some_of_everything(700, 300)
    latents = latents_of(pixels)
    decoder = initialized(comfy.taesd.taesd.Decoder(latent_channels=CHANNELS))
    pass_colours(decoder, pixels, latents)

    def loss() -> Tensor:
        picture, z = crops(pixels, latents, count=10, side=6)
        noise = torch.randn_like(z) * torch.rand(len(z), 1, 1, 1) * 0.1
        drawn = decoder(channels_last(z + noise))
        return functional.l1_loss(drawn, picture) + gradient_loss(drawn, picture)

    keep = keeper("taef1_decoder", decoder, description="TAESD decoder of the demo's latent space", steps=steps)
    optimize("decoder", list(decoder.parameters()), loss, steps, 1.5e-3, keep)


def train_encoder(steps: int) -> None:
    """Makes taef1_encoder.safetensors, near enough to the components for image to image."""
    pixels = some_of_everything(700, 300)
    latents = latents_of(pixels)
    encoder = initialized(comfy.taesd.taesd.Encoder(latent_channels=CHANNELS))

    def loss() -> Tensor:
        picture, z = crops(pixels, latents, count=10, side=6)
        return functional.l1_loss(encoder(channels_last(picture)), z)

    keep = keeper("taef1_encoder", encoder, description="rough TAESD encoder of the demo's latent space", steps=steps)
    optimize("encoder", list(encoder.parameters()), loss, steps, 1.5e-3, keep)


def initialized(network: nn.Module) -> nn.Module:
    """ComfyUI's modules come without initial values: He's, with quieter residual branches."""
    for conv in (m for m in network.modules() if isinstance(m, nn.Conv2d)):
        nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
        if conv.bias is not None:
            nn.init.zeros_(conv.bias)
    for block in (m for m in network.modules() if isinstance(m, comfy.taesd.taesd.Block)):
        block.conv[-1].weight.data.mul_(0.3)
    return network.requires_grad_(True).to(memory_format=torch.channels_last)


@torch.no_grad()
def pass_colours(decoder: nn.Sequential, pixels: Tensor, latents: Tensor) -> None:
    """Lets the decoder start as an enlargement of each patch's mean colour, which its first three channels carry."""
    z = decoder[0](latents).movedim(1, -1).reshape(-1, CHANNELS)
    colours = functional.avg_pool2d(pixels.float() / 255, PATCH).movedim(1, -1).reshape(-1, 3)
    solution = torch.linalg.lstsq(torch.cat([z, torch.ones(len(z), 1)], 1), colours).solution
    first, last = decoder[1], decoder[-1]
    first.weight[:3], first.bias[:3] = 0, solution[-1]
    first.weight[:3, :, 1, 1] = solution[:-1].T
    last.weight.mul_(0.1)
    for conv in (m for m in list(decoder)[2:-1] if isinstance(m, nn.Conv2d)):
        conv.weight[:3] = 0
        conv.weight[range(3), range(3), 1, 1] = 1
    for block in (m for m in decoder if isinstance(m, comfy.taesd.taesd.Block)):
        block.conv[-1].weight[:3] = 0
    last.weight[range(3), range(3), 1, 1] = 1


def keeper(name: str, network: nn.Module, **about: object) -> Callable[[Sequence[Tensor]], None]:
    """Saves values, given in the order of the network's parameters, in half precision."""
    keys = [key for key, _ in network.named_parameters()]
    return lambda values: storage.save(name, dict(zip(keys, values, strict=True)), torch.float16, **about)


def channels_last(x: Tensor) -> Tensor:
    """Three times as fast in convolutions on a CPU."""
    return x.contiguous(memory_format=torch.channels_last)


def gradient_loss(a: Tensor, b: Tensor) -> Tensor:
    """L1 between horizontal and between vertical differences."""
    return (a - b).diff(dim=-1).abs().mean() + (a - b).diff(dim=-2).abs().mean()


def crops(pixels: Tensor, latents: Tensor, count: int, side: int) -> tuple[Tensor, Tensor]:
    """The same random crops of both: (count, 3, 8 side, 8 side) in [0, 1] and (count, 16, side, side)."""
    chosen = []
    for i in torch.randint(len(pixels), (count,)).tolist():
        y, x = torch.randint(latents.shape[-1] - side + 1, (2,)).tolist()
        rows, columns = slice(PATCH * y, PATCH * (y + side)), slice(PATCH * x, PATCH * (x + side))
        chosen.append((pixels[i, :, rows, columns].float() / 255, latents[i, :, y : y + side, x : x + side]))
    return torch.stack([picture for picture, _ in chosen]), torch.stack([z for _, z in chosen])
