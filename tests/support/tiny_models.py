"""A tiny model of every family, random weights in ComfyUI's real classes, and LoRAs for it in every known spelling.

A spelling is a way in which some trainer calls a model's weights. Which names exist is asked of ComfyUI's own key map,
so that nothing is listed here that ComfyUI would not load, and nothing that it would load is left out unnoticed.

ComfyUI is imported when a model is built, not before: only then is it importable (fixture `comfy_runtime`).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import tiny_flux
from tiny_flux import StateDict

# --- models ---


@dataclass(frozen=True)
class Family:
    """One architecture: a real model with random weights, and what it is sampled with."""

    name: str
    build: Callable[[], Any]  # a fresh ModelPatcher, float32, on the CPU
    latent: Callable[[], dict[str, Tensor]]  # an empty LATENT, as the stock node for this family makes it
    conditioning: Callable[[int], list[Any]]  # by seed, a random CONDITIONING with one entry


def loaded(state_dict: Mapping[str, Tensor]) -> Any:
    """The ModelPatcher that ComfyUI's own Load Diffusion Model makes of these weights."""
    sd = importlib.import_module("comfy.sd")
    model = sd.load_diffusion_model_state_dict(dict(state_dict), model_options={"dtype": torch.float32})
    assert model is not None, "ComfyUI did not recognise this model"
    return model


def detected(name: str, config: dict[str, Any]) -> Callable[[], Any]:
    """Builds a model that ComfyUI recognises by its weights alone."""
    return lambda: loaded(_made(name, config).diffusion_model.state_dict())


def constructed(
    name: str, config: dict[str, Any], change: Callable[[Any], None] = lambda diffusion_model: None
) -> Callable[[], Any]:
    """Builds a model that ComfyUI would not recognise, because its detection expects the sizes of the real one.

    `change` makes smaller what has a fixed size.
    """

    def build() -> Any:
        patcher, management = (importlib.import_module(f"comfy.{m}") for m in ("model_patcher", "model_management"))
        devices = {"load_device": management.get_torch_device(), "offload_device": management.unet_offload_device()}
        return patcher.CoreModelPatcher(_made(name, config, change), **devices)

    return build


def _made(name: str, config: dict[str, Any], change: Callable[[Any], None] = lambda diffusion_model: None) -> Any:
    """A BaseModel of the class that `comfy.supported_models.<name>` stands for, with random weights."""
    supported = getattr(importlib.import_module("comfy.supported_models"), name)(config)
    supported.set_inference_dtype(torch.float32, None)
    model = supported.get_model({}, "")
    change(model.diffusion_model)
    generator = torch.Generator().manual_seed(0)
    weights = {key: _random(key, value, generator) for key, value in model.diffusion_model.state_dict().items()}
    model.diffusion_model.load_state_dict(weights)
    return model


def _random(key: str, like: Tensor, generator: torch.Generator) -> Tensor:
    """Nothing is zero: an untrained layer must not hide a mistake behind a factor of nothing."""
    noise = torch.randn(like.shape, generator=generator)
    if not key.endswith(".weight"):  # biases, tables of modulations and positions, norm scales that are centred on 0
        return 0.1 * noise
    return noise / like[0].numel() ** 0.5 if like.ndim > 1 else 1 + 0.1 * noise


def _latent(*shape: int) -> Callable[[], dict[str, Tensor]]:
    return lambda: {"samples": torch.zeros(1, *shape)}


def _conditioning(width: int, pooled: int = 0, tokens: int = 6) -> Callable[[int], list[Any]]:
    def random(seed: int) -> list[Any]:
        generator = torch.Generator().manual_seed(seed)
        extra = {"pooled_output": torch.randn(1, pooled, generator=generator)} if pooled else {}
        return [[torch.randn(1, tokens, width, generator=generator), extra]]

    return random


_UNET = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "use_spatial_transformer": True,
    "legacy": False,
    "model_channels": 32,  # the least that a group norm of 32 groups divides
    "channel_mult": [1, 2],
    "num_res_blocks": [1, 1],
    "transformer_depth_middle": 1,
    "use_temporal_attention": False,
    "use_temporal_resblock": False,
}
SD15_CONFIG = {
    **_UNET,
    "adm_in_channels": None,
    "context_dim": 24,
    "use_linear_in_transformer": False,
    "transformer_depth": [1, 0],
    "transformer_depth_output": [1, 0, 0, 0],
}
_SDXL = {
    **_UNET,
    "num_classes": "sequential",
    "adm_in_channels": 16 + 6 * 256,  # the pooled output and six sizes
    "context_dim": 24,
    "use_linear_in_transformer": True,
    "transformer_depth": [0, 1],
    "transformer_depth_output": [0, 0, 0, 1],
}
_SD3 = {
    "in_channels": 16,
    "patch_size": 2,
    "out_channels": 16,
    "depth": 2,  # the last context block lacks most layers, so one before it
    "input_size": None,
    "adm_in_channels": 16,
    "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 24, "out_features": 128}},
    "num_patches": 36,
    "pos_embed_max_size": 6,
    "pos_embed_scaling_factor": None,
}
_FLUX2 = {
    "image_model": "flux2",
    "in_channels": 128,
    "out_channels": 128,
    "patch_size": 1,
    "vec_in_dim": None,
    "context_in_dim": 24,
    "hidden_size": 128,
    "num_heads": 1,
    "axes_dim": [32, 32, 32, 32],
    "mlp_ratio": 3.0,
    "theta": 2000,
    "depth": 1,
    "depth_single_blocks": 1,
    "qkv_bias": False,
    "guidance_embed": True,
    "global_modulation": True,
    "mlp_silu_act": True,
    "ops_bias": False,
    "txt_ids_dims": [3],
}
_CHROMA = {
    "image_model": "chroma",
    "in_channels": 64,
    "out_channels": 64,
    "patch_size": 2,
    "vec_in_dim": None,
    "context_in_dim": 24,
    "hidden_size": 32,
    "num_heads": 2,
    "axes_dim": [4, 6, 6],
    "mlp_ratio": 4.0,
    "theta": 10000,
    "depth": 1,
    "depth_single_blocks": 1,
    "qkv_bias": True,
    "in_dim": 64,
    "out_dim": 32,
    "hidden_dim": 32,
    "n_layers": 1,
    "txt_ids_dims": [],
}
_HUNYUAN_VIDEO = {
    "image_model": "hunyuan_video",
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": [1, 2, 2],
    "vec_in_dim": 768,
    "context_in_dim": 24,
    "hidden_size": 128,
    "num_heads": 1,
    "axes_dim": [16, 56, 56],
    "mlp_ratio": 4.0,
    "theta": 256,
    "depth": 1,
    "depth_single_blocks": 1,
    "qkv_bias": True,
    "guidance_embed": True,
    "byt5": False,
    "meanflow": False,
    "use_cond_type_embedding": False,
    "vision_in_dim": None,
    "meanflow_sum": False,
}
_QWEN_IMAGE = {
    "image_model": "qwen_image",
    "in_channels": 64,
    "out_channels": 16,
    "num_layers": 1,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "axes_dims_rope": (4, 6, 6),
    "joint_attention_dim": 24,
}
_LUMINA2 = {
    "image_model": "lumina2",
    "patch_size": 2,
    "in_channels": 16,
    "dim": 48,
    "cap_feat_dim": 24,
    "n_layers": 1,
    "n_refiner_layers": 1,
    "qk_norm": True,
    "n_heads": 3,  # three for each key and value, as in the real one
    "n_kv_heads": 1,
    "axes_dims": [4, 6, 6],
    "axes_lens": [300, 512, 512],
    "rope_theta": 10000.0,
    "ffn_dim_multiplier": 2.0,
    "multiple_of": 32,
}
_Z_IMAGE = {
    **_LUMINA2,
    "dim": 256,  # that of its time embedding
    "n_heads": 2,
    "n_kv_heads": 2,
    "axes_dims": [32, 48, 48],
    "axes_lens": [1536, 512, 512],
    "rope_theta": 256.0,
    "ffn_dim_multiplier": 0.5,
    "z_image_modulation": True,
    "time_scale": 1000.0,
    "pad_tokens_multiple": 32,
}
WAN_CONFIG = {
    "image_model": "wan2.1",
    "model_type": "t2v",
    "dim": 128,
    "out_dim": 16,
    "in_dim": 16,
    "num_heads": 1,
    "ffn_dim": 128,
    "num_layers": 1,
}
_KREA2 = {
    "image_model": "krea2",
    "features": 256,
    "channels": 16,
    "patch": 2,
    "layers": 1,
    "heads": 2,
    "kvheads": 1,
    "txtlayers": 3,
    "txtdim": 40,  # of 20 heads
}

_FAMILIES = (
    Family(
        "Flux",
        lambda: loaded(tiny_flux.flux_state_dict(single_blocks=1, guidance=True)),
        tiny_flux.empty_latent,
        tiny_flux.conditioning,
    ),
    Family("Flux2", detected("Flux2", _FLUX2), _latent(128, 4, 4), _conditioning(24)),
    Family("Chroma", constructed("Chroma", _CHROMA), _latent(16, 8, 8), _conditioning(24)),
    Family("SD1.5", constructed("SD15", SD15_CONFIG), _latent(4, 8, 8), _conditioning(24)),
    Family("SDXL", constructed("SDXL", _SDXL), _latent(4, 8, 8), _conditioning(24, pooled=16)),
    Family("SD3", detected("SD3", _SD3), _latent(16, 8, 8), _conditioning(24, pooled=16)),
    Family(
        "SD3.5",
        detected("SD3", {**_SD3, "qk_norm": "rms", "x_block_self_attn_layers": [0]}),
        _latent(16, 8, 8),
        _conditioning(24, pooled=16),
    ),
    Family("Qwen-Image", constructed("QwenImage", _QWEN_IMAGE), _latent(16, 8, 8), _conditioning(24)),
    Family("Z-Image", constructed("ZImage", _Z_IMAGE), _latent(16, 8, 8), _conditioning(24)),
    Family("Lumina2", constructed("Lumina2", _LUMINA2), _latent(16, 8, 8), _conditioning(24)),
    Family("Krea2", detected("Krea2", _KREA2), _latent(16, 8, 8), _conditioning(3 * 40)),
    Family("Wan2.1", detected("WAN21_T2V", WAN_CONFIG), _latent(16, 2, 4, 4), _conditioning(4096)),
    Family("HunyuanVideo", detected("HunyuanVideo", _HUNYUAN_VIDEO), _latent(16, 2, 4, 4), _conditioning(24, 768)),
)
FAMILIES: dict[str, Family] = {family.name: family for family in _FAMILIES}


# --- LoRAs ---


@dataclass(frozen=True)
class Spelling:
    """How a kind of trainer calls weights: a prefix, whose names follow it, and what the two factors end with."""

    prefix: str  # in ComfyUI's key map
    own_names: bool = False  # the model's own; otherwise others, and its own for a weight that has no other
    ends: tuple[str, str] = (".lora_A.weight", ".lora_B.weight")  # down, up
    alpha: bool = False  # whether files hold one; it is half the rank here
    written: str | None = None  # the prefix in files, where ComfyUI converts it

    def __str__(self) -> str:
        """What a file holds, such as `lora_unet_<the model's name>.lora_down.weight`."""
        names = "<the model's name>" if self.own_names else "<other name>"
        return f"{self.prefix if self.written is None else self.written}{names}{self.ends[0]}"


KOHYA_ENDS = (".lora_down.weight", ".lora_up.weight")
ENDS = (  # all that ComfyUI knows
    KOHYA_ENDS,
    ("_lora.down.weight", "_lora.up.weight"),
    (".lora_A.weight", ".lora_B.weight"),
    (".lora.down.weight", ".lora.up.weight"),
    (".lora_A", ".lora_B"),
    (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    (".lora_A.default.weight", ".lora_B.default.weight"),
)
PREFIXES = (  # a name belongs to the first that it begins with
    *("lora_unet_", "lycoris_", "lora_transformer_"),
    *("diffusion_model.", "transformer.", "base_model.model.", "unet.", ""),
)

GENERIC = Spelling("diffusion_model.", own_names=True)
KOHYA = Spelling("lora_unet_", own_names=True, ends=KOHYA_ENDS, alpha=True)
_RENAMED = Spelling("diffusion_model.")  # ComfyUI's prefix before other names than ComfyUI's
_DIFFUSERS = Spelling("transformer.")
_DIFFSYNTH = Spelling("", ends=(".lora_A.default.weight", ".lora_B.default.weight"))
_ONETRAINER = Spelling("lora_transformer_", ends=KOHYA_ENDS, alpha=True)
_SIMPLETUNER = Spelling("lycoris_", ends=KOHYA_ENDS, alpha=True)
_COMMON = {"generic": GENERIC, "kohya": KOHYA}
_FLUX = {
    **_COMMON,
    "diffusers": _DIFFUSERS,
    "DiffSynth": _DIFFSYNTH,
    "OneTrainer": _ONETRAINER,
    "SimpleTuner LyCORIS": _SIMPLETUNER,
    "USO, converted": _RENAMED,
}
_MMDIT = {
    **_COMMON,
    "diffusers": _DIFFUSERS,
    "PEFT": Spelling("base_model.model."),
    "OneTrainer": _ONETRAINER,
    "SimpleTuner LyCORIS": _SIMPLETUNER,
}
_UNETS = {
    **_COMMON,
    "kohya, diffusers names": Spelling("lora_unet_", ends=KOHYA_ENDS, alpha=True),
    "SimpleTuner LyCORIS": _SIMPLETUNER,
    "attention processors": Spelling("", ends=("_lora.down.weight", "_lora.up.weight")),
    "attention processors under unet.": Spelling("unet.", ends=("_lora.down.weight", "_lora.up.weight")),
    "diffusers": Spelling("unet.", ends=(".lora.down.weight", ".lora.up.weight")),
    "diffusers, PEFT": Spelling("unet."),
}
_SINGLE_STREAM = {
    **_COMMON,
    "generic, diffusers names": _RENAMED,
    "diffusers": _DIFFUSERS,
    "DiffSynth": _DIFFSYNTH,
    "SimpleTuner LyCORIS": _SIMPLETUNER,
}
SPELLINGS: dict[str, dict[str, Spelling]] = {
    "Flux": _FLUX,
    "Flux2": _FLUX,
    "Chroma": _FLUX,
    "SD1.5": _UNETS,
    "SDXL": _UNETS,
    "SD3": _MMDIT,
    "SD3.5": _MMDIT,
    "Qwen-Image": {
        **_COMMON,
        "diffusers": _DIFFUSERS,
        "DiffSynth": _DIFFSYNTH,
        "Lightning": Spelling("", ends=KOHYA_ENDS, alpha=True),
        "SimpleTuner LyCORIS": _SIMPLETUNER,
    },
    "Z-Image": _SINGLE_STREAM,
    "Lumina2": _SINGLE_STREAM,
    "Krea2": _SINGLE_STREAM,
    "Wan2.1": {**_COMMON, "Wan-Fun": Spelling("lora_unet_", True, KOHYA_ENDS, alpha=True, written="lora_unet__")},
    "HunyuanVideo": {**_COMMON, "diffusion-pipe": _DIFFUSERS, "diffusion-pipe, old": _RENAMED},
}


@dataclass(frozen=True)
class Target:
    """What a name in ComfyUI's key map means: a weight, or a slice of one."""

    key: str
    offset: tuple[int, int, int] | None  # axis, start, length
    shape: tuple[int, ...]  # of the slice

    @property
    def module(self) -> str:
        return self.key.removeprefix("diffusion_model.").removesuffix(".weight")


def known_names(model: Any) -> dict[str, Target]:
    """Every name by which ComfyUI knows a weight of 2 or more dimensions, or a slice of one that exists."""
    lora = importlib.import_module("comfy.lora")
    shapes = {key: tuple(value.shape) for key, value in model.model.state_dict().items() if key.endswith(".weight")}
    known = {}
    for name, value in lora.model_lora_keys_unet(model.model, {}).items():
        key, offset = (value, None) if isinstance(value, str) else value[:2]
        shape = shapes.get(key, ())
        if offset is not None and shape:
            axis, start, length = offset
            # Lumina2: the key map's slices are those of Z-Image, which has as many keys and values as queries
            shape = (*shape[:axis], length, *shape[axis + 1 :]) if start + length <= shape[axis] else ()
        if len(shape) > 1:
            known[name] = Target(key, offset, shape)
    return known


def spelled(model: Any, spelling: Spelling) -> list[dict[str, Target]]:
    """The names of a spelling. A weight's second and further names are in the second and further dictionaries."""
    named: dict[str, list[tuple[str, Target]]] = {}
    for name, target in known_names(model).items():
        if next(prefix for prefix in PREFIXES if name.startswith(prefix)) == spelling.prefix:
            named.setdefault(target.key, []).append((name.removeprefix(spelling.prefix), target))
    rounds: list[dict[str, Target]] = []
    for key in sorted(named):  # sorted, because ComfyUI keeps some names in sets, whose order changes
        # backwards, because that puts the usual names first
        for name, target in sorted(_chosen(named[key], spelling), key=lambda item: item[0], reverse=True):
            free = next((taken for taken in rounds if target not in taken.values()), None)
            if free is None:
                rounds.append(free := {})
            free[name] = target
    return rounds


def _chosen(names: list[tuple[str, Target]], spelling: Spelling) -> list[tuple[str, Target]]:
    """Those of a weight's names that the spelling uses."""
    dot = "_" if spelling.prefix.endswith("_") else "."
    own = [(name, target) for name, target in names if name == target.module.replace(".", dot)]
    return own if spelling.own_names else [item for item in names if item not in own] or own


def loras(model: Any, spelling: Spelling, rank: int = 4, seed: int = 0, strength: float = 0.3) -> list[StateDict]:
    """Random LoRA files for every weight that a spelling names; those after the first use further names of weights.

    `strength` scales the update: at 1, without alpha, its entries are as large as the weight's.
    """
    generator = torch.Generator().manual_seed(seed)
    prefix = spelling.prefix if spelling.written is None else spelling.written
    return [
        {
            key: value
            for name, target in names.items()
            for key, value in _pair(f"{prefix}{name}", target.shape, spelling, rank, strength, generator).items()
        }
        for names in spelled(model, spelling)
    ]


def _pair(
    name: str, shape: tuple[int, ...], spelling: Spelling, rank: int, strength: float, generator: torch.Generator
) -> StateDict:
    down, up = spelling.ends
    inner = torch.Size(shape[1:]).numel()
    weights = {
        f"{name}{down}": torch.randn(rank, *shape[1:], generator=generator) / inner**0.5,
        f"{name}{up}": strength * torch.randn(shape[0], rank, *(1,) * len(shape[2:]), generator=generator) / rank**0.5,
    }
    if spelling.alpha:
        weights[f"{name}.alpha"] = torch.tensor(rank / 2)
    return weights
