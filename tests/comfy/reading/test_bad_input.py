"""Bad input in a real ComfyUI: an error that names file, key and remedy, before anything is sampled."""

import importlib

import pytest
import torch

from run_nodes import collect, execute, node, solve, task
from tiny_flux import conditioning, empty_latent, flux_lora

pytestmark = [pytest.mark.comfy, pytest.mark.usefixtures("pack")]

DOWN = "diffusion_model.double_blocks.0.img_attn.proj.lora_A.weight"
UP = DOWN.replace("lora_A", "lora_B")
PREFIX = DOWN.removesuffix(".lora_A.weight")


@pytest.fixture
def unsampled(tiny_flux):
    """A model that may be asked about its layers, but must not run."""
    model = tiny_flux()
    model.model.diffusion_model.forward = lambda *_, **__: pytest.fail("sampling began before the input was checked")
    return model


def damaged(**changes):
    lora = flux_lora("generic", seed=1)
    lora.update(changes)
    return {key: value for key, value in lora.items() if value is not None}


CASES = {
    "half a pair": (lambda: damaged(**{UP: None}), r"bad: .*lora_A\.weight has no other half .*lora_B\.weight"),
    "the other half": (
        lambda: damaged(**{DOWN: None}),
        r"bad: .*lora_B\.weight has no other half .*lora_A\.weight",
    ),
    "alpha of two numbers": (
        lambda: damaged(**{f"{PREFIX}.alpha": torch.ones(2)}),
        r"bad: .*img_attn\.proj\.alpha holds 2 numbers",
    ),
    "rank 0": (
        lambda: damaged(**{DOWN: torch.ones(0, 128), UP: torch.ones(128, 0)}),
        r"bad: .*img_attn\.proj.*rank is 0",
    ),
    "ranks that differ": (lambda: damaged(**{DOWN: torch.ones(3, 128)}), r"bad: .*img_attn\.proj.*differ in rank"),
    "NaN": (lambda: damaged(**{DOWN: torch.full((4, 128), torch.nan)}), r"bad: .*img_attn\.proj.*NaN"),
    "wrong width": (
        lambda: flux_lora("generic", width=256),
        r"bad: .*double_blocks\.0.*another variant",
    ),
    "another base": (
        lambda: {"lora_unet_input_blocks_1_1_proj_in.lora_up.weight": torch.ones(4, 2)},
        "bad does not fit",
    ),
    "text encoder only": (
        lambda: {f"lora_te_x.lora_{half}.weight": torch.ones(2, 2) for half in ("up", "down")},
        "bad changes only the text encoder",
    ),
    "a LoHa without a part": (
        lambda: {f"{PREFIX}.hada_{name}": torch.ones(128, 128) for name in ("w1_a", "w1_b", "w2_a")},
        r"bad has no .*img_attn\.proj\.hada_w2_b.*incomplete",
    ),
    "a LoHa of another width": (
        lambda: {f"{PREFIX}.hada_{name}": torch.ones(64, 64) for name in ("w1_a", "w1_b", "w2_a", "w2_b")},
        r"bad: .*img_attn\.proj.*another variant",
    ),
    "half a LoKr": (
        lambda: {f"{PREFIX}.lokr_w1": torch.ones(2, 2)},
        r"bad: .*img_attn\.proj.*LoKr is incomplete",
    ),
    "a LoKr of NaN": (
        lambda: {f"{PREFIX}.lokr_w1": torch.ones(2, 2), f"{PREFIX}.lokr_w2": torch.full((64, 64), torch.nan)},
        r"bad: .*img_attn\.proj.*(NaN|damaged)",
    ),
    "a DoRA whose scale does not fit": (
        lambda: {k: v for k, v in damaged(**{f"{PREFIX}.dora_scale": torch.ones(77, 1)}).items() if PREFIX in k},
        r"bad: .*img_attn\.proj.* DoRA does not fit",
    ),
    "an OFT of another width": (
        lambda: {f"{PREFIX}.oft_blocks": torch.ones(9, 8, 8)},
        r"bad: .*img_attn\.proj.* OFT does not fit",
    ),
    "a difference of another shape": (
        lambda: {f"{PREFIX}.diff": torch.ones(128, 64)},
        r"bad: .*img_attn\.proj.*full difference of shape \(128, 64\)",
    ),
    "a transposed LoRA": (
        lambda: {DOWN: torch.ones(128, 4), UP: torch.ones(4, 128)},
        r"bad: .*img_attn\.proj",
    ),
    "alpha of NaN": (lambda: damaged(**{f"{PREFIX}.alpha": torch.tensor(torch.nan)}), r"bad: .*img_attn\.proj.*NaN"),
    "alpha 0 everywhere": (
        lambda: {
            key: torch.tensor(0.0) if key.endswith("alpha") else value
            for key, value in flux_lora("kohya", alpha=1.0).items()
        },
        "bad changes nothing: all its updates are zero, or their alpha is",
    ),
    "suffixes nobody knows": (
        lambda: {f"{PREFIX}.lora_C.weight": torch.ones(2, 2)},
        "bad does not fit this model .*none of its 1 tensors matched",
    ),
    "empty": (dict, "bad holds no tensors"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_lora_that_cannot_be_merged_is_refused_by_name_before_sampling(unsampled, case):
    core = importlib.import_module("ssr_pack.ssr_core")
    make, message = CASES[case]
    with pytest.raises(core.SSRError, match=message):
        collect(unsampled, task(flux_lora("kohya"), "good"), task(make(), "bad"))


def test_no_lora_at_all_is_refused(unsampled):
    core = importlib.import_module("ssr_pack.ssr_core")
    with pytest.raises(core.LoraError, match="add some with SSR Add LoRA"):
        collect(unsampled)


def test_a_file_that_is_no_safetensors_file_is_named(unsampled, tmp_path):
    core, task = (importlib.import_module(f"ssr_pack.{name}") for name in ("ssr_core", "nodes.reading.task"))
    path = tmp_path / "cut.safetensors"
    path.write_bytes(b"\x00\x10\x00\x00\x00\x00\x00\x00{")
    with pytest.raises(core.LoraError, match=r"cut\.safetensors"):
        collect(unsampled, task.Task("cut", path, 1.0, conditioning(1)))


def test_a_lora_file_that_is_gone_is_named(pack):
    with pytest.raises(Exception, match=r"gone\.safetensors"):
        execute(node("add_lora.SSRAddLoRA"), lora_name="gone.safetensors", strength=1.0, calibration=conditioning(1))


@pytest.mark.parametrize("strengths", ["1, two", "1", "1 2 3 4", "1 nan"])
def test_strengths_that_are_not_one_number_per_lora_are_refused(tiny_flux, strengths):
    core = importlib.import_module("ssr_pack.ssr_core")
    stats = collect(tiny_flux(), task(flux_lora(seed=1), "a"), task(flux_lora(seed=2), "b"), steps=1)
    with pytest.raises(core.SSRError, match="strengths"):
        solve(stats, strengths=strengths)


def test_too_few_tokens_without_a_ridge_is_an_error_with_a_remedy(tiny_flux):
    core = importlib.import_module("ssr_pack.ssr_core")
    wide = [task(flux_lora(rank=16, seed=seed), str(seed)) for seed in (1, 2)]
    stats_module = importlib.import_module("ssr_pack.nodes.calibrating.stats")
    stats = collect(tiny_flux(), *wide, steps=1)
    settings = core.MergeSettings(ridge=core.Ridge(relative=0, scarcity=0, floor=0))
    with pytest.raises(core.SolveError, match="Raise the ridge"):
        core.merge(stats.calibration, settings)
    assert isinstance(stats, stats_module.Stats) and empty_latent()["samples"].shape[1] == 16


def test_loras_without_a_calibration_prompt_are_named_when_it_comes_to_collecting(tiny_flux):
    core = importlib.import_module("ssr_pack.ssr_core")
    bare = [
        task(flux_lora(seed=seed), name, seeds=seeds) for seed, (name, seeds) in enumerate((("a", (1,)), ("b", ())))
    ]
    with pytest.raises(core.LoraError, match="b: there is no calibration prompt; connect SSR Prompts"):
        collect(tiny_flux(), *bare, steps=1)
