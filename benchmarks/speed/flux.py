# SPDX-License-Identifier: Apache-2.0
"""Blocks of ComfyUI's own Flux at any width, with random weights, and random LoRAs on every layer of the blocks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ssr_core import Lora, LowRankUpdate, Site

TEXT_TOKENS = 256
TEXT_WIDTH, POOLED_WIDTH = 4096, 768


def flux(width: int, device: str, dtype: torch.dtype, fp8: bool = False, double: int = 1, single: int = 1) -> nn.Module:
    """So many double and single blocks. `fp8`: weights in 8 bits, cast to `dtype` for each product."""
    import comfy.ldm.flux.model
    import comfy.ops

    torch.manual_seed(0)
    stored = torch.float8_e4m3fn if fp8 else dtype
    model = comfy.ldm.flux.model.Flux(
        **{"in_channels": 16, "out_channels": 16, "vec_in_dim": POOLED_WIDTH, "context_in_dim": TEXT_WIDTH},
        **{"hidden_size": width, "mlp_ratio": 4.0, "num_heads": width // 128, "depth": double},
        **{"depth_single_blocks": single, "axes_dim": [16, 56, 56], "theta": 10000, "patch_size": 2},
        **{"qkv_bias": True, "guidance_embed": False, "txt_ids_dims": [], "dtype": stored, "device": device},
        operations=comfy.ops.manual_cast if fp8 else comfy.ops.disable_weight_init,
    )
    with torch.no_grad():
        for weight in model.parameters():
            std = weight[0].numel() ** -0.5 if weight.ndim > 1 else 0.02
            weight.copy_(torch.randn(weight.shape, device=device) * std)
    model.dtype = dtype  # of the embeddings of time, as ComfyUI's model_base says it for an fp8 checkpoint
    return model.eval().requires_grad_(False)


def inputs(tokens: int, device: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Latent, time, text and pooled text for an image of so many tokens."""
    torch.manual_seed(0)
    side = 2 * round(tokens**0.5)
    shapes = ((1, 16, side, side), (1,), (1, TEXT_TOKENS, TEXT_WIDTH), (1, POOLED_WIDTH))
    return tuple(torch.randn(shape, device=device).to(dtype) for shape in shapes)


def layers(model: nn.Module) -> dict[str, tuple[int, int]]:
    """(out, in) of every linear layer of the blocks."""
    weights = {name: getattr(module, "weight", None) for name, module in model.named_modules() if "blocks." in name}
    return {name: (w.shape[0], w.shape[1]) for name, w in weights.items() if w is not None and w.ndim == 2}


def loras(model: nn.Module, count: int, rank: int) -> list[Lora]:
    """Random ones on all of `layers`, with an effect of a few hundredths of the weights'."""
    torch.manual_seed(1)
    shapes = layers(model)
    return [Lora(str(task), {_site(n, s): _update(s, rank) for n, s in shapes.items()}) for task in range(count)]


def _site(name: str, shape: tuple[int, int]) -> Site:
    return Site.whole(name, shape[0])


def _update(shape: tuple[int, int], rank: int) -> LowRankUpdate:
    return LowRankUpdate(torch.randn(rank, shape[1]) / shape[1] ** 0.5, torch.randn(shape[0], rank) * 0.02)
