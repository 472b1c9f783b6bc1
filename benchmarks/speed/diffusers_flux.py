# SPDX-License-Identifier: Apache-2.0
"""Flux's transformer in diffusers with random weights, a pipeline around it as small as one can be, and LoRA files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

diffusers.logging.set_verbosity_error()  # it warns of every conversion

TEXT_TOKENS, TEXT_WIDTH, POOLED_WIDTH, CHANNELS = 64, 512, 256, 64


def transformer(width: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> nn.Module:
    """Two double and four single blocks."""
    torch.manual_seed(0)
    model = diffusers.FluxTransformer2DModel(
        **{"patch_size": 1, "in_channels": CHANNELS, "num_layers": 2, "num_single_layers": 4},
        **{"attention_head_dim": 128, "num_attention_heads": width // 128, "joint_attention_dim": TEXT_WIDTH},
        **{"pooled_projection_dim": POOLED_WIDTH, "guidance_embeds": False, "axes_dims_rope": [16, 56, 56]},
    )
    return model.eval().requires_grad_(False).to(device, dtype)


def write_lora(path: Path, model: nn.Module, rank: int, seed: int) -> None:
    """A random LoRA on every linear layer of the blocks, named as the modules are."""
    torch.manual_seed(seed)
    tensors = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "transformer_blocks." in name:
            tensors[f"{name}.lora_A.weight"] = torch.randn(rank, module.in_features) / module.in_features**0.5
            tensors[f"{name}.lora_B.weight"] = torch.randn(module.out_features, rank) * 0.02
    save_file(tensors, path)


class Pipeline:
    """What the paper's runner asks of a pipeline of diffsynth: `dit`, `load_lora` and a call that samples."""

    def __init__(self, dit: nn.Module, tokens: int) -> None:
        self.dit, self.tokens = dit, tokens

    def load_lora(self, module: nn.Module, path: str, alpha: float = 1.0) -> None:
        """Add a LoRA to the weights, layer by layer, as diffsynth's loader does it."""
        tensors = load_file(path)
        for name, layer in module.named_modules():
            if f"{name}.lora_A.weight" in tensors:
                down, up = (tensors[f"{name}.lora_{letter}.weight"].to(layer.weight) for letter in "AB")
                layer.load_state_dict({"weight": layer.weight + alpha * (up @ down)}, strict=False)

    def convert_state_dict(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The files are named as the modules are."""
        return dict(tensors)

    @torch.no_grad()
    def __call__(self, prompt: str, seed: int, num_inference_steps: int) -> Tensor:
        """Euler, from noise."""
        latent = self.start(seed)
        for step in range(num_inference_steps):
            latent = latent - self.velocity(latent, prompt, 1 - step / num_inference_steps) / num_inference_steps
        return latent

    def start(self, seed: int) -> Tensor:
        return self._noise((1, self.tokens, CHANNELS), seed)

    def velocity(self, latent: Tensor, prompt: str, time: float) -> Tensor:
        seed = sum(prompt.encode())
        call: dict[str, Any] = {
            "hidden_states": latent,
            "encoder_hidden_states": self._noise((1, TEXT_TOKENS, TEXT_WIDTH), seed),
            "pooled_projections": self._noise((1, POOLED_WIDTH), seed + 1),
            "timestep": torch.full((1,), time).to(latent),
            "img_ids": self._places().to(latent),
            "txt_ids": torch.zeros(TEXT_TOKENS, 3).to(latent),
        }
        return self.dit(**call, return_dict=False)[0]

    def _places(self) -> Tensor:
        side, number = round(self.tokens**0.5), torch.arange(self.tokens)
        return torch.stack([torch.zeros(self.tokens), number // side, number % side], -1)

    def _noise(self, shape: tuple[int, ...], seed: int) -> Tensor:
        weight = next(self.dit.parameters())
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(weight)
