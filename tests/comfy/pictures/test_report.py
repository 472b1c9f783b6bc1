"""SSR Report in a real ComfyUI: from statistics alone, in words and as a picture."""

import importlib
import sys

import pytest
import torch

from run_nodes import collect, execute, node, task
from tiny_flux import flux_lora

pytestmark = [pytest.mark.comfy, pytest.mark.usefixtures("pack")]


def report(stats, **more):
    return execute(node("report.SSRReport"), stats=stats, **more)


@pytest.fixture(scope="module")
def stats(pack):
    sd, tiny = importlib.import_module("comfy.sd"), importlib.import_module("tiny_flux")
    model = sd.load_diffusion_model_state_dict(tiny.flux_state_dict())
    loras = (("cat", flux_lora("kohya", rank=4, seed=1)), ("a style", flux_lora(rank=2, seed=3, strength=0.6)))
    return collect(model, *(task(lora, name, seeds=(seed,)) for seed, (name, lora) in enumerate(loras)))


def test_it_names_the_loras_and_the_blocks_and_tells_what_to_expect(stats):
    text, picture = report(stats)
    assert "2 LoRAs in 16 sites of 3 blocks, before merging" in text
    assert "a style disturbs cat: stacked, it adds" in text
    assert "Expect" in text and "noise level" not in text
    assert picture.dtype == torch.float32 and picture.shape[0] == 1 and picture.shape[2:] == (1024, 3)
    assert 0 <= picture.min() < 0.2 and 0.9 < picture.max() <= 1


def test_it_begins_with_what_a_merge_would_keep_and_what_to_do_next(stats):
    kept, following, empty, table = report(stats)[0].splitlines()[:4]
    assert kept.startswith("In its layers the merge would keep ") and "% of cat and" in kept and "of a style" in kept
    assert following.startswith("Next: ") and empty == "" and "before merging" in table


def test_the_chart_has_a_row_more_for_each_case(stats):
    core, charts = (importlib.import_module(f"ssr_pack.{name}") for name in ("ssr_core", "nodes.pictures.charts"))
    site = lambda cases: core.SiteConflict(  # noqa: E731
        *(core.Site.whole("blocks.0.linear", 8), *(torch.ones(cases, 2).double(),) * 2),
        *((torch.ones(cases).double(),) * 3), *((1.0,), 8),
    )  # fmt: skip
    cases = (core.Case((0,)), core.Case((1,)), core.Case((0, 1)), core.Case(()))
    heights = [
        charts.chart(core.Conflict(("a", "b"), (1.0, 1.0), (site(count),), cases[:count])).shape[1]
        for count in (2, 3, 4)
    ]
    assert heights[0] < heights[1] < heights[2]


def test_drawing_leaves_matplotlibs_own_state_as_it_was(stats):
    matplotlib = pytest.importorskip("matplotlib")
    before, had_pyplot = matplotlib.rcParams.copy(), "matplotlib.pyplot" in sys.modules
    report(stats)
    assert matplotlib.rcParams.copy() == before
    assert ("matplotlib.pyplot" in sys.modules) == had_pyplot  # whose figures would stay for ever


def test_without_matplotlib_the_text_is_whole_and_the_picture_says_what_to_install(stats, monkeypatch, caplog):
    text, _ = report(stats)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # as if it were not installed
    again, picture = report(stats)
    assert again == text and picture.shape == (1, 256, 1024, 3)
    assert "pip install matplotlib" in caplog.text


def test_a_higher_ridge_leaves_more_cross_talk(stats):
    charts = importlib.import_module("ssr_pack.ssr_core")
    loose, tight = (
        charts.find_conflict(stats.calibration, charts.MergeSettings(ridge=charts.Ridge(relative=ridge)))
        for ridge in (1.0, 0.001)
    )
    assert loose.error("merge").sum() > tight.error("merge").sum()
    assert report(stats, ridge=1.0)[0] != report(stats)[0]


def test_one_lora_alone_is_told_to_disturb_nobody(tiny_flux):
    core = importlib.import_module("ssr_pack.ssr_core")
    with pytest.raises(core.StatisticsError, match="only one LoRA"):
        report(collect(tiny_flux(), task(flux_lora(), "only"), steps=1))


@pytest.mark.parametrize("count", [2, 9])
def test_charts_of_large_models_and_long_names_are_drawn(pack, count):
    core, charts = (importlib.import_module(f"ssr_pack.{name}") for name in ("ssr_core", "nodes.pictures.charts"))
    names = tuple(f"{i}_a_very_long_name_of_a_lora_that_somebody_gave_\u732b" for i in range(count))
    plain = torch.rand(count, count, generator=torch.Generator().manual_seed(0)).double() + torch.eye(count)
    plain[0, 0] = 0  # a LoRA without effect there
    blocks = [f"double_blocks.{i}" for i in range(19)] + [f"single_blocks.{i}" for i in range(38)] + ["final_layer"]
    sites = tuple(
        core.SiteConflict(
            *(core.Site.whole(f"{block}.linear", 8), plain, plain / 9, plain.sum(1), plain.sum(1) / 9),
            *(plain.diagonal(), (0.9, 0.1), 8),
        )
        for block in blocks
    )
    assert charts.chart(core.Conflict(names, (1.0,) * count, sites)).shape[2] == 1024
