"""SSR Apply fails where Load LoRA only logs: a layer of another size, of the model or of the text encoder."""

import pytest
import torch

from run_nodes import apply, collect, execute, node, solve, task
from tiny_clip import tiny_clip
from tiny_flux import flux_lora, flux_state_dict
from tiny_models import loaded

pytestmark = [pytest.mark.comfy, pytest.mark.usefixtures("pack")]


def merged(width: int = 128, only=lambda module: True):
    loras = [flux_lora(width=width, seed=seed, only=only) for seed in (1, 2)]
    return solve(collect(loaded(flux_state_dict(width)), *map(task, loras), steps=1))[0]


def factors(module: str, out: int, inner: int) -> dict[str, torch.Tensor]:
    return {f"{module}.lora_A.weight": torch.randn(2, inner), f"{module}.lora_B.weight": torch.randn(out, 2)}


def test_a_merge_for_a_model_of_another_width_is_refused(pack_module):
    lora = merged()
    with pytest.raises(pack_module("ssr_core").ModelMismatchError, match=r"16 of its 16 layers are of another size"):
        apply(loaded(flux_state_dict(256)), lora)


def test_one_layer_of_another_size_is_refused_by_name(pack_module):
    """`img_in` of a merge for Flux on a base that takes more channels, as Fill does."""
    weights = flux_state_dict()
    lora = merged() | factors("diffusion_model.img_in", 128, 64)
    assert apply(loaded(weights), lora)
    weights["img_in.weight"] = torch.randn(128, 384)
    said = r"1 of its 17 layers are of another size .* diffusion_model\.img_in\.weight: .* 64 inputs, .* 128 and 384"
    with pytest.raises(pack_module("ssr_core").ModelMismatchError, match=said):
        apply(loaded(weights), lora)


def test_a_slice_and_a_difference_of_another_size_are_refused(pack_module):
    model, core = loaded(flux_state_dict()), pack_module("ssr_core")
    split = factors("transformer.transformer_blocks.0.attn.to_q", 64, 128)
    norm = {"diffusion_model.single_blocks.0.norm.query_norm.diff": torch.ones(64)}
    for wrong in (split, norm):
        with pytest.raises(core.ModelMismatchError, match=r"1 of its 17 layers are of another size"):
            apply(model, merged() | wrong)


def test_a_layer_of_the_text_encoder_of_another_size_is_refused(pack_module):
    name = "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1"
    model, clip = loaded(flux_state_dict()), tiny_clip(torch.float32)
    for inner, fits in ((64, True), (768, False)):
        given = {"model": model, "clip": clip, "lora": merged() | factors(name, 128, inner), "strength": 1.0}
        if fits:
            assert execute(node("apply.SSRApply"), **given)
            continue
        with pytest.raises(pack_module("ssr_core").ModelMismatchError, match=r"mlp\.fc1\.weight: .* 768 inputs"):
            execute(node("apply.SSRApply"), **given)
