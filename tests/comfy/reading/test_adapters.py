"""Adapters of every kind in a real ComfyUI: what ComfyUI's own loader makes of them is what the merge is made of."""

import importlib

import pytest
import torch

from lora_kinds import KINDS, LAYERS, lora_of
from run_nodes import apply, collect, load_lora, relative, sample, solve, task
from tiny_flux import flux_lora

pytestmark = [pytest.mark.comfy, pytest.mark.usefixtures("pack")]

ON_BASE = ("glora", "dora", "loha dora", "oft", "boft")


def read(model, lora, **options):
    patches = importlib.import_module("ssr_pack.nodes.reading.patches")
    return patches.read_task(task(lora), model, **options)


@pytest.fixture
def model(tiny_flux):
    return tiny_flux()


@pytest.mark.parametrize("kind", KINDS)
def test_stacked_without_routing_every_kind_does_what_load_lora_does(model, kind):
    loras = [lora_of(kind, seed=1), flux_lora("kohya", rank=2, seed=2)]
    lora, _ = solve(collect(model, *(task(one) for one in loras), steps=1), routing=0.0)
    expected = sample(load_lora(load_lora(model, loras[0]), loras[1]))
    assert relative(sample(load_lora(model, loras[1])), expected) > 1e-2  # this kind matters
    assert relative(sample(apply(model, lora)), expected) < 1e-5


@pytest.mark.parametrize("kind", ["lokr", "dora", "difference"])
def test_a_low_expand_rank_bounds_the_size_and_the_report_tells_what_is_kept(model, kind):
    tasks = task(lora_of(kind, seed=1), "odd"), task(flux_lora(rank=2, seed=2), "plain")
    lora, report = solve(collect(model, *tasks, steps=1, expand_rank=5))
    name = "diffusion_model.single_blocks.1.linear2.lora_A.weight"
    assert len(lora[name]) == 7
    assert "odd: 3 " in report and "of rank 5 at most, keeping" in report
    whole, _ = solve(collect(model, *tasks, steps=1))
    assert len(lora[name]) < len(whole[name])


@pytest.mark.parametrize("kind", KINDS)
def test_the_report_names_the_kind_and_says_if_it_holds_for_this_base_only(model, kind):
    account = read(model, lora_of(kind)).account
    text = "\n".join(account.lines("odd"))
    names = {"lokr factors": "LoKr", "loha dora": "DoRA", "difference": "full difference", "dora": "DoRA"}
    shown = names.get(kind) or {"loha": "LoHa", "lokr": "LoKr", "glora": "GLoRA"}.get(kind, kind.upper())
    assert f"3 {shown} layers" in text
    assert ("the merge holds for this base only" in text) == (kind in ON_BASE)


@pytest.mark.parametrize("kind", [*KINDS, "lora"])
def test_every_tensor_is_accounted_for(model, kind):
    lora = flux_lora("kohya", alpha=2.0) if kind == "lora" else lora_of(kind)
    account = read(model, lora).account
    assert account.fates.keys() == lora.keys()
    assert {fate.name for fate in account.fates.values()} == {"ROUTED" if kind == "lora" else "EXPANDED"}


def test_adapters_that_need_the_base_see_the_loras_that_are_on_it(model):
    carrying = load_lora(model, flux_lora("kohya", rank=2, seed=5))
    dora = lora_of("dora", seed=1)
    lora, _ = solve(collect(carrying, task(dora), task(flux_lora(rank=2, seed=2)), steps=1), routing=0.0)
    expected = load_lora(load_lora(carrying, dora), flux_lora(rank=2, seed=2))
    assert relative(sample(apply(carrying, lora)), sample(expected)) < 1e-5


def test_differences_of_slices_and_under_a_permutation_are_those_of_load_lora(model):
    """q of a fused qkv, and the final layer, whose scale and shift diffusers swaps."""
    odd = {
        "transformer.transformer_blocks.0.attn.to_k.diff": 0.05 * torch.randn(128, 128),
        "transformer.norm_out.linear.diff": 0.05 * torch.randn(256, 128),
    }
    odd |= {
        f"transformer.transformer_blocks.0.attn.to_v.{end}": value
        for end, value in {"lokr_w1": torch.randn(4, 4), "lokr_w2": 0.05 * torch.randn(32, 32)}.items()
    }
    lora, _ = solve(collect(model, task(odd), task(flux_lora(rank=2, seed=2)), steps=1), routing=0.0)
    expected = load_lora(load_lora(model, odd), flux_lora(rank=2, seed=2))
    assert relative(sample(apply(model, lora)), sample(expected)) < 1e-5


def test_layers_that_change_nothing_are_told_and_take_no_rank(model):
    lora = flux_lora("kohya", alpha=2.0, seed=1)
    lora["lora_unet_single_blocks_1_linear2.alpha"] = torch.tensor(0.0)
    loaded = read(model, lora)
    assert "diffusion_model.single_blocks.1.linear2" not in {site.module for site in loaded.model.updates}
    assert "3 change nothing (alpha 0 or all zero)" in "\n".join(loaded.account.lines("a"))


def test_a_weight_that_a_file_changes_in_two_ways_gets_the_one_that_comfyui_loads(model):
    module = "double_blocks.0.img_attn.proj"
    lora = flux_lora("generic", rank=2, seed=1, only=lambda name: name == module)
    lora |= flux_lora("kohya", rank=3, seed=2, only=lambda name: name == module)
    lora |= {f"diffusion_model.{module}.{end}": value for end, value in _loha().items()}
    loaded = read(model, lora)
    fates = [fate.name for fate in loaded.account.fates.values()]
    assert fates.count("OVERWRITTEN") in (len(lora) - 2, len(lora) - 4)
    assert "another tensor of the file changes the same weight, such as" in "\n".join(loaded.account.lines("a"))
    merged, _ = solve(collect(model, task(lora), task(flux_lora(rank=2, seed=4)), steps=1), routing=0.0)
    expected = load_lora(load_lora(model, lora), flux_lora(rank=2, seed=4))
    assert relative(sample(apply(model, merged)), sample(expected)) < 1e-5


def _loha():
    return {name: torch.randn(128, 2).T.T if name.endswith("a") else torch.randn(2, 128) for name in LOHA}


LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")


def test_a_file_may_mix_adapters(model):
    mixed = lora_of("lokr", seed=1)
    first = next(iter(LAYERS))
    mixed = {key: value for key, value in mixed.items() if first not in key}
    mixed |= flux_lora("kohya", rank=2, seed=3, only=lambda name: name == first)
    lora, report = solve(collect(model, task(mixed, "mixed"), task(flux_lora(rank=2, seed=2), "b"), steps=1), routing=0)
    assert "mixed, 8 tensors: 2 routed; 6 made low-rank and routed." in report
    expected = load_lora(load_lora(model, mixed), flux_lora(rank=2, seed=2))
    assert relative(sample(apply(model, lora)), sample(expected)) < 1e-5


@pytest.mark.parametrize("strength", [0.5, -1.0])
@pytest.mark.parametrize("kind", ["oft", "boft", "dora", "lokr", "glora"])
def test_a_strength_means_what_it_means_to_load_lora(model, kind, strength):
    odd = lora_of(kind, seed=1)
    tasks = task(odd, strength=strength), task(flux_lora(rank=2, seed=2))
    lora, _ = solve(collect(model, *tasks, steps=1), routing=0.0)
    expected = load_lora(load_lora(model, odd, strength), flux_lora(rank=2, seed=2))
    assert relative(sample(apply(model, lora)), sample(expected)) < 1e-5


def test_what_comfyui_does_not_read_is_told_apart_from_what_it_overwrites(model):
    lora = flux_lora("kohya", alpha=2.0, seed=1)
    name = "diffusion_model.double_blocks.0.img_mlp.0"
    lora["lora_unet_double_blocks_0_img_mlp_0.diff_b"] = torch.ones(512)
    lora[f"{name}.lora_B.bias"] = torch.ones(512)  # PEFT's lora_bias
    lora["diffusion_model.img_in.dora_scale"] = torch.ones(128, 1)  # of an adapter that is not there
    lora["diffusion_model.img_in.alpha"] = torch.tensor(1.0)
    fates = {key: fate.name for key, fate in read(model, lora).account.fates.items()}
    assert fates["lora_unet_double_blocks_0_img_mlp_0.alpha"] == "ROUTED"
    assert fates["lora_unet_double_blocks_0_img_mlp_0.diff_b"] == "SUMMED"
    assert {fates[key] for key in fates if "img_in" in key or key.endswith("lora_B.bias")} == {"UNREAD"}
    assert set(fates.values()) == {"ROUTED", "SUMMED", "UNREAD"}


def test_two_loras_that_replace_a_weight_differently_agree_once_that_layer_is_dropped(model):
    core = importlib.import_module("ssr_pack.ssr_core")
    key = "diffusion_model.double_blocks.0.img_attn.norm.query_norm.set_weight"
    loras = [flux_lora(rank=2, seed=seed) | {key: torch.full((128,), float(seed))} for seed in (1, 2)]
    stats = collect(model, *(task(lora) for lora in loras), steps=1)
    with pytest.raises(core.LoraError, match=r"Two LoRAs replace .*query_norm.* drop that layer"):
        solve(stats)
    lora, report = solve(stats, layers="drop query_norm")
    assert key not in lora and "Of what is summed, 1 layers are left out as asked" in report
    lora, _ = solve(stats, strengths="1, 0")
    assert torch.equal(lora[key], loras[0][key])
