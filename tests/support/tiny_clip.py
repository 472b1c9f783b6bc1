"""A text encoder small enough for tests, with the real tokenizer, through ComfyUI's own loader."""

import importlib
from typing import Any

import torch

CONFIG = {
    **{"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 128},
    **{"hidden_act": "quick_gelu", "max_position_embeddings": 77, "eos_token_id": 49407, "projection_dim": 64},
}


def tiny_clip(dtype: torch.dtype | None = None) -> Any:
    """A CLIP that CLIP Text Encode and LoRA loaders take; random weights, in ComfyUI's own choice of dtype."""
    sd = importlib.import_module("comfy.sd")
    options = {"model_config": CONFIG, "dtype": dtype}
    return sd.load_text_encoder_state_dicts([_weights()], clip_type=sd.CLIPType.STABLE_DIFFUSION, model_options=options)


def _weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.token_embedding.weight": (49408, 64),
        "embeddings.position_embedding.weight": (77, 64),
    }
    for i in range(2):
        layer = f"encoder.layers.{i}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= {f"{layer}.self_attn.{name}.weight": (64, 64), f"{layer}.self_attn.{name}.bias": (64,)}
        shapes |= {f"{layer}.mlp.fc1.weight": (128, 64), f"{layer}.mlp.fc1.bias": (128,)}
        shapes |= {f"{layer}.mlp.fc2.weight": (64, 128), f"{layer}.mlp.fc2.bias": (64,)}
        for name in ("layer_norm1", "layer_norm2"):
            shapes |= {f"{layer}.{name}.weight": (64,), f"{layer}.{name}.bias": (64,)}
    shapes |= {"final_layer_norm.weight": (64,), "final_layer_norm.bias": (64,)}
    return {f"text_model.{k}": 0.1 * torch.randn(*v, generator=generator) for k, v in shapes.items()}
