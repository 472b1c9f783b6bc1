"""merge(): every site solved with one set of choices, all made after collecting."""

import math

import pytest
import torch
from torch import Tensor

from ssr_core import (
    Calibration,
    Lora,
    MergeSettings,
    Ridge,
    Site,
    SolveError,
    SSRError,
    StatisticsError,
    Subspace,
    merge,
    normal_equations,
    route,
    solve_router,
)
from synthetic import calibration_at, collect, dense, dense_modules, measure, mlp, random, random_lora, random_update

SITE = Site.whole("blocks.0", 6)


def updates() -> list:
    return [random_update(6, 9, 2, 0), None, random_update(6, 9, 3, 1)]


def tokens(counts: tuple[int, ...] = (40, 50, 60)) -> list[Tensor]:
    return [random(count, 9, seed=task) + task for task, count in enumerate(counts)]


def merged(settings: MergeSettings | None = None, counts: tuple[int, ...] = (40, 50, 60)) -> Tensor:
    return dense(merge(calibration_at(SITE, updates(), tokens(counts)), settings).updates[SITE])


def by_hand(weights: tuple[float, ...], ridge: Ridge, counts: tuple[int, ...] = (40, 50, 60)) -> Tensor:
    space = Subspace.join(updates())
    return dense(route(space, solve_router(normal_equations(measure(space, tokens(counts)), space, weights, ridge))))


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)  # the result is stored in float32


def even(counts: tuple[int, ...] = (40, 50, 60)) -> tuple[float, ...]:
    """1 / what each LoRA changes on its own tokens; the absent one counts like the others' mean token."""
    effects = [
        None if update is None else float((x @ dense(update).T).square().sum())
        for update, x in zip(updates(), tokens(counts), strict=True)
    ]
    mean = sum(e / n for e, n in zip(effects, counts, strict=True) if e is not None) / 2
    return tuple(1 / (mean * max(n, 1) if e is None else e) for e, n in zip(effects, counts, strict=True))


def test_by_default_every_task_has_the_same_share_however_strong_it_is_and_however_many_tokens_it_saw():
    close(merged(), by_hand(even(), Ridge()))


def test_a_lora_ten_times_as_strong_takes_less_of_the_others_when_tasks_are_balanced():
    cat, _, dog = updates()
    calibration = calibration_at(SITE, [cat, None, dog.scaled(10.0)], tokens())
    balanced, plain = (merge(calibration, MergeSettings(balanced=b)).report for b in (True, False))
    assert balanced.error(0) < 0.5 * plain.error(0)


def test_the_papers_settings_count_tokens_of_the_present_tasks_as_they_are():
    close(merged(MergeSettings.PAPER), by_hand((1.0, 0.0, 1.0), Ridge.PAPER))


def test_weights_multiply_what_balancing_gives():
    close(
        merged(MergeSettings(weights=(1.0, 3.0, 0.5))),
        by_hand(tuple(w * e for w, e in zip((1.0, 3.0, 0.5), even(), strict=True)), Ridge()),
    )
    close(merged(MergeSettings(weights=(1.0, 3.0, 0.5), balanced=False)), by_hand((1.0, 3.0, 0.5), Ridge()))


def test_balancing_ignores_a_task_that_saw_nothing():
    close(merged(counts=(40, 0, 60)), by_hand(even((40, 0, 60)), Ridge(), (40, 0, 60)))


def test_no_routing_is_the_plain_stack_exactly():
    calibration = calibration_at(SITE, updates(), tokens())
    space = calibration.subspaces[SITE]
    update = merge(calibration, MergeSettings(routing=0)).updates[SITE]
    assert torch.equal(update.up, space.up)
    assert torch.equal(update.down, space.down)


def test_routing_goes_straight_from_the_stack_to_the_routed_update():
    stack, half, full = (merged(MergeSettings(routing=r)) for r in (0.0, 0.5, 1.0))
    close(half, (stack + full) / 2)


def test_without_data_the_merge_is_the_sum_of_the_loras():
    """As of layers for sound where only pictures were sampled: their mean would be half of each."""
    close(merged(counts=(0, 0, 0)), dense(updates()[0]) + dense(updates()[2]))


def test_the_merge_is_linear_in_the_strengths():
    parts = [merged(MergeSettings(strengths=s)) for s in ((1.0, 0.0, 0.0), (0.0, 0.0, 1.0))]
    close(merged(MergeSettings(strengths=(0.7, 9.0, -2.0))), 0.7 * parts[0] - 2 * parts[1])


def test_strengths_default_to_those_of_the_loras():
    calibration = calibration_at(SITE, updates(), tokens())
    weaker = Calibration(
        tuple(lora.with_strength(0.5) for lora in calibration.loras), calibration.subspaces, calibration.statistics
    )
    close(dense(merge(weaker).updates[SITE]), merged(MergeSettings(strengths=(0.5, 0.5, 0.5))))
    assert merge(weaker).report.strengths == (0.5, 0.5, 0.5)


def test_a_rank_bounds_every_site():
    model = mlp()
    loras = [random_lora("cat", model, 3, 1), random_lora("dog", model, 4, 2, ["0"])]
    calibration = collect(loras, model, [random(30, 8), random(30, 8, seed=1)])
    assert {s.module: u.rank for s, u in merge(calibration).updates.items()} == {"0": 7, "2": 3}
    result = merge(calibration, MergeSettings(rank=2, spread=False))
    assert {s.module: u.rank for s, u in result.updates.items()} == {"0": 2, "2": 2}
    assert all(0 < site.energy < 1 and site.rank == 2 for site in result.report.sites)


def test_a_rank_is_spread_over_the_sites_at_the_same_size_and_loses_less():
    model = mlp()
    strong = random_lora("dog", model, 4, 2)
    loras = [random_lora("cat", model, 3, 1), strong]
    calibration = collect(loras, model, [random(30, 8), random(30, 8, seed=1)])
    even, spread = (merge(calibration, MergeSettings(rank=3, spread=s)) for s in (False, True))
    size = [sum(u.down.numel() + u.up.numel() for u in m.updates.values()) for m in (even, spread)]
    assert size[1] <= size[0]
    lost = [sum(1 - site.energy for site in m.report.sites) for m in (even, spread)]
    assert lost[1] <= lost[0]


def test_every_site_keeps_a_direction_and_the_progress_covers_both_passes():
    model = mlp()
    calibration = collect(
        [random_lora("cat", model, 3, 1), random_lora("dog", model, 4, 2)], model, [random(30, 8)] * 2
    )
    steps: list[tuple[int, int]] = []
    result = merge(calibration, MergeSettings(rank=1), lambda *step: steps.append(step))
    assert {update.rank for update in result.updates.values()} == {1}
    assert steps == [(0, 4), (1, 4), (2, 4), (3, 4)]


def test_truncation_measures_where_the_data_are():
    calibration = calibration_at(SITE, updates(), tokens())
    space, full = calibration.subspaces[SITE], merged()
    smaller = merged(MergeSettings(rank=2))
    equations = normal_equations(calibration.statistics[SITE], space, even(), Ridge())
    z_metric = torch.linalg.cholesky(equations.correlation + equations.penalties.diag())
    # full = M down, and the loss is |(M - M2) L|^2
    signal = full @ torch.linalg.pinv(space.down.double())
    optimum = torch.linalg.svdvals(signal @ z_metric)[2:].square().sum()
    lost = ((signal - smaller @ torch.linalg.pinv(space.down.double())) @ z_metric).square().sum()
    assert float(lost) == pytest.approx(float(optimum), rel=1e-4)


def test_a_lora_alone_passes_through_at_its_strength():
    site = Site("single", 2, 8, 12)
    update = random_update(6, 9, 3)
    calibration = calibration_at(site, [update], tokens()[:1])
    result = merge(calibration, MergeSettings(strengths=(0.25,)))
    assert torch.equal(result.updates[site].down, update.down)
    torch.testing.assert_close(dense(result.updates[site]), 0.25 * dense(update))
    assert result.report.sites[0].tokens == ()


def lopsided() -> Calibration:
    """Only the second of three LoRAs writes here; the tokens of all three pass."""
    return calibration_at(Site.whole("single", 6), [None, random_update(6, 9, 3), None], tokens())


def test_where_one_lora_writes_the_tokens_of_the_others_are_left_alone():
    residuals = merge(lopsided()).report.sites[0].residuals
    assert [r.base for r in residuals] == [0.0, pytest.approx(residuals[1].base), 0.0]
    assert residuals[0].merge < 0.2 * residuals[0].stack
    assert residuals[2].merge < 0.2 * residuals[2].stack
    assert residuals[1].merge < 0.6 * residuals[1].base


def test_the_papers_settings_pass_a_site_of_one_lora_through():
    result = merge(lopsided(), MergeSettings.PAPER)
    torch.testing.assert_close(dense(result.updates[Site.whole("single", 6)]), dense(random_update(6, 9, 3)))


def test_a_site_of_one_lora_that_saw_no_token_passes_through():
    calibration = calibration_at(Site.whole("single", 6), [None, random_update(6, 9, 3)], tokens((0, 0, 0))[:2])
    merged = merge(calibration).updates[Site.whole("single", 6)]
    close(dense(merged), dense(random_update(6, 9, 3)))


@pytest.mark.parametrize("kernel", [(), (3,), (3, 3), (1, 3, 3)])
def test_a_merged_update_keeps_the_layout_of_its_layer(kernel):
    shape = (9, *kernel)
    given = [random_update(6, shape, 2, 0), random_update(6, shape, 3, 1)]
    space = Subspace.join(given)
    z = [random(40, 9 * torch.Size(kernel).numel(), seed=k) for k in range(2)]
    calibration = calibration_at(SITE, given, z)
    for settings in (MergeSettings(), MergeSettings(rank=2)):
        update = merge(calibration, settings).updates[SITE]
        assert update.in_shape == space.down.shape[1:] == shape
        assert update.down.dtype == update.up.dtype == torch.float32
        assert update.down.is_contiguous()
        assert update.up.is_contiguous()


def seeing(rows: int = 2) -> Calibration:
    """The same LoRAs and tokens, measured with context rows."""
    plain = calibration_at(SITE, updates(), tokens())
    space = plain.subspaces[SITE].with_context(random(rows, 9, seed=5, dtype=torch.float32))
    return Calibration(plain.loras, {SITE: space}, {SITE: measure(space, tokens())})


def test_context_rows_lower_the_error_and_cost_no_rank():
    ridge = Ridge(relative=1e-10, scarcity=0.0, floor=0.0)
    with_context, without = (
        merge(c, MergeSettings(ridge)) for c in (seeing(), calibration_at(SITE, updates(), tokens()))
    )
    assert with_context.report.sites[0].error("merge") < without.report.sites[0].error("merge")
    assert with_context.updates[SITE].rank == without.updates[SITE].rank == 5
    assert with_context.report.sites[0].energy == 1.0


@pytest.mark.parametrize("routing", [0.0, 0.5, 1.0])
def test_a_merge_with_context_rows_is_the_routed_update_without_loss(routing):
    calibration = seeing()
    space = calibration.subspaces[SITE]
    equations = normal_equations(calibration.statistics[SITE], space, even(), Ridge())
    router = (1 - routing) * torch.eye(5, 7, dtype=torch.float64) + routing * solve_router(equations)
    close(dense(merge(calibration, MergeSettings(routing=routing)).updates[SITE]), dense(route(space, router)))


def test_context_rows_serve_truncation_and_leaving_a_lora_out():
    assert merge(seeing(), MergeSettings(rank=3)).updates[SITE].rank == 3
    assert merge(seeing().without(1)).updates[SITE].rank == 5
    alone = merge(seeing().without(0).without(0)).updates[SITE]
    close(dense(alone), dense(updates()[2]))


def test_the_plain_stack_needs_no_tokens_even_with_context_rows():
    calibration = seeing()
    space = calibration.subspaces[SITE]
    unseen = Calibration(calibration.loras, {SITE: space}, {SITE: measure(space, tokens((0, 0, 0)))})
    stack = merge(unseen, MergeSettings(ridge=Ridge.PAPER, routing=0)).updates[SITE]
    close(dense(stack), dense(updates()[0]) + dense(updates()[2]))


def test_merging_twice_gives_the_same_bits():
    calibration = calibration_at(SITE, updates(), tokens())
    one, other = merge(calibration), merge(calibration)
    assert torch.equal(one.updates[SITE].up, other.updates[SITE].up)
    assert str(one.report) == str(other.report)


def test_merging_leaves_the_calibration_as_it_was():
    calibration = calibration_at(SITE, updates(), tokens())
    space, gram = calibration.subspaces[SITE], calibration.statistics[SITE].gram
    kept = space.down.clone(), space.up.clone(), gram.clone()
    merge(calibration, MergeSettings(rank=2, strengths=(3.0, 3.0, 3.0), weights=(1.0, 2.0, 3.0)))
    assert all(torch.equal(a, b) for a, b in zip((space.down, space.up, gram), kept, strict=True))


def test_copies_of_one_lora_merge_into_it_with_any_data():
    update = random_update(6, 9, 3)
    result = merge(calibration_at(SITE, [update, update], tokens((40, 60))))
    close(dense(result.updates[SITE]), dense(update))


def test_progress_is_told_before_every_site():
    model = mlp()
    calibration = collect([random_lora("cat", model, 3, 1)], model, [])
    calls = []
    merge(calibration, on_site=lambda done, total: calls.append((done, total)))
    assert calls == [(0, 2), (1, 2)]


def test_whoever_watches_the_progress_can_stop_the_merge():
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(calibration_at(SITE, updates(), tokens()), on_site=stop)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("routing", MergeSettings(routing=-0.1)),
        ("routing", MergeSettings(routing=1.5)),
        ("routing", MergeSettings(routing=math.nan)),
        ("rank", MergeSettings(rank=-1)),
        ("rank", MergeSettings(rank=2.5)),
        ("rank", MergeSettings(rank=math.nan)),
        ("rank", MergeSettings(rank=math.inf)),
        ("strengths", MergeSettings(strengths=(1.0, 1.0))),
        ("strengths", MergeSettings(strengths=(1.0, 1.0, math.nan))),
        ("weights", MergeSettings(weights=(1.0, 1.0, 1.0, 1.0))),
        ("weights", MergeSettings(weights=(1.0, math.inf, 1.0))),
        ("weights", MergeSettings(weights=(1.0, -1.0, 1.0))),
        ("weights", MergeSettings(weights=(0.0, 0.0, 0.0))),
        ("ridge", MergeSettings(ridge=Ridge(relative=-1e-3))),
        ("ridge", MergeSettings(ridge=Ridge(floor=math.nan))),
        ("ridge", MergeSettings(ridge=Ridge(scarcity=-0.1))),
        ("ridge", MergeSettings(ridge=Ridge(absolute=math.inf))),
    ],
)
def test_settings_that_cannot_be_meant_are_refused_by_name(name, settings):
    with pytest.raises(SSRError, match=f"^{name} "):
        merge(calibration_at(SITE, updates(), tokens()), settings)


def test_a_site_without_statistics_is_refused_by_name():
    calibration = calibration_at(SITE, updates(), tokens())
    with pytest.raises(StatisticsError, match=r"no statistics for blocks\.0"):
        merge(Calibration(calibration.loras, calibration.subspaces, {}))


def test_statistics_of_other_loras_are_refused_by_name():
    calibration = calibration_at(SITE, updates(), tokens())
    others = calibration_at(SITE, updates()[::-1], tokens())
    with pytest.raises(StatisticsError, match=r"blocks\.0: .*other LoRAs"):
        merge(Calibration(calibration.loras, calibration.subspaces, others.statistics))


def test_a_singular_site_is_refused_by_name_and_number():
    calibration = calibration_at(SITE, updates(), tokens((0, 0, 0)))
    with pytest.raises(SolveError, match=r"blocks\.0 saw 0 tokens.*joint rank of 5"):
        merge(calibration, MergeSettings.PAPER)


def test_three_loras_of_any_ranks_and_sites_are_merged_site_by_site():
    model = mlp()
    loras = [random_lora("a", model, 1, 1), random_lora("b", model, 5, 2, ["2"]), random_lora("c", model, 3, 3)]
    calibration = collect(loras, model, [random(40, 8, seed=k) for k in range(3)])
    result = dense_modules(merge(calibration).updates)
    for site, space in calibration.subspaces.items():
        alone = Calibration(calibration.loras, {site: space}, {site: calibration.statistics[site]})
        assert torch.equal(result[site.module], dense_modules(merge(alone).updates)[site.module])


def test_a_single_lora_merges_into_itself():
    model = mlp()
    lora = random_lora("cat", model, 3, 1)
    result = merge(collect([lora], model, [random(9, 8)]))
    for module, delta in dense_modules(lora.updates).items():
        assert torch.equal(dense_modules(result.updates)[module], delta)


def test_a_lora_of_zeros_neither_breaks_the_merge_nor_the_report():
    silent = random_update(6, 9, 2, 0)
    silent.up.zero_()
    result = merge(calibration_at(SITE, [silent, random_update(6, 9, 3, 1)], tokens((40, 60))), MergeSettings(rank=3))
    assert result.updates[SITE].is_finite()
    assert math.isnan(result.report.error(0))
    assert result.report.error(1) < 1
    assert isinstance(str(result.report), str)


def test_loras_that_do_nothing_at_all_merge_into_nothing():
    silent = Lora("cat", {SITE: random_update(6, 9, 2, 0)})
    silent.updates[SITE].up.zero_()
    result = merge(calibration_at(SITE, [silent.updates[SITE]] * 2, tokens((40, 60))), MergeSettings(rank=0.9))
    assert result.updates[SITE].is_finite()
    assert not dense(result.updates[SITE]).any()
