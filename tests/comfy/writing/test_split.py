"""SSR Split in a real ComfyUI: files that add up to the merge in core's Load LoRA, each of them its LoRA by itself."""

import importlib
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from run_nodes import apply, collect, execute, load_lora, node, relative, sample, solve, task
from tiny_clip import tiny_clip
from tiny_flux import flux_lora, flux_state_dict

pytestmark = [pytest.mark.comfy, pytest.mark.usefixtures("pack")]

NAMES = ("cat", "dog", "sepia")
STRENGTHS = (1.0, 0.7, 1.2)


@pytest.fixture
def loras():
    return [
        flux_lora("kohya", rank=4, alpha=2.0, seed=1),
        flux_lora("diffusers", rank=3, seed=2),
        flux_lora("generic", rank=2, seed=3),
    ]


@pytest.fixture
def model(tiny_flux):
    return tiny_flux()


@pytest.fixture
def tasks(loras):
    named = zip(loras, NAMES, STRENGTHS, strict=True)
    return [task(lora, name, strength, (i, 10 + i)) for i, (lora, name, strength) in enumerate(named)]


def split(stats, prefix="split", dtype="float32", ridge=0.01, rank=0, strengths="", layers=""):
    """(files, LORA_MODELs, report)"""
    import folder_paths

    settings = {"dtype": dtype, "ridge": ridge, "rank": rank, "strengths": strengths, "layers": layers}
    listed, parts, report = execute(node("split.SSRSplit"), stats=stats, filename_prefix=prefix, **settings)
    return [Path(folder_paths.get_full_path_or_raise("loras", name)) for name in listed], parts, report


def loaded(model, files, strengths=(1.0, 1.0, 1.0)):
    for file, strength in zip(files, strengths, strict=False):
        model = load_lora(model, load_file(file), strength)
    return model


def test_the_files_one_after_the_other_in_load_lora_are_the_merge(model, tasks):
    stats = collect(model, *tasks)
    files, _, _ = split(stats)
    merged = sample(apply(model, solve(stats)[0]))
    assert relative(sample(loaded(model, files)), merged) < 1e-5
    assert relative(sample(model), merged) > 0.02
    assert [file.name for file in files] == [f"split_{name}_00001_.safetensors" for name in NAMES]


def test_each_file_has_its_own_slider(model, tasks):
    """With core's loaders at these strengths, as the merge solved for them."""
    stats, sliders = collect(model, *tasks, context=0), (0.5, 1.0, 0.01)
    files, _, _ = split(stats)
    turned = ", ".join(str(a * b) for a, b in zip(STRENGTHS, sliders, strict=True))
    merged = sample(apply(model, solve(stats, strengths=turned)[0]))
    assert relative(sample(loaded(model, files, sliders)), merged) < 1e-5


def test_refined_parts_cut_to_their_loras_rank_are_near_the_merge_and_uncut_they_are_it(model, tasks):
    stats = collect(model, *tasks, refine=1)
    merged = sample(apply(model, solve(stats, rank=4096)[0]))
    base = sample(model)
    cut, whole = split(stats)[0], split(stats, rank=4096)[0]
    assert relative(sample(loaded(model, whole)), merged) < 1e-5
    lost = float((sample(loaded(model, cut)) - merged).norm() / (base - merged).norm())
    assert lost < 0.2
    assert sum(f.stat().st_size for f in cut) < sum(f.stat().st_size for f in whole)


def test_a_file_alone_is_its_lora_on_its_own_prompts_and_quieter_on_those_of_others(model, loras, tasks):
    files, _, report = split(collect(model, *tasks, refine=1))
    for number, (lora, strength, file) in enumerate(zip(loras, STRENGTHS, files, strict=True)):
        alone, part = load_lora(model, lora, strength), loaded(model, [file])
        own = relative(sample(part, prompt=number) - sample(model, prompt=number), torch.zeros(1) + 1)
        assert own > 0
        wanted, base = sample(alone, prompt=number), sample(model, prompt=number)
        assert float((sample(part, prompt=number) - wanted).norm() / (base - wanted).norm()) < 0.6
        other = (number + 1) % 3
        base = sample(model, prompt=other)
        assert (sample(part, prompt=other) - base).norm() < (sample(alone, prompt=other) - base).norm()
    assert "add up to the merge" in report and "Off alone" in report


def test_each_file_says_what_it_is_part_of(model, tasks):
    files, _, _ = split(collect(model, *tasks), prefix="parts/", dtype="bfloat16")
    assert {file.parent.name for file in files} == {"parts"}
    for name, strength, file in zip(NAMES, STRENGTHS, files, strict=True):
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata()
            keys = list(opened.keys())
            assert {opened.get_tensor(key).dtype for key in keys if key.endswith("weight")} == {torch.bfloat16}
        part = json.loads(metadata["ssr.part"])
        assert (part["file"], part["strength"]) == (name, strength)
        assert [one["file"] for one in json.loads(metadata["ssr.sources"])] == list(NAMES)
        assert metadata["modelspec.merged_from"] == ", ".join(NAMES)


def test_of_trigger_words_each_file_keeps_its_own():
    of_part = importlib.import_module("ssr_pack.nodes.calibrating.metadata").of_part
    sources = [{"file": "a.safetensors", "modelspec.trigger_phrase": "anna1"}, {"file": "b.safetensors"}]
    whole = {"ssr.sources": json.dumps(sources), "modelspec.trigger_phrase": "anna1"}
    assert of_part(whole, 0)["modelspec.trigger_phrase"] == "anna1"
    assert "modelspec.trigger_phrase" not in of_part(whole, 1)


def test_parts_of_the_text_encoder_and_full_differences_are_split_too(loras):
    loras[0]["diffusion_model.final_layer.linear.diff_b"] = torch.ones(64)
    weights = flux_state_dict()
    weights["txt_in.weight"] = torch.randn(128, 64) / 8  # as wide as what the tiny CLIP says
    weights["vector_in.in_layer.weight"] = torch.randn(128, 64) / 8
    model, clip = importlib.import_module("comfy.sd").load_diffusion_model_state_dict(weights), tiny_clip(torch.float32)
    text = {
        f"text_encoders.{key}": value
        for key, value in {
            "clip_l.transformer.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight": torch.randn(2, 64),
            "clip_l.transformer.text_model.encoder.layers.0.self_attn.q_proj.lora_B.weight": torch.randn(64, 2),
        }.items()
    }
    encode = importlib.import_module("ssr_pack.nodes.calibrating.prompt").encode_lines
    values = importlib.import_module("ssr_pack.nodes.reading.task")
    tasks = [
        values.Task(name, {**lora, **(text if i else {})}, 1.0, encode(clip, [f"{name} one", f"{name} two"], "test"))
        for i, (lora, name) in enumerate(zip(loras[:2], NAMES, strict=False))
    ]
    stats = collect(model, *tasks, clip=clip, steps=1, context=0)
    _, parts, _ = split(stats)
    merged, _ = solve(stats)
    assert any(key.endswith("final_layer.linear.diff_b") for key in parts[0])
    assert not any(key.endswith("final_layer.linear.diff_b") for key in parts[1])
    assert any(key.startswith("text_encoders.") for key in parts[1])
    assert not any(key.startswith("text_encoders.") for key in parts[0])
    down, up = (
        f"text_encoders.clip_l.transformer.text_model.encoder.layers.0.self_attn.q_proj.lora_{end}.weight"
        for end in "AB"
    )
    assert relative(parts[1][up] @ parts[1][down], merged[up] @ merged[down]) < 1e-5


def test_one_lora_and_rules_that_leave_nothing_are_refused_and_nothing_is_written(model, tasks):
    import folder_paths

    core = importlib.import_module("ssr_pack.ssr_core")
    written = lambda: sorted(Path(folder_paths.get_output_directory()).rglob("refused*"))  # noqa: E731
    with pytest.raises(core.SSRError, match="cat is the only LoRA"):
        split(collect(model, tasks[0], steps=1), "refused")
    stats = collect(model, *tasks, steps=1)
    with pytest.raises(core.SSRError, match="leave out every layer of cat"):
        split(stats, "refused", layers="drop all")
    with pytest.raises(core.LoraError, match=r"SSR Split: .*float16 cannot hold"):
        split(stats, "refused", dtype="float16", strengths="1, 1, 1e12")
    assert written() == []
