"""Every model family with LoRAs in every spelling: what runs, merges and is saved here is what ComfyUI itself does.

The models are ComfyUI's real classes, tiny and with random weights (`tiny_models`).
"""

import functools
import importlib
from dataclasses import replace

import pytest
import torch

import tiny_flux
from run_nodes import apply, execute, hooks, load_lora, node, relative, solve
from tiny_models import ENDS, FAMILIES, GENERIC, SPELLINGS, known_names, loaded, loras, spelled

pytestmark = [pytest.mark.comfy, pytest.mark.usefixtures("pack")]

STEPS = 2
OTHER = {family: "diffusers" if "diffusers" in labels else "kohya" for family, labels in SPELLINGS.items()}
CASES = [(family, label) for family, labels in SPELLINGS.items() for label in labels]

each_family = pytest.mark.parametrize("family", FAMILIES)
each_spelling = pytest.mark.parametrize(("family", "label"), CASES, ids=[f"{f}-{s}" for f, s in CASES])


@functools.cache
def model_of(family):
    """One model for all tests of a family: no test changes its weights, only those of clones."""
    return FAMILIES[family].build()


@functools.cache
def files(family, label, rank=4, seed=1):
    """LoRA files that together use every name of a spelling; the first of them changes every weight that it can."""
    return loras(model_of(family), SPELLINGS[family][label], rank, seed)


def main_names(family, label):
    """What the first file of a spelling names."""
    return spelled(model_of(family), SPELLINGS[family][label])[0].values()


@functools.cache
def base(family):
    """The latent of the model without a LoRA."""
    return sample(family, model_of(family))


@pytest.fixture(scope="module", autouse=True)
def models():
    """The models go while ComfyUI is still there to let go of them."""
    yield
    for cached in (model_of, files, base):
        cached.cache_clear()


def pack_nodes(name):
    """A module of the pack's nodes."""
    return importlib.import_module(f"ssr_pack.nodes.{name}")


def task(family, lora, name="lora", prompt=1):
    return pack_nodes("reading.task").Task(name, lora, 1.0, FAMILIES[family].conditioning(prompt))


def sample(family, model, prompt=1):
    """A latent, by ComfyUI's own KSampler."""
    nodes = importlib.import_module("nodes")
    cond, latent = FAMILIES[family].conditioning(prompt), FAMILIES[family].latent()
    with torch.inference_mode():
        return nodes.common_ksampler(model, 0, STEPS, 1.0, "euler", "simple", cond, cond, latent)[0]["samples"]


def sample_hooked(family, lora, model=None):
    """The latent that a calibration run ends with, the LoRA in hooks and no weight touched."""
    calibrate, runs, case_prompts = map(
        pack_nodes, ("calibrating.diffusion_model", "calibrating.runs", "calibrating.case_prompts")
    )
    patches = pack_nodes("reading.patches")
    model = model_of(family) if model is None else model
    one, seen = task(family, lora), []
    plan = runs.plan(case_prompts.cases_of([one], ()), runs.Sampling(0, STEPS, "euler", "simple"), context=0, refine=0)
    with torch.inference_mode():
        _, silent, _ = calibrate.calibrate(
            *(model, [patches.read_task(one, model)], plan, FAMILIES[family].latent(), 0),
            on_step=seen.append,
            on_run=lambda number: None,
        )
    assert silent == ()
    # the sampler's last step ends at sigma 0, where the latent is the predicted clean one
    return model.model.process_latent_out(seen[-1])


def collected(family, *merged, context=0):
    """SSR_STATS of a short calibration."""
    tasks = tuple(task(family, lora, f"lora{index}", prompt=index) for index, lora in enumerate(merged))
    inputs = {"model": model_of(family), "tasks": tasks, "latent": FAMILIES[family].latent(), "seed": 0, "steps": 1}
    settings = {"sampler_name": "euler", "scheduler": "simple", "context": context, "refine": 0}
    return execute(node("collect_stats.SSRCollectStats"), **inputs, **settings)[0]


def saved(lora):
    """What a file that SSR Save LoRA wrote holds."""
    folder_paths, utils = importlib.import_module("folder_paths"), importlib.import_module("comfy.utils")
    inputs = {"lora": lora, "filename_prefix": "family", "dtype": "float32"}
    name = execute(node("save_lora.SSRSaveLoRA"), **inputs)[0]
    return utils.load_torch_file(folder_paths.get_full_path("loras", name), safe_load=True)


def complaints(caplog):
    """What ComfyUI says of LoRA keys that it cannot use. It says it once and goes on."""
    return [text for text in caplog.messages if any(sign in text for sign in ("not loaded", "NOT LOADED", "ERROR"))]


# --- the models and the names ---


@each_family
def test_a_family_samples_finite_latents_that_depend_on_the_prompt(family):
    one, other = (sample(family, model_of(family), prompt) for prompt in (1, 2))
    assert torch.isfinite(one).all() and one.std() > 1e-3
    assert relative(one, other) > 1e-3
    assert model_of(family).model.get_dtype() == torch.float32


@each_family
def test_no_weight_and_no_bias_of_a_family_is_zero(family):
    zero = [key for key, value in model_of(family).model.diffusion_model.state_dict().items() if not value.any()]
    assert zero == []


@each_spelling
def test_a_listed_spelling_names_weights(family, label):
    assert main_names(family, label)


@each_family
def test_every_name_that_comfyui_knows_belongs_to_a_listed_spelling(family):
    covered = {
        spelling.prefix + name
        for spelling in SPELLINGS[family].values()
        for names in spelled(model_of(family), spelling)
        for name in names
    }
    assert sorted(known_names(model_of(family)).keys() - covered) == []


@each_family
def test_the_generic_spelling_names_every_weight_there_is(family):
    modules = model_of(family).model.diffusion_model.named_modules()
    weights = {name: getattr(module, "weight", None) for name, module in modules}
    matrices = {name for name, weight in weights.items() if weight is not None and weight.ndim > 1}
    assert {target.module for target in main_names(family, "generic")} == matrices


# --- one LoRA ---


@each_spelling
def test_a_lora_in_hooks_samples_what_it_samples_in_the_weights(family, label, caplog):
    for lora in files(family, label):
        expected = sample(family, load_lora(model_of(family), lora))
        assert 1e-3 < relative(expected, base(family)) < 10
        assert relative(sample_hooked(family, lora), expected) < 1e-5
    assert complaints(caplog) == []
    assert hooks(model_of(family)) == 0


@each_spelling
def test_every_tensor_of_a_file_is_routed(family, label):
    account, patches = map(pack_nodes, ("reading.tensor_account", "reading.patches"))
    for lora in files(family, label):
        read = patches.read_task(task(family, lora), model_of(family))
        assert set(read.account.fates.values()) == {account.Fate.ROUTED}
        assert len(read.account.fates) == len(lora)
        downs = [key for key in lora if key.endswith(SPELLINGS[family][label].ends[0])]
        assert len(read.lora.updates) == len(downs) > 0


@pytest.mark.parametrize("ends", ENDS, ids=[down for down, _ in ENDS])
@pytest.mark.parametrize("alpha", [False, True], ids=["alpha = rank", "an alpha"])
def test_every_ending_that_comfyui_knows_is_read_as_comfyui_reads_it(ends, alpha):
    lora = loras(model_of("Flux"), replace(GENERIC, ends=ends, alpha=alpha))[0]
    expected = sample("Flux", load_lora(model_of("Flux"), lora))
    assert relative(expected, base("Flux")) > 1e-3
    assert relative(sample_hooked("Flux", lora), expected) < 1e-5


def test_a_uso_file_is_converted(caplog):
    """ComfyUI tells such a file by the depth of the real Flux, so this model has that depth."""
    model = loaded(tiny_flux.flux_state_dict(double_blocks=19, single_blocks=38, guidance=True))
    lora = uso_lora(128)
    expected = sample("Flux", load_lora(model, lora))
    assert relative(expected, sample("Flux", model)) > 1e-3
    assert relative(sample_hooked("Flux", lora, model), expected) < 1e-5
    assert complaints(caplog) == []


def uso_lora(width, rank=2):
    generator = torch.Generator().manual_seed(0)
    double = {"qkv_lora1": 3, "qkv_lora2": 3, "proj_lora1": 1, "proj_lora2": 1}
    layers = {f"double_blocks.{i}.processor.{name}": (rows, 1) for i in range(19) for name, rows in double.items()}
    layers |= {f"single_blocks.{i}.processor.qkv_lora": (3, 1) for i in range(38)}
    layers |= {f"single_blocks.{i}.processor.proj_lora": (1, 5) for i in range(38)}
    tensors = {}
    for name, (rows, columns) in layers.items():
        tensors[f"{name}.down.weight"] = torch.randn(rank, columns * width, generator=generator) / width**0.5
        tensors[f"{name}.up.weight"] = 0.05 * torch.randn(rows * width, rank, generator=generator)
    return tensors


# --- two LoRAs ---


@each_spelling
def test_the_saved_merge_through_load_lora_is_ssr_apply(family, label, caplog):
    stats = collected(family, files(family, label)[0], files(family, "generic", rank=2, seed=2)[0])
    assert stats.silent == ()
    lora, _ = solve(stats)
    applied = sample(family, apply(model_of(family), lora))
    assert relative(applied, base(family)) > 1e-3
    assert relative(sample(family, load_lora(model_of(family), saved(lora))), applied) < 1e-5
    assert complaints(caplog) == []
    assert hooks(model_of(family)) == 0


@each_family
def test_a_merge_without_routing_is_the_stack_of_load_lora(family):
    """Context rows are looked for as well; without routing they must not matter."""
    one, other = files(family, "generic", rank=3)[0], files(family, OTHER[family], rank=2, seed=2)[0]
    stack = sample(family, load_lora(load_lora(model_of(family), one), other))
    merged, _ = solve(collected(family, one, other, context=4), routing=0.0)
    assert relative(stack, base(family)) > 1e-3
    assert relative(sample(family, apply(model_of(family), merged)), stack) < 1e-5


def test_the_stack_is_also_one_of_fused_and_split_layers():
    fused = {family for family in FAMILIES if any(target.offset for target in main_names(family, OTHER[family]))}
    assert fused == {"Flux", "Flux2", "Chroma", "SD3", "SD3.5", "Z-Image", "Lumina2"}


@each_family
def test_a_family_samples_in_the_end_what_it_sampled_at_first(family):
    assert hooks(model_of(family)) == 0
    assert torch.equal(sample(family, model_of(family)), base(family))
