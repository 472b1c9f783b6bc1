"""Without a text encoder at hand, names in files mean the layers that ComfyUI's own key map says they mean."""

import importlib
from itertools import combinations

import pytest
import torch

from run_nodes import collect, relative, solve, task
from tiny_flux import flux_lora

pytestmark = [pytest.mark.comfy, pytest.mark.usefixtures("pack")]

CLIP = [f"text_model.encoder.layers.{i}.{part}" for i in range(2) for part in ("mlp.fc1", "self_attn.q_proj")]
T5 = [f"encoder.block.{i}.layer.0.SelfAttention.{part}" for i in range(2) for part in "qo"]
LLAMA = [f"model.layers.{i}.{part}" for i in range(2) for part in ("mlp.up_proj", "self_attn.q_proj")]
BERT = ["bert.encoder.layer.0.attention.self.query"]
ENCODERS = {
    "SD1.5": {"clip_l": CLIP},
    "SD2": {"clip_h": CLIP},
    "SDXL": {"clip_l": CLIP, "clip_g": [*CLIP, "text_projection"]},
    "SDXL refiner": {"clip_g": CLIP},
    "SD3": {"clip_l": CLIP, "clip_g": CLIP, "t5xxl": T5},
    "Flux": {"clip_l": CLIP, "t5xxl": T5},
    "HiDream": {"clip_l": CLIP, "clip_g": CLIP, "t5xxl": T5, "llama": LLAMA},
    "HunyuanVideo": {"clip_l": CLIP, "llama": LLAMA},
    "Anima": {"qwen3_06b": LLAMA},
    "Lumina2": {"gemma2_2b": LLAMA},
    "HunyuanDiT": {"hydit_clip": BERT, "mt5xl": T5},
}


def key_map(encoders) -> dict[str, str]:
    """ComfyUI's own, of a text encoder with these layers."""
    lora = importlib.import_module("comfy.lora")
    keys = [f"{one}.transformer.{layer}.weight" for one, layers in encoders.items() for layer in layers]
    model = type("Model", (), {"state_dict": lambda self: dict.fromkeys(keys)})()
    return lora.model_lora_keys_clip(model, {})


@pytest.mark.parametrize("family", ENCODERS)
def test_two_names_mean_the__if_comfyui_says_so(family, pack_module):
    meanings, known = pack_module("nodes.reading.encoder_names").meanings, key_map(ENCODERS[family])
    found = meanings(known)
    for one, other in combinations(known, 2):
        assert (found[one] == found[other]) == (known[one] == known[other]), (one, other)


def test_a_name_that_may_mean_two_layers_is_refused(pack_module):
    layer = "encoder.block.0.layer.0.SelfAttention.q"
    names = [f"text_encoders.{one}.transformer.{layer}" for one in ("t5xxl", "byt5")]
    found = pack_module("nodes.reading.encoder_names").meanings(names)
    assert found[names[0]] != found[names[1]]
    with pytest.raises(pack_module("ssr_core").LoraError, match=r"any of the text encoders byt5, t5xxl.* Connect clip"):
        pack_module("nodes.reading.encoder_names").meanings([*names, f"lora_te2_{layer.replace('.', '_')}"])


def pair(name: str, seed: int, out: int = 48, inner: int = 32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    down, up = torch.randn(2, inner, generator=generator), torch.randn(out, 2, generator=generator)
    return {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}


@pytest.mark.parametrize(
    ("kohya", "generic", "layer"),
    [
        ("lora_te2_", "t5xxl.transformer.", "encoder.block.0.layer.0.SelfAttention.q"),
        ("lora_te_", "qwen3_06b.transformer.model.", "layers.0.mlp.up_proj"),
        ("lora_te1_", "hydit_clip.transformer.bert.", "encoder.layer.0.attention.self.query"),
        ("lora_te_", "clip_h.transformer.", "text_model.encoder.layers.0.mlp.fc1"),
        ("lora_te2_", "clip_g.transformer.", "text_model.encoder.layers.0.mlp.fc1"),
    ],
)
def test_without_clip_two_spellings_of_a_layer_are_summed_under_one_name(kohya, generic, layer, tiny_flux):
    one, other = kohya + layer.replace(".", "_"), f"text_encoders.{generic}{layer}"
    a, b = pair(one, 1), pair(other, 2)
    loras = [flux_lora("kohya", seed=1) | a, flux_lora("generic", seed=2) | b]
    lora, _ = solve(collect(tiny_flux(), task(loras[0], "a", 0.5), task(loras[1], "b"), steps=1))
    names = {key.removesuffix(".alpha") for key in lora if key in (f"{one}.alpha", f"{other}.alpha")}
    assert len(names) == 1
    (name,) = names
    wanted = 0.5 * a[f"{one}.lora_up.weight"] @ a[f"{one}.lora_down.weight"]
    wanted = wanted + b[f"{other}.lora_up.weight"] @ b[f"{other}.lora_down.weight"]
    assert relative(lora[f"{name}.lora_B.weight"] @ lora[f"{name}.lora_A.weight"], wanted) < 1e-5
