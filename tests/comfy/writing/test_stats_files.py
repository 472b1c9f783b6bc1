"""SSR Save, Load and Add Stats in a real ComfyUI: what was measured is kept, and only for the LoRAs it belongs to."""

import importlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from lora_kinds import lora_of
from run_nodes import apply, collect, execute, node, relative, sample, solve, task
from tiny_clip import tiny_clip
from tiny_flux import flux_lora

pytestmark = [pytest.mark.comfy, pytest.mark.usefixtures("pack")]

CAT, DOG = flux_lora("kohya", rank=4, alpha=2.0, seed=1), flux_lora("diffusers", rank=3, seed=2)


def tasks(*seeds: int, strengths=(1.0, 1.0)):
    seeds = seeds or (1, 2)
    return [
        task(CAT, "cat", strengths[0], seeds),
        task(DOG, "dog", strengths[1], tuple(10 + seed for seed in seeds)),
    ]


@pytest.fixture
def model(tiny_flux):
    return tiny_flux()


def save(stats, prefix="stats", keep_prompts=True) -> str:
    return execute(node("save_stats.SSRSaveStats"), stats=stats, filename_prefix=prefix, keep_prompts=keep_prompts)[0]


def load(file, model, given, **more):
    return execute(node("load_stats.SSRLoadStats"), file=file, model=model, tasks=tuple(given), **more)[0]


def add(a, b):
    return execute(node("add_stats.SSRAddStats"), stats_a=a, stats_b=b)[0]


def path_of(file: str) -> Path:
    return importlib.import_module("ssr_pack.nodes.writing.stats_folder").find(file)


def header(file: str) -> dict[str, str]:
    with safe_open(path_of(file), framework="pt") as opened:
        return opened.metadata()


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


# --- save and load ---


@pytest.mark.parametrize("refine", [0, 1])
def test_loaded_statistics_solve_to_the_very_same_lora(model, refine):
    stats = collect(model, *tasks(), refine=refine)
    loaded = load(save(stats), model, tasks(7))
    (lora, report), (again, report_again) = solve(stats), solve(loaded)
    assert same(lora, again) and report == report_again
    assert lora.metadata == again.metadata
    assert refine == bool(stats.calibration.corrections)


def test_loras_in_another_order_get_their_own_statistics(model):
    stats = collect(model, *tasks(), refine=1)
    loaded = load(save(stats), model, tasks()[::-1])
    assert [lora.task.name for lora in loaded.loras] == ["dog", "cat"] and loaded.calibration.names == ("dog", "cat")
    one, other = (sample(apply(model, solve(s)[0])) for s in (stats, loaded))
    assert relative(one, other) < 1e-5
    assert loaded.collections[0].prompts == stats.collections[0].prompts[::-1]


def test_loras_need_no_prompts_to_load_their_statistics(model):
    stats = collect(model, *tasks())
    bare = [replace(one, conditioning=[]) for one in tasks()]
    loaded = load(save(stats), model, bare)
    assert same(solve(loaded)[0], solve(stats)[0])
    assert loaded.collections == stats.collections


def test_loaded_statistics_take_the_strengths_of_the_loras_at_hand(model):
    stats = collect(model, *tasks())
    loaded = load(save(stats), model, tasks(strengths=(0.5, -1.0)))
    assert same(solve(loaded)[0], solve(stats, strengths="0.5, -1")[0])


def test_the_file_tells_what_was_measured_and_how(model):
    stats = collect(model, *tasks(), steps=3, seed=5)
    known = json.loads(header(save(stats))["ssr.stats"])["collections"]
    assert len(known) == 1 and known[0]["model"] == "Flux"
    assert known[0]["sampling"]["steps"] == 3 and known[0]["sampling"]["seed"] == 5
    assert known[0]["strengths"] == [1.0, 1.0] and known[0]["counts"] == [2, 2]
    assert {"pack", "comfyui", "torch"} <= known[0]["versions"].keys()


@pytest.mark.parametrize("how", ["switch", "command line", "kept"])
def test_prompts_are_in_the_file_unless_they_are_not_wanted(how, model, monkeypatch):
    clip = tiny_clip()
    entry = execute(node("prompts.SSRPrompts"), clip=clip, text="a secret cat")[0]
    given = [
        replace(one, conditioning=[[c, {**o, "ssr_prompt": entry[0][1]["ssr_prompt"]}]])
        for one in tasks()
        for c, o in one.conditioning[:1]
    ]
    stats = collect(model, *given, steps=1)
    assert stats.collections[0].prompts == (("a secret cat",), ("a secret cat",))
    if how == "command line":
        monkeypatch.setattr(importlib.import_module("comfy.cli_args").args, "disable_metadata", True)
    file = save(stats, keep_prompts=how != "switch")
    assert (b"secret" in path_of(file).read_bytes()) == (how == "kept")
    assert same(solve(load(file, model, given))[0], solve(stats)[0])


def test_a_name_that_leads_out_of_the_output_folder_is_refused_or_stays_inside(model):
    import folder_paths

    stats = collect(model, *tasks(1), steps=1)
    inside = Path(folder_paths.get_output_directory()).resolve()
    assert path_of(save(stats, "cats/with:colon")).name.startswith("with_colon")
    with pytest.raises(Exception, match="leads out of output/ssr_stats"):
        save(stats, "../../../escaped")
    assert not list(inside.parent.rglob("escaped*"))
    core = importlib.import_module("ssr_pack.ssr_core")
    with pytest.raises(core.StatisticsError, match="no file of statistics"):
        load("../../x.safetensors [output]", model, tasks())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (lambda: [tasks()[0], task(flux_lora(seed=9), "dog")], r"dog is another file or has changed"),
        (lambda: tasks()[:1], r"dog is missing"),
        (lambda: [*tasks(), task(flux_lora(seed=9), "bird")], r"bird was not there"),
    ],
    ids=["changed", "missing", "more"],
)
def test_other_loras_than_those_measured_are_refused_by_name(model, given, said):
    core = importlib.import_module("ssr_pack.ssr_core")
    file = save(collect(model, *tasks(1), steps=1))
    with pytest.raises(core.StatisticsError, match=rf"stats_\d+_\.safetensors was measured with other LoRAs.*{said}"):
        load(file, model, given())


def test_an_adapter_that_depends_on_the_base_is_told_to_come_with_its_base(tiny_flux):
    from safetensors.torch import save_file

    core = importlib.import_module("ssr_pack.ssr_core")
    import folder_paths

    folder = Path(folder_paths.get_output_directory())
    save_file(lora_of("dora"), folder / "dora.safetensors")
    given = [task(folder / "dora.safetensors", "dora"), tasks(1)[0]]
    file = save(collect(tiny_flux(), *given, steps=1))
    load(file, tiny_flux(), given)
    with pytest.raises(core.StatisticsError, match=r"dora is the same file, but its DoRA depend on the base's weights"):
        load(file, tiny_flux(seed=1), given)


def test_statistics_of_another_kind_of_model_and_damaged_files_are_refused(model, tiny_flux):
    core = importlib.import_module("ssr_pack.ssr_core")
    file = save(collect(model, *tasks(1), steps=1))
    other = tiny_flux()
    other.model.__class__ = type("Chroma", (type(other.model),), {})
    with pytest.raises(core.StatisticsError, match="was measured on Flux, but this model is Chroma"):
        load(file, other, tasks())
    path = path_of(file)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(core.StatisticsError, match="not a whole safetensors file"):
        load(file, model, tasks())


def test_a_lora_file_among_the_statistics_is_refused(model):
    from safetensors.torch import save_file

    core = importlib.import_module("ssr_pack.ssr_core")
    file = save(collect(model, *tasks(1), steps=1))
    save_file(CAT, path_of(file))
    with pytest.raises(core.StatisticsError, match="no file of SSR Save Stats"):
        load(file, model, tasks())


# --- add ---


def test_statistics_collected_like_others_add_up_with_them(model):
    first = collect(model, *tasks(1), refine=1)
    second = collect(model, *tasks(2), seed=5, refine=1, like=first)
    both = add(first, second)
    for site, statistics in both.calibration.statistics.items():
        one, other = (stats.calibration.statistics[site] for stats in (first, second))
        torch.testing.assert_close(statistics.gram, one.gram + other.gram)
        assert statistics.tokens == tuple(2 * n for n in one.tokens)
    assert both.calibration.corrections.keys() == first.calibration.corrections.keys()
    lora, report = solve(both)
    assert "cat" in report and len(json.loads(lora.metadata["ssr.calibration"])) == 2
    assert [source["prompts"] for source in json.loads(lora.metadata["ssr.sources"])] == [2, 2]


def test_a_sum_is_nearly_what_one_collection_of_all_prompts_measures(model):
    whole = collect(model, *tasks(1, 2))
    first = collect(model, *tasks(1))
    second = collect(model, *tasks(2), seed=1, like=first)  # the second prompt of a collection has the next seed
    both = add(first, second)
    for site, statistics in both.calibration.statistics.items():
        rank = whole.calibration.subspaces[site].rank  # the context rows come from the first prompt in both
        one, other = statistics.gram[:, :rank, :rank], whole.calibration.statistics[site].gram[:, :rank, :rank]
        assert relative(one, other) < 1e-6
    one, other = (sample(apply(model, solve(stats)[0])) for stats in (whole, both))
    assert relative(one, other) < 1e-3


def test_a_sum_can_be_saved_and_loaded_and_added_to(model):
    first = collect(model, *tasks(1), steps=1)
    again = load(save(first), model, tasks()[::-1])
    second = collect(model, *tasks(2), steps=1, like=again)  # in another order than what it is like
    both = add(first, load(save(second), model, tasks()))
    loaded = load(save(both), model, tasks())
    assert len(loaded.collections) == 2
    assert same(solve(both)[0], solve(loaded)[0])


def test_statistics_collected_by_themselves_are_refused_with_the_remedy_unless_they_had_no_context(model):
    core = importlib.import_module("ssr_pack.ssr_core")
    first, second = (collect(model, *tasks(seed), steps=1) for seed in (1, 2))
    with pytest.raises(core.StatisticsError, match="Connect one to like of the SSR Collect Stats"):
        add(first, second)
    first, second = (collect(model, *tasks(seed), steps=1, context=0) for seed in (1, 2))
    assert add(first, second).calibration.tokens == tuple(2 * n for n in first.calibration.tokens)


def test_what_cannot_be_added_is_refused_by_name(model):
    core = importlib.import_module("ssr_pack.ssr_core")
    first = collect(model, *tasks(1), steps=3, context=0, refine=1)
    other = collect(model, tasks()[0], task(flux_lora(seed=9), "bird"), steps=1, context=0)
    with pytest.raises(core.StatisticsError, match=r"stats_b was measured with other LoRAs .*bird is missing"):
        add(first, other)
    with pytest.raises(core.StatisticsError, match="other LoRAs"):
        collect(model, tasks()[0], task(flux_lora(seed=9), "bird"), steps=1, like=first)
    weaker = collect(model, *tasks(1, strengths=(0.5, 1)), steps=3, context=0, refine=1)
    with pytest.raises(core.StatisticsError, match=r"refined at the strengths 1, 1 and stats_b at 0\.5, 1"):
        add(first, weaker)


def test_a_file_of_the_first_version_is_loaded_and_solved(model):
    """Of the two LoRAs of rank 1 below, one prompt each, one step, without context rows."""
    import folder_paths

    target = Path(folder_paths.get_output_directory()) / "ssr_stats"
    target.mkdir(parents=True, exist_ok=True)
    shutil.copy(Path(__file__).parents[1] / "data" / "ssr-stats-1.safetensors", target)
    loras = flux_lora("kohya", rank=1, alpha=1.0, seed=1), flux_lora("generic", rank=1, seed=2)
    given = [task(lora, name, 1.0, (1 + i,)) for i, (lora, name) in enumerate(zip(loras, ("cat", "dog"), strict=True))]
    loaded = load(next(name for name in listed() if "ssr-stats-1" in name), model, given)
    fresh = collect(model, *given, steps=1, context=0)
    assert relative(sample(apply(model, solve(loaded)[0])), sample(apply(model, solve(fresh)[0]))) < 1e-4
    assert loaded.collections[0].combinations == ()


def listed():
    return importlib.import_module("ssr_pack.nodes.writing.stats_folder").listed()


# --- without steps ---


def test_statistics_of_no_steps_are_solved_with_all_settings_and_told_as_such(model):
    tasks_ = [task(CAT, "cat", 1.0, ()), task(DOG, "dog", 1.0, ())]
    stats = collect(model, *tasks_, steps=0)
    lora, report = solve(stats, strengths="1, 0")
    assert "from the weights alone" in report and json.loads(lora.metadata["ssr.calibration"])["steps"] == 0
    listed = importlib.import_module("ssr_pack.nodes.writing.stats_folder").listed
    before = listed()
    core = importlib.import_module("ssr_pack.ssr_core")
    for use in (lambda: save(stats), lambda: add(stats, stats), lambda: execute(node("report.SSRReport"), stats=stats)):
        with pytest.raises(core.StatisticsError, match=r"Nothing was measured of cat, dog.*steps above 0"):
            use()
    assert listed() == before


def test_statistics_of_no_steps_are_like_no_others(model):
    core = importlib.import_module("ssr_pack.ssr_core")
    with pytest.raises(core.SSRError, match="with 0 steps nothing is measured"):
        collect(model, *tasks(), steps=0, like=collect(model, *tasks(), steps=1))
