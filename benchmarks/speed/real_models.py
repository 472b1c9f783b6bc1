# SPDX-License-Identifier: Apache-2.0
"""ComfyUI's own model classes at their real sizes, on the meta device: shapes without memory."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import machine  # noqa: F401  (makes ssr_core importable)
from ssr_core.distillation.frozen import blocks_of

META = torch.device("meta")
HALF = torch.bfloat16


class Named(NamedTuple):
    """A model, and what it is called with at one picture of 1024 x 1024 and the usual number of text tokens."""

    make: Callable[[dict[str, Any]], nn.Module]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def built(self, device: torch.device | str = META, dtype: torch.dtype = HALF) -> nn.Module:
        operations = importlib.import_module("comfy.ops").disable_weight_init
        return self.make({"device": device, "dtype": dtype, "operations": operations})

    def given(self, device: str, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """(args, kwargs) on a device that computes in `dtype`."""

        def there(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            return torch.zeros(value.shape, dtype=dtype if value.dtype == HALF else value.dtype, device=device)

        return tuple(map(there, self.args)), {name: there(one) for name, one in self.kwargs.items()}


def empty(*shape: int, dtype: torch.dtype = HALF) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


def shapes(network: nn.Module) -> dict[str, torch.Size]:
    """Of the weights of all linear and convolutional layers of the blocks."""
    inside = {id(module) for block in blocks_of(network) for module in block.modules()}
    return {
        name: module.weight.shape
        for name, module in network.named_modules()
        if id(module) in inside and isinstance(module, nn.Linear | nn.Conv2d)
    }


def models() -> dict[str, Named]:
    time = empty(1, dtype=torch.float32)
    return {
        "SDXL": Named(sdxl, (empty(1, 4, 128, 128), time, empty(1, 77, 2048)), {"y": empty(1, 2816)}),
        "Flux": Named(flux, (empty(1, 16, 128, 128), time, empty(1, 256, 4096), empty(1, 768)), {"guidance": empty(1)}),
        "Flux2 Klein 4B": Named(klein, (empty(1, 128, 64, 64), time, empty(1, 512, 7680), None), {}),
        "Qwen-Image": Named(qwen_image, (empty(1, 16, 1, 128, 128), time, empty(1, 128, 3584)), {}),
        "Krea 2": Named(krea, (empty(1, 16, 128, 128), time, empty(1, 128, 12 * 2560)), {}),
        "Wan 2.2 14B": Named(wan, (empty(1, 16, 1, 128, 128), time, empty(1, 512, 4096)), {}),
        "Z-Image": Named(z_image, (empty(1, 16, 128, 128), time, empty(1, 128, 2560), 128), {}),
    }


def sdxl(common: dict[str, Any]) -> nn.Module:
    return importlib.import_module("comfy.ldm.modules.diffusionmodules.openaimodel").UNetModel(
        **{"image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320, "channel_mult": [1, 2, 4]},
        **{"num_res_blocks": [2, 2, 2], "use_spatial_transformer": True, "use_linear_in_transformer": True},
        **{"transformer_depth": [0, 0, 2, 2, 10, 10], "transformer_depth_middle": 10, "context_dim": 2048},
        **{"transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10], "num_head_channels": 64, "legacy": False},
        **{"num_classes": "sequential", "adm_in_channels": 2816, **common},
    )


def flux(common: dict[str, Any]) -> nn.Module:
    return importlib.import_module("comfy.ldm.flux.model").Flux(
        **{"in_channels": 16, "out_channels": 16, "vec_in_dim": 768, "context_in_dim": 4096, "hidden_size": 3072},
        **{"mlp_ratio": 4.0, "num_heads": 24, "depth": 19, "depth_single_blocks": 38, "axes_dim": [16, 56, 56]},
        **{"theta": 10000, "patch_size": 2, "qkv_bias": True, "guidance_embed": True, "txt_ids_dims": [], **common},
    )


def klein(common: dict[str, Any]) -> nn.Module:
    return importlib.import_module("comfy.ldm.flux.model").Flux(
        **{"in_channels": 128, "out_channels": 128, "vec_in_dim": None, "context_in_dim": 7680, "hidden_size": 3072},
        **{"mlp_ratio": 3.0, "num_heads": 24, "depth": 5, "depth_single_blocks": 20, "axes_dim": [32, 32, 32, 32]},
        **{"theta": 2000, "patch_size": 1, "qkv_bias": False, "ops_bias": False, "guidance_embed": False},
        **{"global_modulation": True, "mlp_silu_act": True, "txt_ids_dims": [3], **common},
    )


def qwen_image(common: dict[str, Any]) -> nn.Module:
    return importlib.import_module("comfy.ldm.qwen_image.model").QwenImageTransformer2DModel(**common)


def krea(common: dict[str, Any]) -> nn.Module:
    return importlib.import_module("comfy.ldm.krea2.model").SingleStreamDiT(**common)


def wan(common: dict[str, Any]) -> nn.Module:
    """One of the two experts."""
    return importlib.import_module("comfy.ldm.wan.model").WanModel(
        **{"dim": 5120, "ffn_dim": 13824, "num_heads": 40, "num_layers": 40, **common}
    )


def z_image(common: dict[str, Any]) -> nn.Module:
    return importlib.import_module("comfy.ldm.lumina.model").NextDiT(
        **{"in_channels": 16, "dim": 3840, "n_layers": 30, "n_heads": 30, "n_kv_heads": 30, "qk_norm": True},
        **{"axes_dims": [32, 48, 48], "axes_lens": [1536, 512, 512], "rope_theta": 256.0, "cap_feat_dim": 2560},
        **{"ffn_dim_multiplier": 8.0 / 3.0, "z_image_modulation": True, "time_scale": 1000.0, **common},
    )
