"""What does not fit is named by its true cause, with a remedy; what can mean one thing only is read; misfits go."""

import json
import logging

import pytest
import torch

from run_nodes import collect, execute, load_lora, node, relative, sample, solve, task
from tiny_flux import conditioning, diffusers_linears, flux_linears, flux_lora, flux_state_dict

pytestmark = [pytest.mark.comfy, pytest.mark.usefixtures("pack")]

LAYER = "double_blocks.0.img_attn.proj"


def pairs(prefix: str, names=None, ends=("lora_A.weight", "lora_B.weight")) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    found = {}
    for name, (out, inner) in (names or diffusers_linears(128)).items():
        found[f"{prefix}{name}.{ends[0]}"] = torch.randn(4, inner, generator=generator) / inner**0.5
        found[f"{prefix}{name}.{ends[1]}"] = 0.15 * torch.randn(out, 4, generator=generator)
    return found


CAUSES = {
    "a Flux control LoRA": (
        lambda: flux_lora() | {f"diffusion_model.{LAYER}.reshape_weight": torch.tensor([128, 256])},
        r"img_attn\.proj.* reshapes the weight of the base; such a LoRA cannot be merged",
    ),
    "kohya's OFT": (
        lambda: {f"oft_unet_{LAYER.replace('.', '_')}.oft_blocks": torch.zeros(4, 8, 8)},
        r"an OFT in the spelling of kohya's .* Load LoRA does not read either",
    ),
    "an older OFT of LyCORIS": (
        lambda: {f"lycoris_{LAYER.replace('.', '_')}.oft_diag": torch.zeros(4, 8, 8)},
        r"an OFT in the spelling of kohya's",
    ),
    "PEFT's OFT": (
        lambda: {f"base_model.model.{LAYER}.oft_R.weight": torch.zeros(4, 28)},
        r"an OFT in the spelling of kohya's or PEFT's",
    ),
    "IA3": (lambda: {f"lycoris_{LAYER.replace('.', '_')}.on_input": torch.ones(1)}, "It is an IA3"),
    "PEFT's IA3": (lambda: {f"base_model.model.{LAYER}.ia3_l": torch.ones(1, 128)}, "It is an IA3"),
    "XLabs' spelling": (
        lambda: pairs("", {"double_blocks.0.processor.qkv_lora1": (384, 128)}, ("down.weight", "up.weight")),
        r"XLabs' spelling.* diffusers does: .* save_lora_weights",
    ),
    "a checkpoint": (
        lambda: {f"model.diffusion_model.{key}": value for key, value in flux_state_dict().items()},
        r"It is a checkpoint.*Load Checkpoint",
    ),
    "a diffusion model": (flux_state_dict, r"None of them is called like a part of a LoRA.* is it a checkpoint"),
    "an embedding": (lambda: {"clip_l": torch.ones(2, 768), "clip_g": torch.ones(2, 1280)}, r"It is an embedding"),
    "an older embedding": (lambda: {"emb_params": torch.ones(2, 768)}, r"embedding .* models/embeddings"),
    "another base": (
        lambda: {f"lora_unet_input_blocks_1_1_proj_in.lora_{end}.weight": torch.ones(4, 4) for end in ("up", "down")},
        "Was it trained for another base",
    ),
}


@pytest.mark.parametrize("kind", CAUSES)
def test_what_cannot_be_merged_is_called_what_it_is(kind, tiny_flux, pack_module):
    make, said = CAUSES[kind]
    model = tiny_flux()
    model.model.diffusion_model.forward = lambda *_, **__: pytest.fail("sampling began before the input was checked")
    with pytest.raises(pack_module("ssr_core").SSRError, match=rf"^bad.*{said}"):
        collect(model, task(flux_lora("kohya"), "good"), task(make(), "bad"))


def test_prompts_that_are_not_active_in_the_steps_are_called_so(tiny_flux, pack_module):
    good, late = task(flux_lora(seed=1), "good"), task(flux_lora(seed=2), "late")
    late.conditioning[0][1].update(start_percent=0.9)
    with pytest.raises(pack_module("ssr_core").StatisticsError, match=r"^late: .* active only from 90 % to 100 %"):
        collect(tiny_flux(), good, late, steps=2)


# --- spellings ---

SPELLED = {
    "PEFT, before diffusers' names": lambda: pairs("base_model.model."),
    "PEFT's names of adapters": lambda: pairs(
        "transformer.", ends=("lora_A.default_0.weight", "lora_B.default_0.weight")
    ),
    "PEFT's prefix and a name": lambda: pairs("base_model.model.", ends=("lora_A.anna.weight", "lora_B.anna.weight")),
    "OneTrainer's prefix before kohya's names": lambda: pairs(
        "lora_transformer_",
        {name.replace(".", "_"): shape for name, shape in flux_linears().items() if "blocks" in name},
        ("lora_down.weight", "lora_up.weight"),
    ),
    "ComfyUI's names without a prefix": lambda: pairs(
        "", {name: shape for name, shape in flux_linears().items() if "blocks" in name}
    ),
}


@pytest.mark.parametrize("kind", SPELLED)
def test_a_spelling_that_can_mean_one_thing_only_is_read(kind, tiny_flux):
    model, lora = tiny_flux(), SPELLED[kind]()
    known = {
        "OneTrainer's prefix before kohya's names": lambda: {
            k.replace("lora_transformer_", "lora_unet_"): v for k, v in lora.items()
        },
        "ComfyUI's names without a prefix": lambda: {f"diffusion_model.{k}": v for k, v in lora.items()},
    }.get(kind, lambda: pairs("transformer."))()
    merged, report = solve(collect(model, task(lora, "odd"), steps=1))
    wanted = sample(load_lora(model, known))
    assert relative(sample(model), wanted) > 1e-3
    assert relative(sample(load_lora(model, merged)), wanted) < 1e-5
    assert "odd: read with " in report or kind == "ComfyUI's names without a prefix"


def test_two_names_of_adapters_are_not_read_as_one(tiny_flux, pack_module):
    ends = [(f"lora_A.{name}.weight", f"lora_B.{name}.weight") for name in ("anna", "style")]
    lora = pairs("transformer.", ends=ends[0]) | pairs("transformer.", ends=ends[1])
    with pytest.raises(pack_module("ssr_core").SSRError, match="bad"):
        collect(tiny_flux(), task(lora, "bad"))


# --- a part that misfits ---


def one_misfit(kind: str) -> dict[str, torch.Tensor]:
    lora = flux_lora("generic", seed=1)
    if kind == "a LoRA":
        return lora | pairs("diffusion_model.", {"img_in": (128, 100)})
    if kind == "a difference":
        return lora | {"diffusion_model.img_in.diff": torch.ones(128, 100)}
    if kind == "a norm":
        return lora | {"diffusion_model.single_blocks.0.norm.query_norm.diff": torch.ones(64)}
    return lora | {f"diffusion_model.{LAYER}.dora_scale": torch.ones(77, 1)}


@pytest.mark.parametrize("kind", ["a LoRA", "a difference", "a norm", "a DoRA"])
def test_one_layer_of_another_size_is_left_out_as_load_lora_does_and_told_before_sampling(kind, tiny_flux, caplog):
    model, lora = tiny_flux(), one_misfit(kind)
    wanted = sample(load_lora(model, lora))
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        merged, report = solve(collect(model, task(lora, "odd"), steps=1))
    assert "of another size than this model's weights, such as" in report
    assert any("odd: " in text and "of another size" in text for text in caplog.messages)
    assert relative(sample(load_lora(model, merged)), wanted) < 1e-5


def test_where_most_of_it_misfits_a_lora_is_refused(tiny_flux, pack_module):
    lora = flux_lora(width=256) | pairs("diffusion_model.", {"txt_in": (128, 32)})
    with pytest.raises(pack_module("ssr_core").ModelMismatchError, match=r"^odd: .* another variant"):
        collect(tiny_flux(), task(lora, "odd"))


def test_layers_that_are_dropped_when_collecting_are_neither_read_nor_measured(tiny_flux, pack_module):
    model, core = tiny_flux(), pack_module("ssr_core")
    odd = flux_lora(width=256, seed=2) | pairs("diffusion_model.", {"txt_in": (128, 32)})
    good = flux_lora(seed=1) | pairs("diffusion_model.", {"txt_in": (128, 32)})
    stats = collect(model, task(odd, "odd"), task(good, "good"), steps=2, refine=0, layers="drop all\nkeep txt_in")
    assert {site.module for site in stats.calibration.subspaces} == {"diffusion_model.txt_in"}
    assert "left out as asked" in solve(stats)[1]
    assert stats.collections[0].as_json()["layers"].startswith("drop all")
    for layers, said in (("drop nowhere", "No layer of these LoRAs matches"), ("stack txt_in", "a rule for SSR Solve")):
        with pytest.raises(core.SSRError, match=said):
            collect(model, task(good, "good"), steps=1, layers=layers)


def test_statistics_with_dropped_layers_are_read_with_the_same_layers_dropped(tiny_flux, tmp_path, pack_module):
    model, files = tiny_flux(), pack_module("nodes.writing.stats_file")
    tasks = [task(flux_lora(seed=seed), name) for seed, name in ((1, "a"), (2, "b"))]
    stats = collect(model, *tasks, steps=2, layers="drop modulation")
    files.save(stats, tmp_path / "stats.safetensors", prompts=True)
    again = files.load(tmp_path / "stats.safetensors", model, tasks)
    one, other = solve(stats)[0], solve(again)[0]
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


# --- what is told before sampling ---


def test_what_an_adapter_loses_as_a_lora_is_told_before_sampling(tiny_flux, caplog):
    generator = torch.Generator().manual_seed(0)
    full = {f"w{i}": torch.randn(n, n, generator=generator) for i, n in ((1, 8), (2, 16))}
    lora = flux_lora() | {f"diffusion_model.single_blocks.0.modulation.lin.lokr_{k}": v for k, v in full.items()}
    lora = {k: v for k, v in lora.items() if "modulation" not in k or "single_blocks.0" not in k or "lokr" in k}
    lora |= {f"diffusion_model.{LAYER}.lokr_{k}": v for k, v in full.items()}
    lora = {k: v for k, v in lora.items() if LAYER not in k or "lokr" in k}
    lora.pop("diffusion_model.single_blocks.0.modulation.lin.lokr_w1")
    lora.pop("diffusion_model.single_blocks.0.modulation.lin.lokr_w2")
    model = tiny_flux()
    model.model.diffusion_model.forward = lambda *_, **__: pytest.fail("not before it is told")
    with caplog.at_level(logging.WARNING), pytest.raises(BaseException, match="not before"):
        collect(model, task(lora, "kron"), task(flux_lora(seed=2), "b"), expand_rank=8)
    assert any("kron: 1 LoKr layers became low-rank, of rank 8" in text and "% of" in text for text in caplog.messages)


def test_an_alpha_that_is_kept_beside_the_tensors_is_told(tiny_flux, tmp_path, pack_module):
    from safetensors.torch import save_file

    lora = pairs("transformer.")
    config = {"transformer.r": 4, "transformer.lora_alpha": 16}
    save_file(lora, tmp_path / "scaled.safetensors", {"lora_adapter_metadata": json.dumps(config)})
    values = pack_module("nodes.reading.task")
    given = values.Task("scaled", tmp_path / "scaled.safetensors", 1.0, conditioning(1))
    _, report = solve(collect(tiny_flux(), given, steps=1))
    assert "its alpha of 16 for rank 4 is kept beside the tensors" in report and "and 4 is what diffusers" in report
    core = pack_module("ssr_core").load_lora(tmp_path / "scaled.safetensors")
    read = pack_module("nodes.reading.patches").read_task(given, tiny_flux())
    assert core.updates and read.account.notes


def test_a_factor_without_axes_is_refused_by_name(tiny_flux, tmp_path, pack_module):
    from safetensors.torch import save_file

    lora = {f"diffusion_model.{LAYER}.lora_{half}.weight": torch.tensor(1.0) for half in "AB"}
    save_file(lora, tmp_path / "flat.safetensors")
    given = pack_module("nodes.reading.task").Task("flat", tmp_path / "flat.safetensors", 1.0, conditioning(1))
    with pytest.raises(pack_module("ssr_core").SSRError, match=r"^flat"):
        collect(tiny_flux(), given, steps=1)


def test_what_needs_the_text_encoder_is_refused_before_anything_is_expanded(tiny_flux, pack_module, monkeypatch):
    adapters = pack_module("nodes.reading.adapters")
    monkeypatch.setattr(adapters, "nearest", lambda *_: pytest.fail("expanded before it was refused"))
    key, full = "lora_te1_text_model_encoder_layers_0_mlp_fc1", f"diffusion_model.{LAYER}.diff"
    dora = {f"{key}.lora_down.weight": torch.ones(2, 64), f"{key}.lora_up.weight": torch.ones(64, 2)}
    dora |= {f"{key}.dora_scale": torch.ones(64, 1)}
    first, second = flux_lora(seed=1) | {full: torch.randn(128, 128)}, flux_lora(seed=2) | dora
    first = {k: v for k, v in first.items() if LAYER not in k or k == full}
    with pytest.raises(pack_module("ssr_core").LoraError, match="connect clip"):
        collect(tiny_flux(), task(first, "a"), task(second, "b"))


@pytest.mark.parametrize("scale", [1e-6, 1e-7])
def test_float16_keeps_what_factors_of_unlike_size_stand_for(scale, tiny_flux):
    import folder_paths
    from comfy.utils import load_torch_file

    name, lora = f"diffusion_model.{LAYER}", flux_lora(only=lambda module: module == LAYER)
    down, up = (f"{name}.lora_{half}.weight" for half in "AB")
    lora |= {down: lora[down] * scale, up: lora[up] / scale * 1e-2}
    merged, _ = solve(collect(tiny_flux(), task(lora), steps=1))
    inputs = {"lora": merged, "filename_prefix": "half", "dtype": "float16"}
    saved = load_torch_file(folder_paths.get_full_path("loras", execute(node("save_lora.SSRSaveLoRA"), **inputs)[0]))
    assert relative(saved[up].float() @ saved[down].float(), lora[up] @ lora[down]) < 1e-3
