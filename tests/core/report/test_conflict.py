"""Conflict: cross-talk and errors are explicit sums over the tokens, and the text says where and what to do."""

import math

import pytest
import torch
from torch import Tensor

from ssr_core import (
    Conflict,
    MergeSettings,
    Site,
    SiteConflict,
    StatisticsError,
    advise,
    find_conflict,
    merge,
    normal_equations,
    solve_router,
)
from ssr_core.report.conflict import block_of
from ssr_core.solve.weights import task_weights
from synthetic import calibration_at, collect, dense, mlp, random, random_lora, random_update

SITE = Site.whole("blocks.0", 6)
STRENGTHS = (0.5, 1.0, -2.0)
SETTINGS = MergeSettings(strengths=STRENGTHS)


def updates() -> list:
    return [random_update(6, 9, 2, 0), None, random_update(6, 9, 3, 1)]


def tokens() -> list[Tensor]:
    return [random(count, 9, seed=task) + task for task, count in enumerate((40, 50, 60))]


def alone() -> list[Tensor]:
    return [
        torch.zeros(6, 9, dtype=torch.float64) if u is None else s * dense(u)
        for u, s in zip(updates(), STRENGTHS, strict=True)
    ]


def squares(x: Tensor, weight: Tensor) -> float:
    """The sum over tokens of the squared output of a weight."""
    return float(sum((weight @ token).square().sum() for token in x))


@pytest.fixture
def found() -> SiteConflict:
    (site,) = find_conflict(calibration_at(SITE, updates(), tokens()), SETTINGS).sites
    return site


def test_plain_cross_talk_is_what_each_lora_writes_on_the_tokens_of_each_other(found):
    for i, x in enumerate(tokens()):
        for j, weight in enumerate(alone()):
            assert found.plain[i, j] == pytest.approx(squares(x, weight), rel=1e-6)
    assert torch.equal(found.effect, found.plain.diagonal())


def test_routed_cross_talk_is_what_the_router_sends_to_each_lora_on_the_tokens_of_each_other(found):
    calibration = calibration_at(SITE, updates(), tokens())
    scaled = calibration.subspaces[SITE].scaled(STRENGTHS)
    weights = task_weights(calibration, SETTINGS)[SITE]
    router = solve_router(normal_equations(calibration.statistics[SITE], scaled, weights, SETTINGS.ridge))
    for i, x in enumerate(tokens()):
        for j, block in enumerate(scaled.blocks):
            written = scaled.up[:, block].double() @ router[block] @ scaled.down.double()
            expected = squares(x, written - alone()[i] if i == j else written)
            assert found.routed[i, j] == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_errors_are_those_of_the_stack_and_of_the_merge_that_solve_makes(found):
    calibration = calibration_at(SITE, updates(), tokens())
    merged = dense(merge(calibration, SETTINGS).updates[SITE])
    for i, x in enumerate(tokens()):
        assert found.stack[i] == pytest.approx(squares(x, sum(alone()) - alone()[i]), rel=1e-6)
        assert found.merge[i] == pytest.approx(squares(x, merged - alone()[i]), rel=1e-4)


def test_the_whole_is_the_sum_of_the_sites_and_equals_the_report_of_a_merge():
    model = mlp()
    loras = [random_lora("cat", model, 3, 1), random_lora("dog", model, 2, 2, ["2"])]
    calibration = collect(loras, model, [random(30, 8, seed=task) + task for task in range(2)])
    seen, report = find_conflict(calibration), merge(calibration).report
    for task in range(2):
        for kind in ("stack", "merge"):
            assert seen.error(kind)[task] == pytest.approx(report.error(task, kind), rel=1e-5)
    assert list(seen.blocks) == ["0", "2"]
    assert math.isnan(seen.error_by_block("stack")["0"][1])  # dog writes nothing there
    last = report.sites[1].residuals[0]
    assert seen.error_by_block("merge")["2"][0] == pytest.approx(last.merge / last.base)


def test_what_a_cut_loses_is_what_a_merge_of_that_rank_says_to_have_lost():
    calibration = calibration_at(SITE, updates(), tokens())
    seen = find_conflict(calibration)
    for rank in (1, 2, 3):
        kept = merge(calibration, MergeSettings(rank=rank)).report.sites[0].energy
        assert seen.lost_at(rank) == pytest.approx(1 - kept, abs=1e-9)
    assert seen.rank == 5


def test_loras_of_inputs_that_are_apart_show_no_cross_talk():
    downs = [torch.eye(9)[:2], torch.eye(9)[4:6]]
    apart = [type(u)(down, u.up[:, :2]) for u, down in zip((updates()[0], updates()[2]), downs, strict=True)]
    seen = find_conflict(
        calibration_at(SITE, apart, [random(40, 9) * mask for mask in (torch.arange(9) < 3, torch.arange(9) > 3)])
    )
    assert seen.cross_talk("plain")[0, 1] == seen.cross_talk("plain")[1, 0] == 0
    assert "hardly disturb each other" in advise(seen)


def test_a_lora_alone_has_no_conflict():
    with pytest.raises(StatisticsError, match="only one LoRA"):
        find_conflict(calibration_at(SITE, updates()[:1], tokens()[:1]))


def test_looking_can_be_stopped_and_counts_its_sites():
    calls = []
    calibration = calibration_at(SITE, updates(), tokens())
    find_conflict(calibration, on_site=lambda done, total: calls.append((done, total)))
    assert calls == [(0, 1)]


@pytest.mark.parametrize(
    ("module", "block"),
    [
        ("double_blocks.3.img_attn.qkv", "double_blocks.3"),
        ("diffusion_model.single_blocks.12.linear1", "single_blocks.12"),
        ("input_blocks.4.1.transformer_blocks.0.attn1.to_q", "input_blocks.4"),
        ("middle_block.1.proj_in", "middle_block.1"),
        ("final_layer.linear", "final_layer"),
        ("img_in", "img_in"),
        (
            "text_encoders.clip_l.transformer.text_model.encoder.layers.11.mlp.fc1",
            "text_encoders.clip_l.transformer.text_model.encoder.layers.11",
        ),
    ],
)
def test_a_block_is_the_name_up_to_its_first_number(module, block):
    assert block_of(module) == block


# --- the text ---


def site(name: str, plain, routed, stack, merge, coverage: int = 8) -> SiteConflict:
    tensors = (torch.tensor(value, dtype=torch.float64) for value in (plain, routed, stack, merge))
    effect = torch.tensor(plain, dtype=torch.float64).diagonal()
    return SiteConflict(Site.whole(name, 6), *tensors, effect, (0.7, 0.295, 0.005), coverage)


def quiet(name: str) -> SiteConflict:
    return site(name, [[4, 0.1], [0.1, 6]], [[0.1, 0], [0, 0.1]], [0.1, 0.1], [0.1, 0.1])


def loud(name: str) -> SiteConflict:
    return site(name, [[4, 8], [0.1, 6]], [[0.4, 0.4], [0, 0.1]], [8, 0.1], [0.8, 0.1])


def test_the_text_says_who_disturbs_whom_where_and_what_to_expect():
    blocks = [f"blocks.{i}.attn" for i in range(12)]
    sites = tuple(loud(name) if i in (7, 8, 10) else quiet(name) for i, name in enumerate(blocks))
    text = advise(Conflict(("cat", "style"), (1.0, 1.0), sites))
    assert "2 LoRAs in 12 sites of 12 blocks" in text
    assert "style disturbs cat: stacked, it adds 52 % of cat's own effect to its prompts, " in text
    assert "most in blocks.7-8; routed, 2.5 %." in text
    assert "cat disturbs style" not in text
    assert "Expect cat nearly as it is alone: routed, the layers keep 93 % of its effect; " in text
    assert "; stacked, they would be off by 52 %." in text
    assert "Half of what routing leaves is in blocks.7-8, blocks.10: " in text


def test_the_text_warns_of_a_lora_that_will_be_weak_and_of_few_levels():
    lost = site("blocks.0", [[4, 4], [4, 4]], [[1, 1], [1, 0.2]], [4, 4], [3, 1], coverage=1)
    text = advise(Conflict(("cat", "dog"), (1.0, 1.0), (lost,)))
    assert "Expect losses of cat: routed, the layers keep 25 % of its effect." in text
    assert "Expect some losses of dog: routed, the layers keep 75 % of its effect." in text
    assert "seen at 1 noise levels or samples only" in text


def test_blocks_come_in_the_order_of_their_numbers():
    names = ["b.10.x", "b.2.x", "b.9.y", "a.1"]
    assert list(Conflict(("cat", "dog"), (1, 1), tuple(map(quiet, names))).blocks) == ["a.1", "b.2", "b.9", "b.10"]


def test_a_lora_without_any_effect_is_told_to_have_none():
    calibration = calibration_at(SITE, updates(), tokens())
    text = advise(find_conflict(calibration))
    assert "dog has no effect on its own prompts" in text and "nan" not in text
