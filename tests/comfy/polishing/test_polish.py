"""SSR Polish in a real ComfyUI: a merge comes nearer to its LoRAs, on every family, and all else stays as it was."""

import importlib
import json
from dataclasses import replace

import pytest
import torch
from extent import chosen

from run_nodes import apply, collect, execute, hooks, load_lora, node, relative, sample, solve, task
from tiny_flux import conditioning, flux_lora, flux_state_dict
from tiny_models import FAMILIES, SPELLINGS, loaded, loras

TELLING = ("Flux2", "SDXL", "Wan2.1")  # families that are written in ways of their own

pytestmark = [pytest.mark.comfy, pytest.mark.usefixtures("pack")]


def polish(model, stats, lora, steps=12, seed=0, **more):
    """(LORA_MODEL, report, chart)"""
    return execute(
        node("polish.SSRPolish"), model=model, stats=stats, lora=lora, steps=steps, seed=seed, **{"batch": 4, **more}
    )


@pytest.fixture(scope="module")
def model(pack):
    return loaded(flux_state_dict())


@pytest.fixture(scope="module")
def two():
    return [flux_lora("kohya", rank=3, seed=seed) for seed in (1, 2)]


@pytest.fixture(scope="module")
def stats(model, two):
    tasks = [
        task(lora, name, strength, (seed, seed + 10))
        for lora, name, strength, seed in zip(two, ("cat", "house"), (1.0, 0.7), (1, 2), strict=True)
    ]
    return collect(model, *tasks, steps=3)


@pytest.fixture(scope="module")
def merged(stats):
    return solve(stats, rank=3)[0]


@pytest.fixture(scope="module")
def polished(model, stats, merged):
    return polish(model, stats, merged)


def test_the_merge_comes_nearer_to_each_lora(model, two, merged, polished):
    """On pictures from other noise than it learnt on, as ComfyUI's own nodes make them."""
    before, after = [], []
    for prompt, lora, strength in ((1, two[0], 1.0), (2, two[1], 0.7)):
        expected = sample(load_lora(model, lora, strength), prompt=prompt)
        before.append(relative(sample(apply(model, merged), prompt=prompt), expected))
        after.append(relative(sample(apply(model, polished[0]), prompt=prompt), expected))
    assert all(late < early for early, late in zip(before, after, strict=True))


def test_where_a_lora_has_few_prompts_the_report_says_what_that_means(model, two, polished):
    assert "Few prompts: cat, house." in polished[1]
    tasks = [task(lora, f"lora {seed}", 1.0, range(seed, seed + 4)) for seed, lora in enumerate(two)]
    stats = collect(model, *tasks, steps=1)
    assert "Few prompts" not in polish(model, stats, solve(stats)[0], steps=1, batch=1)[1]


def test_it_is_no_larger_and_knows_what_was_done(merged, polished):
    lora, report, chart = polished
    assert {key: value.shape for key, value in lora.items()} == {key: value.shape for key, value in merged.items()}
    known = json.loads(lora.metadata["ssr.polish"])
    assert known["steps"] == 12 and known["error"][1] < known["error"][0]
    assert lora.metadata["ssr.sources"] == merged.metadata["ssr.sources"]
    assert f"{known['error'][0]:.3f} -> {known['error'][1]:.3f}" in report
    assert "cat" in report and "house" in report
    assert chart.ndim == 4 and chart.shape[-1] == 3


def test_the_model_is_as_before(model, polished):
    import comfy.model_management

    assert hooks(model) == 0 and not comfy.model_management.in_training
    assert not any("forward" in vars(module) for module in model.model.modules())
    torch.testing.assert_close(sample(model), sample(loaded(flux_state_dict())))


def test_the_same_seed_gives_the_same(model, stats, merged, polished):
    again = polish(model, stats, merged)[0]
    assert all(torch.equal(again[key], polished[0][key]) for key in again)
    other = polish(model, stats, merged, seed=1)[0]
    assert any(not torch.equal(other[key], again[key]) for key in again)


@pytest.mark.parametrize("family", chosen(FAMILIES, TELLING))
def test_every_family(family, monkeypatch):
    """The error does not rise, and computing blocks again gives what keeping all of them gives."""
    frozen, points = (
        importlib.import_module(f"ssr_pack.{name}")
        for name in ("ssr_core.distillation.frozen", "nodes.polishing.points")
    )
    monkeypatch.setattr(points, "FEWEST", 8)
    kind = FAMILIES[family]
    model = kind.build()
    label = "diffusers" if "diffusers" in SPELLINGS[family] else "kohya"
    files = [loras(model, SPELLINGS[family][label], 2, seed)[0] for seed in (1, 2)]
    tasks = [
        replace(task(file, f"lora {seed}", 0.5), conditioning=kind.conditioning(seed))
        for seed, file in enumerate(files, 1)
    ]
    stats = collect(model, *tasks, steps=1, latent=kind.latent())
    lora, report, _ = polish(model, stats, solve(stats)[0], steps=8, batch=3)
    before, after = json.loads(lora.metadata["ssr.polish"])["error"]
    assert after <= before, report
    assert hooks(model) == 0
    monkeypatch.setattr(frozen, "blocks_of", lambda model: [])
    plain = polish(model, stats, solve(stats)[0], steps=8, batch=3)[0]
    assert all(relative(lora[key], plain[key]) < 1e-3 for key in plain)


def test_bad_input(model, stats, merged, two, tmp_path):
    values = importlib.import_module("ssr_pack.nodes.writing.stats_file")
    path = tmp_path / "stats.safetensors"
    values.save(stats, path, True)
    tasks = [task(lora, name, strength) for lora, name, strength in zip(two, ("cat", "house"), (1.0, 0.7), strict=True)]
    with pytest.raises(ValueError, match=r"from a file.*SSR Collect Stats"):
        polish(model, values.load(path, model, tasks), merged)
    with pytest.raises(ValueError, match="from SSR Solve"):
        polish(model, stats, dict(merged))
    others = collect(model, task(two[0], "cat"), task(flux_lora("kohya", rank=2, seed=5), "dog"), steps=1)
    with pytest.raises(ValueError, match="is of cat, dog, and the statistics are of cat, house"):
        polish(model, stats, solve(others)[0])
    with pytest.raises(ValueError, match="SSR Polish: this model has the merge on it already"):
        polish(apply(model, merged), stats, merged)
    with pytest.raises(ValueError, match="Flux2"):
        polish(FAMILIES["Flux2"].build(), stats, merged)
    with pytest.raises(ValueError, match="model_before"):
        polish(model, stats, merged, model_before=model)


def test_an_interrupt_keeps_nothing_and_says_what_to_do(model, stats, merged, monkeypatch):
    management = importlib.import_module("comfy.model_management")
    told = []

    def interrupted():
        if any(text.startswith("Step 4 ") for text in told):
            raise management.InterruptProcessingException()

    for module in ("polish", "schema.sockets"):
        monkeypatch.setattr(f"ssr_pack.nodes.{module}.say", lambda cls, text: told.append(text))
    monkeypatch.setattr(management, "throw_exception_if_processing_interrupted", interrupted)
    with pytest.raises(management.InterruptProcessingException):
        polish(model, stats, merged)
    assert "Stopped at step 4" in told[-1] and "steps at 4" in told[-1]
    assert hooks(model) == 0 and not management.in_training
    assert not any("forward" in vars(module) for module in model.model.modules())


def test_other_strengths_than_those_of_the_calibration(model, two, stats):
    lora, report, _ = polish(model, stats, solve(stats, strengths="0.5, 1")[0])
    before, after = json.loads(lora.metadata["ssr.polish"])["error"]
    assert after < before, report


def test_a_combination_and_silence_are_cases_like_any_other(model, two):
    combination = importlib.import_module("ssr_pack.nodes.reading.combination").Combination
    tasks = [task(lora, name, 1.0, (seed,)) for lora, name, seed in zip(two, ("cat", "house"), (1, 2), strict=True)]
    both, none = combination("1, 2", conditioning(3)), combination("none", conditioning(4))
    stats = collect(model, *tasks, both, none, steps=2)
    report = polish(model, stats, solve(stats)[0], steps=4)[1]
    assert all(f"\n{label} " in report for label in ("cat", "house", "cat + house", "silence"))


def test_statistics_that_were_added_are_polished_on_the_prompts_of_both(model, two):
    tasks = [task(lora, name, 1.0, (seed,)) for lora, name, seed in zip(two, ("cat", "house"), (1, 2), strict=True)]
    first = collect(model, *tasks, steps=2)
    second = collect(model, *(replace(one, conditioning=conditioning(7)) for one in tasks[::-1]), steps=3, like=first)
    added = execute(node("add_stats.SSRAddStats"), stats_a=first, stats_b=second)[0]
    report = polish(model, added, solve(added)[0], steps=2)[1]
    # 32 at least of each run: at two steps, which show little, four times at eight; at three eleven times
    assert f"{2 * 32 + 2 * 33} points to learn from" in report


def test_parts_that_are_not_routed_stay(model):
    """A bias, which is summed: active while the merge learns, and in the file as it was."""
    files = [flux_lora("kohya", rank=2, seed=seed) for seed in (1, 2)]
    files[0] |= {"diffusion_model.img_in.diff_b": 0.1 * torch.randn(128)}
    stats = collect(model, *(task(file, name) for file, name in zip(files, ("cat", "house"), strict=True)), steps=2)
    merged = solve(stats)[0]
    polished = polish(model, stats, merged, steps=3)[0]
    assert torch.equal(polished["diffusion_model.img_in.diff_b"], merged["diffusion_model.img_in.diff_b"])
    torch.testing.assert_close(sample(model), sample(loaded(flux_state_dict())))


def test_layers_that_were_dropped_stay_away(model, stats):
    lora = polish(model, stats, solve(stats, layers="drop attention")[0], steps=3)[0]
    assert lora and not any("attn" in key for key in lora)
