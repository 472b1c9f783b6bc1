"""A LoRA at strength 0 is as if it were not there: in the chain, in a stack, in SSR Quick Merge and in SSR Solve."""

import importlib

import pytest
import torch

from run_nodes import collect, execute, lora_folder, node, solve, task
from tiny_clip import tiny_clip
from tiny_flux import empty_latent, flux_for_tiny_clip, flux_lora

pytestmark = [pytest.mark.comfy, pytest.mark.usefixtures("pack")]

SAID = "Left out, as if not there, being at strength 0: "
TEXT = "lora_te1_text_model_encoder_layers_0_mlp_fc1"


def text_pair(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    factors = torch.randn(128, 2, generator=generator), torch.randn(2, 64, generator=generator)
    return {f"{TEXT}.lora_{end}.weight": value for end, value in zip(("up", "down"), factors, strict=True)}


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in other)


def three(strengths=(1.0, 1.0, 1.0)) -> list:
    loras = [flux_lora(spelling, seed=seed) for seed, spelling in enumerate(("kohya", "generic", "diffusers"), 1)]
    return [
        task(lora, name, s, (i + 1,)) for i, (lora, name, s) in enumerate(zip(loras, "abc", strengths, strict=True))
    ]


def both(which: str, seed: int = 7):
    values = importlib.import_module("ssr_pack.nodes.reading.combination")
    from tiny_flux import conditioning

    return values.Combination(which, conditioning(seed))


@pytest.mark.parametrize("strength", [0.0, 5e-17, 0.3 - 3 * 0.1])
def test_what_is_off_is_neither_sampled_nor_in_the_merge(strength, tiny_flux):
    model = tiny_flux()
    one, off, other = three((1.0, strength, 0.8))
    off = off.__class__(off.name, off.lora, off.strength, [])  # no prompt is asked for
    wanted, _ = solve(collect(model, one, other, steps=3, refine=1))
    found, report = solve(collect(model, one, off, other, steps=3, refine=1))
    assert same(found, wanted)
    assert SAID + "b." in report


def test_combinations_keep_their_meaning_where_a_lora_before_them_is_off(tiny_flux):
    model = tiny_flux()
    one, off, other = three((1.0, 0.0, 1.0))
    wanted = collect(model, one, other, both("1, 2"), both("none", 8), steps=2)
    found = collect(model, one, off, other, both("1, c"), both("none", 8), both("2+3"), steps=2)
    assert found.calibration.cases == wanted.calibration.cases
    assert same(solve(found)[0], solve(wanted)[0])
    assert "Nor were the combinations sampled that ask for them: 2+3." in solve(found)[1]


def test_a_strength_of_0_in_ssr_solve_leaves_the_lora_out_of_what_was_measured(tiny_flux):
    model = tiny_flux()
    stats = collect(model, *three(), both("2, 3"), steps=3, refine=1)
    found, report = solve(stats, strengths="1, 0, 1")
    core = importlib.import_module("ssr_pack.ssr_core")
    assert same(found, core.to_state_dict(core.merge(stats.calibration.without(1)).updates, ""))
    assert SAID + "b." in report
    assert '"strength": 0.0' in found.metadata["ssr.sources"] and found.metadata["modelspec.merged_from"] == "a, c"


def test_all_at_0_is_an_error_before_anything_is_sampled_and_in_ssr_solve(tiny_flux):
    core, model, calls = importlib.import_module("ssr_pack.ssr_core"), tiny_flux(), []
    handle = model.model.diffusion_model.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(core.LoraError, match=r"Every LoRA is at strength 0 \(a, b, c\)"):
        collect(model, *three((0.0, 0.0, 1e-9)), steps=2)
    assert not calls
    stats = collect(model, *three(), steps=2)
    handle.remove()
    with pytest.raises(core.SSRError, match=r"All LoRAs are at strength 0 \(a, b, c\)"):
        solve(stats, strengths="0, 0, 5e-17")


# --- the text encoder's strength, stacks and SSR Quick Merge ---


@pytest.fixture(scope="module")
def files(pack, tmp_path_factory):
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("loras")
    for seed, name in enumerate(("l1", "l2"), 1):
        save_file(flux_lora("kohya", seed=seed), folder / f"bare_{name}.safetensors")
        save_file(flux_lora("kohya", seed=seed) | text_pair(seed), folder / f"{name}.safetensors")
    with lora_folder(folder):
        yield folder


@pytest.fixture(scope="module")
def model(pack):
    return importlib.import_module("comfy.sd").load_diffusion_model_state_dict(flux_for_tiny_clip())


@pytest.fixture(scope="module")
def clip(pack):
    return tiny_clip(torch.float32)


def quick(model, clip, stack, **prompts):
    given = {"model": model, "clip": clip, "latent": empty_latent(), "steps": 3, "lora_stack": stack}
    return execute(node("quick_merge.SSRQuickMerge"), **given, **prompts)


def test_quick_merge_asks_for_no_prompt_of_a_lora_that_is_off(model, clip, files):
    alone = quick(model, clip, [("l1.safetensors", 1, 1)], prompts_1="a cat\na dog")
    found = quick(model, clip, [("l1.safetensors", 1, 1), ("l2.safetensors", 0, 0)], prompts_1="a cat\na dog")
    assert same(found[2], alone[2])
    assert SAID + "l2." in found[3]


def test_a_clip_strength_of_0_is_as_if_the_file_had_no_part_for_the_text_encoder(model, clip, files):
    prompts = {"prompts_1": "a cat\na dog", "prompts_2": "a house\na hut"}
    found = quick(model, clip, [("l1.safetensors", 1, 1), ("l2.safetensors", 1, 0)], **prompts)
    wanted = quick(model, clip, [("l1.safetensors", 1, 1), ("bare_l2.safetensors", 1, 1)], **prompts)
    assert same(found[2], wanted[2])
    assert "2 left out, being at strength 0" in found[3]


def test_a_strength_of_0_with_the_text_encoder_on_is_as_if_the_file_had_no_part_for_the_model(model, clip, files):
    prompts = {"prompts_1": "a cat\na dog", "prompts_2": "a house\na hut"}
    found = quick(model, clip, [("l1.safetensors", 1, 1), ("l2.safetensors", 0, 1)], **prompts)[2]
    one = quick(model, clip, [("l1.safetensors", 1, 1)], prompts_1="a cat\na dog")[2]
    ranks = [lora["diffusion_model.single_blocks.0.linear1.lora_A.weight"].shape[0] for lora in (found, one)]
    assert ranks[0] == ranks[1]
    assert any(key.startswith("text_encoders.") for key in found)


def test_a_stack_needs_no_prompts_for_what_is_off(clip, files):
    stack = [("l1.safetensors", 1.0, 1.0), ("l2.safetensors", 0.0, 0.0)]
    for prompts in ("a cat", "a cat\n\na house"):
        given = {"lora_stack": stack, "clip": clip, "prompts": prompts}
        tasks = execute(node("add_lora_stack.SSRAddLoRAStack"), **given)[0]
        assert [task.name for task in tasks] == ["l1", "l2"] and tasks[0].conditioning
