"""Many model classes, merged by SSR Quick Merge with its defaults: what runs in hooks is what Load LoRA makes of it.

Some of them run layers in a way of their own: before the steps, for some tokens only, never for this latent, from a
cache, or not as a linear map. The models are ComfyUI's real classes, tiny and with random weights.
"""

import functools
import importlib
from typing import Any

import pytest
import torch
from extent import chosen
from more_models import MORE, TELLING

from run_nodes import apply, execute, hooks, load_lora, lora_folder, node, relative, solve
from tiny_clip import tiny_clip
from tiny_models import FAMILIES, GENERIC, Family, loras

pytestmark = [pytest.mark.comfy, pytest.mark.usefixtures("pack")]

ALL = {**FAMILIES, **MORE}
STEPS = 4
NAMES = ("cat", "house")

each_further = pytest.mark.parametrize("name", chosen(MORE, TELLING))  # those of the families are in test_families


@functools.cache
def model_of(name: str) -> Any:
    return ALL[name].build()


@functools.cache
def loras_of(name: str) -> list[dict[str, torch.Tensor]]:
    """Two that change every weight there is."""
    return [loras(model_of(name), GENERIC, rank=2, seed=seed, strength=0.2)[0] for seed in (1, 2)]


@pytest.fixture(scope="module", autouse=True)
def models():
    yield
    for cached in (model_of, loras_of):
        cached.cache_clear()


@pytest.fixture(scope="module")
def files(pack, tmp_path_factory):
    with lora_folder(tmp_path_factory.mktemp("loras")) as folder:
        yield folder


def reader_for(family: Family) -> Any:
    """A text encoder of ComfyUI's that says what this family's would."""
    clip = tiny_clip(torch.float32)
    clip.encode_from_tokens_scheduled = lambda tokens: family.conditioning(sum(t[0] for t in tokens["l"][0]) % 1000)
    return clip


def flat(latent: Any) -> torch.Tensor:
    """All parts of a latent, as of video and audio."""
    return torch.cat([part.flatten() for part in (latent.unbind() if latent.is_nested else [latent])])


def sample(name: str, model: Any, prompt: int = 1) -> torch.Tensor:
    """What ComfyUI's own sampling predicts in its last step, which is where it ends."""
    import comfy.sample

    cond, seen = ALL[name].conditioning(prompt), []
    latent = comfy.sample.fix_empty_latent_channels(model, ALL[name].latent()["samples"])
    noise = comfy.sample.prepare_noise(latent, 0)
    how = (STEPS, 1.0, "euler", "simple", cond, cond, latent)
    with torch.inference_mode():
        comfy.sample.sample(model, noise, *how, seed=0, callback=lambda step, x0, x, total: seen.append(x0))
    return flat(seen[-1])


def task(name: str, lora: Any, which: int) -> Any:
    values = importlib.import_module("ssr_pack.nodes.reading.task")
    return values.Task(NAMES[which], lora, 1.0, ALL[name].conditioning(1 + which))


@functools.cache
def collected(name: str) -> Any:
    """SSR_STATS with all defaults but the number of steps."""
    tasks = tuple(task(name, lora, i) for i, lora in enumerate(loras_of(name)))
    inputs = {"model": model_of(name), "tasks": tasks, "latent": ALL[name].latent(), "seed": 0, "steps": STEPS}
    return execute(node("collect_stats.SSRCollectStats"), **inputs, sampler_name="euler", scheduler="simple")[0]


def sample_hooked(name: str, lora: Any) -> torch.Tensor:
    """The latent that a calibration run ends with."""
    modules = ("calibrating.diffusion_model", "calibrating.runs", "calibrating.case_prompts", "reading.patches")
    calibrate, runs, prompts, patches = (importlib.import_module(f"ssr_pack.nodes.{module}") for module in modules)
    one, seen, model = task(name, lora, 0), [], model_of(name)
    plan = runs.plan(prompts.cases_of([one], ()), runs.Sampling(0, STEPS, "euler", "simple"), context=0, refine=0)
    with torch.inference_mode():
        calibrate.calibrate(
            *(model, [patches.read_task(one, model)], plan, ALL[name].latent(), 0),
            on_step=seen.append,
            on_run=lambda number: None,
        )
    return flat(seen[-1])


@each_further
def test_the_lora_in_hooks_is_what_load_lora_makes_of_it(name):
    model, lora = model_of(name), loras_of(name)[0]
    wanted = sample(name, load_lora(model, lora))
    assert torch.isfinite(wanted).all() and relative(sample(name, model), wanted) > 1e-3
    assert relative(sample_hooked(name, lora), wanted) < 1e-5


@each_further
def test_routing_0_is_the_plain_stack(name):
    one, other = loras_of(name)
    stack = sample(name, load_lora(load_lora(model_of(name), one), other))
    assert relative(sample(name, apply(model_of(name), solve(collected(name), routing=0.0)[0])), stack) < 1e-5


@each_further
def test_quick_merge_runs_with_its_defaults_and_leaves_the_model_as_it_was(name, files):
    from safetensors.torch import save_file

    model, before = model_of(name), sample(name, model_of(name))
    for lora, file in zip(loras_of(name), NAMES, strict=True):
        save_file(lora, files / f"{file}.safetensors")
    importlib.import_module("folder_paths").filename_list_cache.pop("loras", None)
    inputs = {"lora_stack": [(f"{file}.safetensors", 1.0, 1.0) for file in NAMES]}
    inputs |= {"prompts_1": "a cat\na cat at night", "prompts_2": "a house\na house at night", "steps": STEPS}
    quick = {"model": model, "clip": reader_for(ALL[name]), "latent": ALL[name].latent()}
    merged, _, _, report, _ = execute(node("quick_merge.SSRQuickMerge"), **quick, **inputs)
    assert hooks(model) == 0
    assert torch.equal(sample(name, model), before)
    assert relative(sample(name, merged), before) > 1e-3
    assert "Refining failed" not in report


def modules_of(calibration: Any, kind: str) -> set[str]:
    return {site.module for site in getattr(calibration, kind)}


def corrected_below(name: str, part: str) -> set[str]:
    return {module for module in modules_of(collected(name).calibration, "corrections") if part in module}


@pytest.mark.parametrize(
    ("name", "part"),
    [("Anima", "llm_adapter"), ("LTX-2", "embeddings_connector"), ("MiniMax H3", "token_refiner")],
)
def test_layers_that_run_before_the_steps_are_measured_and_not_refined(name, part):
    stats = collected(name)
    early = {site for site in stats.calibration.statistics if part in site.module}
    assert early and all(min(stats.calibration.statistics[site].tokens[:2]) for site in early)
    assert not corrected_below(name, part) and modules_of(stats.calibration, "corrections")
    assert "ran before the first step, where texts are prepared: measured, not refined." in solve(stats)[1]


@pytest.mark.parametrize("name", ["HiDream", "Hunyuan3D 2.1"])
def test_layers_of_experts_that_the_merge_sends_other_tokens_to_are_measured_and_not_refined(name):
    stats = collected(name)
    report = solve(stats)[1]
    statistics = stats.calibration.statistics.items()
    experts = {site.module for site, seen in statistics if sum(seen.tokens) and ".experts." in site.module}
    assert experts and not corrected_below(name, ".experts.")
    assert "as where each chooses its expert: measured, not refined." in report
    assert modules_of(stats.calibration, "corrections")


@pytest.mark.parametrize(("name", "part"), [("HiDream", "gate"), ("Hunyuan3D 2.1", "gate")])
def test_a_gate_that_chooses_experts_is_no_linear_layer_and_is_summed(name, part):
    one, other = loras_of(name)
    lora, _ = solve(collected(name))
    gates = [key for key in lora if part in key and key.endswith(".diff")]
    assert gates and not any(part in module for module in modules_of(collected(name).calibration, "subspaces"))
    for key in gates:
        layer = key.removesuffix(".diff")
        wanted = sum(file[f"{layer}.lora_B.weight"] @ file[f"{layer}.lora_A.weight"] for file in (one, other))
        torch.testing.assert_close(lora[key], wanted)


def test_layers_that_never_run_for_this_latent_are_the_sum_of_the_loras():
    """Those for sound of LTX-2, where only pictures are sampled."""
    name = "LTX-2, video only"
    lora, report = solve(collected(name))
    silent = [module for module in collected(name).silent if "audio" in module]
    assert silent and "and are summed." in report
    for module in silent:
        keys = [f"{module}.{end}.weight" for end in ("lora_B", "lora_A")]
        summed = sum(file[keys[0]] @ file[keys[1]] for file in loras_of(name))
        torch.testing.assert_close(lora[keys[0]] @ lora[keys[1]], summed, rtol=1e-4, atol=1e-5)


def test_a_latent_of_several_parts_can_be_looked_at_from_a_later_step_on():
    name = "LTX-2"
    tasks = tuple(task(name, lora, i) for i, lora in enumerate(loras_of(name)))
    inputs = {"model": model_of(name), "tasks": tasks, "latent": ALL[name].latent(), "seed": 0, "steps": 6}
    how = {"sampler_name": "euler", "scheduler": "simple", "start_at_step": 2}
    stats = execute(node("collect_stats.SSRCollectStats"), **inputs, **how)[0]
    assert stats.calibration.corrections and not stats.silent


def test_keys_and_values_that_a_model_remembers_are_those_of_each_lora_and_afterwards_as_before():
    name = "HiDream-O1"
    model = model_of(name)
    diffusion = model.model.diffusion_model
    diffusion.clear_kv_cache()
    fresh = grams(collect_anew(name))
    assert diffusion._kv_cache_entries == []
    sample(name, model)
    remembered = list(diffusion._kv_cache_entries)
    assert remembered  # of the base model, and of the prompt that is calibrated on, too
    before = sample(name, model)  # from what it remembers, as below: what is computed anew rounds otherwise
    again = grams(collect_anew(name))
    assert all(torch.equal(one, other) for one, other in zip(fresh, again, strict=True))
    assert all(one is other for one, other in zip(diffusion._kv_cache_entries, remembered, strict=True))
    assert torch.equal(sample(name, model), before)


def grams(stats: Any) -> list[torch.Tensor]:
    found = stats.calibration
    return [one.gram for kind in (found.statistics, found.corrections) for one in kind.values()]


def collect_anew(name: str) -> Any:
    collected.cache_clear()
    return collected(name)


def test_a_layer_that_scales_its_weight_is_not_hooked_and_works_as_load_lora_has_it():
    """Wan Animate's motion encoder, which runs where there is a face to follow."""
    name = "Wan Animate"
    lora = loras_of(name)[0]
    scaled = {key: value for key, value in lora.items() if "motion_encoder" in key}
    wanted = sample(name, load_lora(model_of(name), scaled))
    assert relative(sample(name, model_of(name)), wanted) > 1e-4
    assert relative(sample_hooked(name, lora), sample(name, load_lora(model_of(name), lora))) < 1e-5
    spaces = modules_of(collected(name).calibration, "subspaces")
    assert not any("motion_encoder" in module for module in spaces)
    assert any("motion_encoder" in key and key.endswith(".diff") for key in solve(collected(name))[0])
