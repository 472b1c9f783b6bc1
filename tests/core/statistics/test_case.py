"""Cases: one LoRA that obeys several at once, where they were heard together, and none where nobody should speak."""

import pytest
import torch
from torch import Tensor, nn

from ssr_core import (
    Calibration,
    Case,
    Lora,
    MergeSettings,
    Ridge,
    Site,
    StatisticsCollector,
    StatisticsError,
    find_conflict,
    load_statistics,
    merge,
    save_statistics,
)
from ssr_core.measure.accumulator import Accumulator
from ssr_core.solve.diagnostics import effects
from ssr_core.solve.weights import task_weights
from ssr_core.statistics.case import singles, unheard
from synthetic import dense, dense_modules, mlp, random, random_lora, random_update, relative_error

CASES: list[int | tuple[int, ...]] = [0, 1, 2, (0, 2), ()]


def loras_for(model: nn.Module) -> list[Lora]:
    return [
        random_lora("cat", model, 3, 1).with_strength(0.8),
        random_lora("dog", model, 2, 2, ["2"]),
        random_lora("style", model, 4, 3).with_strength(0.5),
    ]


def batch(number: int, seed: int = 0) -> Tensor:
    return random(50, 8, seed=100 * seed + number) + number


def collector_for(model: nn.Module, loras: list[Lora], cases=CASES, seed: int = 0) -> StatisticsCollector:
    collector = StatisticsCollector(loras)
    for number, case in enumerate(cases):
        with torch.no_grad(), collector.watching(model, case):
            model(batch(number, seed))
    return collector


def collected(cases=CASES, seed: int = 0) -> Calibration:
    model = mlp()
    return collector_for(model, loras_for(model), cases, seed).calibration()


def refine(collector: StatisticsCollector, model: nn.Module, case, number: int) -> None:
    updates = merge(collector.calibration()).updates
    with torch.no_grad(), collector.refining(model, case, updates) as run:
        with run.alone():
            model(batch(number))
        with run.merged():
            model(batch(number))


# --- measuring ---


def test_all_loras_of_a_case_are_active_each_at_its_strength():
    model = mlp()
    loras, x = loras_for(model), batch(0)
    with torch.no_grad(), StatisticsCollector(loras).watching(model, (0, 2)):
        found = model(x)
    wanted = x
    for module, layer in (("0", model[0]), ("2", model[2])):
        weight = layer.weight.detach().double()
        for lora in (loras[0], loras[2]):
            weight = weight + lora.strength * dense(lora.updates[Site.whole(module, len(weight))])
        wanted = wanted @ weight.mT + layer.bias.detach()
        wanted = model[1](wanted) if module == "0" else wanted
    torch.testing.assert_close(found, wanted)


def test_in_silence_the_model_is_the_base():
    model = mlp()
    with torch.no_grad(), StatisticsCollector(loras_for(model)).watching(model, ()):
        found = model(batch(0))
    assert torch.equal(found, model(batch(0)).detach())


def test_a_case_that_is_seen_again_adds_to_its_own_sums_whatever_the_order_of_its_loras():
    model = mlp()
    collector = collector_for(model, loras_for(model))
    once = collector.calibration()
    with torch.no_grad(), collector.watching(model, [2, 0]):
        model(batch(3))
    twice = collector.calibration()
    assert twice.cases == once.cases == (*singles(3), Case((0, 2)), Case(()))
    assert twice.tokens == (50, 50, 50, 100, 50)


def test_a_case_that_failed_leaves_nothing():
    model = mlp()
    collector = collector_for(model, loras_for(model), [0, 1, 2])
    with pytest.raises(RuntimeError), collector.watching(model, (0, 1)):
        raise RuntimeError
    assert collector.calibration().cases == singles(3)


@pytest.mark.parametrize(("case", "said"), [((0, 5), "no task 5"), (-1, "no task -1"), ((1, 1), "twice")])
def test_a_case_of_loras_that_there_are_not_is_refused(case, said):
    with pytest.raises(StatisticsError, match=said):
        StatisticsCollector(loras_for(mlp())).recording(case).__enter__()


# --- solving ---


@pytest.mark.parametrize("settings", [MergeSettings(), MergeSettings.PAPER], ids=["default", "paper"])
def test_without_combinations_nothing_changes_to_the_bit(settings):
    model = mlp()
    plain = collector_for(model, loras_for(model), [0, 1, 2]).calibration()
    named = collector_for(model, loras_for(model), [(0,), (1,), (2,)]).calibration()
    one, other = merge(plain, settings), merge(named, settings)
    assert all(torch.equal(one.updates[site].up, other.updates[site].up) for site in one.updates)


def test_the_router_is_the_dense_least_squares_over_all_cases():
    """At one site: rows of z of the LoRAs that speak, against all of z, each case weighed."""
    site = Site.whole("layer", 6)
    updates = [random_update(6, 5, 2, seed) for seed in range(3)]
    loras = tuple(Lora(name, {site: update}) for name, update in zip(("a", "b", "c"), updates, strict=True))
    collector = StatisticsCollector(loras)
    model = nn.ModuleDict({"layer": nn.Linear(5, 6)}).double()
    cases: list[int | tuple[int, ...]] = [0, 1, 2, (0, 1), ()]
    inputs = [random(40, 5, seed=number) for number in range(len(cases))]
    for case, x in zip(cases, inputs, strict=True):
        with torch.no_grad(), collector.watching(model, case):
            model["layer"](x)
    calibration = collector.calibration()
    settings = MergeSettings(ridge=Ridge(relative=0, scarcity=0, floor=1e-9), balanced=False)
    found = dense(merge(calibration, settings).updates[site])
    space = calibration.subspaces[site]
    z = torch.cat([x @ space.down.double().mT for x in inputs])
    wanted = torch.zeros_like(z)
    for number, case in enumerate(cases):
        for task in (case,) if isinstance(case, int) else case:
            rows = slice(40 * number, 40 * number + 40)
            wanted[rows, space.blocks[task]] = z[rows, space.blocks[task]]
    # five inputs leave six rows dependent: what is written is unique, the router is not
    router = torch.linalg.lstsq(z, wanted, driver="gelsd").solution.mT
    assert relative_error(found, space.up.double() @ router @ space.down.double()) < 1e-4


def test_a_combination_makes_the_merge_obey_both_where_both_are_asked_for_and_each_where_one_is():
    """What a layer sees of a prompt is there once more for each LoRA that is asked for, so a linear map can tell."""
    site = Site.whole("layer", 6)
    loras = [Lora(name, {site: random_update(6, 9, 5, seed)}) for seed, name in enumerate(("cat", "style"))]
    model = nn.ModuleDict({"layer": nn.Linear(9, 6)}).double()

    def words(number: int, which: tuple[int, ...]) -> Tensor:
        scene = random(200, 3, seed=number)
        asked = [scene @ random(3, 3, seed=50 + task) * (task in which) for task in range(2)]
        return torch.cat([scene, *asked], dim=1)

    def error(merged, which: tuple[int, ...]) -> float:
        x = words(9, which)
        wanted = sum((x @ dense(loras[task].updates[site]).mT for task in which), torch.zeros(200, 6).double())
        return relative_error(x @ dense(merged.updates[site]).mT, wanted)

    def of(cases) -> Calibration:
        collector = StatisticsCollector(loras)
        for number, case in enumerate(cases):
            with torch.no_grad(), collector.watching(model, case):
                model["layer"](words(number, case))
        return collector.calibration()

    settings = MergeSettings(ridge=Ridge(relative=1e-6))
    apart, together = merge(of([(0,), (1,)]), settings), merge(of([(0,), (1,), (0, 1)]), settings)
    assert error(together, (0, 1)) < 0.2 * error(apart, (0, 1))
    assert max(error(together, (0,)), error(together, (1,))) < 0.1


def test_silence_lessens_what_the_merge_adds_where_nobody_should_speak():
    model = mlp()
    crowd = batch(4, seed=3)

    def added(cases) -> float:
        found = Lora("merge", merge(collector_for(model, loras_for(model), cases).calibration()).updates)
        with torch.no_grad():
            base = model(crowd)
            with StatisticsCollector([found]).watching(model, 0):
                return float((model(crowd) - base).norm())

    assert added([*CASES[:3], (), ()]) < 0.8 * added(CASES[:3])


def test_a_combination_counts_as_much_as_a_lora_however_many_tokens_it_saw():
    calibration = collected()
    for site, weights in task_weights(calibration, MergeSettings()).items():
        grams = calibration.statistics[site].gram
        up = calibration.subspaces[site].up.double()
        for case, weight, gram in zip(calibration.cases, weights, grams, strict=True):
            rows = [r for task in case.speakers for r in range(*calibration.subspaces[site].blocks[task].indices(99))]
            effect = float(torch.trace(up[:, rows] @ gram[rows][:, rows] @ up[:, rows].mT)) if rows else 0
            if effect:
                assert weight * effect == pytest.approx(1)


def test_all_combinations_together_count_no_more_than_the_loras_by_themselves():
    pairs = collected([0, 1, 2, (0, 1), (0, 2), (1, 2)])
    more = collected([0, 1, 2, (0, 1), (0, 2), (1, 2), (0, 1, 2)])
    for calibration, share in ((pairs, 1.0), (more, 3 / 4)):
        site = Site.whole("2", 8)
        weights = task_weights(calibration, MergeSettings())[site]
        found = effects(calibration.statistics[site], calibration.subspaces[site], calibration.cases)
        shares = [weight * effect for weight, effect in zip(weights, found, strict=True)]
        assert shares == pytest.approx([1.0] * 3 + [share] * (len(calibration.cases) - 3))


def test_a_refinement_of_a_combination_aims_at_what_its_loras_make_together():
    model = mlp()
    loras = loras_for(model)
    collector = collector_for(model, loras)
    updates = merge(collector.calibration()).updates
    refine(collector, model, (0, 2), 3)
    site, x = Site.whole("2", 8), batch(3)
    with torch.no_grad():
        with StatisticsCollector(loras).watching(model, (0, 2)):
            together = model(x)
        first = dense(updates[Site.whole("0", 12)])
        merged = model[1](x @ (model[0].weight.double() + first).mT + model[0].bias)
        missing = together - model[2](merged)
    calibration = collector.calibration()
    z = merged @ calibration.subspaces[site].down.double().mT
    number = calibration.cases.index(Case((0, 2)))
    found = calibration.corrections[site].targets[number].double()
    assert relative_error(found, missing.mT @ z) < 1e-5
    assert all(not target.numel() for i, target in enumerate(calibration.corrections[site].targets) if i != number)


# --- the values ---


def test_calibrations_with_other_combinations_add_up_in_either_order():
    one, other = collected([0, 1, 2, (0, 2)]), collected([0, 1, 2, (0, 1), (0, 2)], seed=1)
    ab, ba = one + other, other + one
    assert ab.cases == (*singles(3), Case((0, 2)), Case((0, 1)))
    assert ab.tokens == (100, 100, 100, 100, 50) and ba.tokens == (100, 100, 100, 50, 100)
    first, second = (dense_modules(merge(c).updates) for c in (ab, ba))
    assert all(relative_error(first[name], second[name]) < 1e-6 for name in first)


def test_a_lora_leaves_with_all_the_cases_in_which_it_spoke():
    model = mlp()
    loras = loras_for(model)
    left = collector_for(model, loras, [0, 1, 2, (0, 2), (0, 1), ()]).calibration().without(1)
    assert left.cases == (*singles(2), Case((0, 1)), Case(()))
    never = StatisticsCollector([loras[0], loras[2]])
    for number, case in ((0, 0), (2, 1), (3, (0, 1)), (5, ())):
        with torch.no_grad(), never.watching(model, case):
            model(batch(number))
    for site, statistics in never.calibration().statistics.items():
        torch.testing.assert_close(left.statistics[site].gram, statistics.gram, rtol=1e-12, atol=1e-12)


def test_another_order_of_the_loras_moves_the_speakers_along():
    model = mlp()
    calibration = collector_for(model, loras_for(model)).calibration()
    moved = calibration.reordered([2, 0, 1])
    assert moved.names == ("style", "cat", "dog") and moved.cases == (*singles(3), Case((0, 1)), Case(()))
    one, other = (dense_modules(merge(c).updates) for c in (calibration, moved))
    assert all(relative_error(one[name], other[name]) < 1e-6 for name in one)


def test_statistics_with_cases_are_saved_and_loaded_in_any_order(tmp_path):
    model = mlp()
    loras = loras_for(model)
    collector = collector_for(model, loras)
    refine(collector, model, (0, 2), 3)
    calibration = collector.calibration()
    save_statistics(calibration, tmp_path / "stats.safetensors")
    again = load_statistics(tmp_path / "stats.safetensors", loras)
    assert again.cases == calibration.cases and again.tokens == calibration.tokens
    for site, statistics in calibration.statistics.items():
        assert torch.equal(again.statistics[site].gram, statistics.gram)
        if site in calibration.corrections:
            assert torch.equal(again.corrections[site].targets[3], calibration.corrections[site].targets[3])
    assert load_statistics(tmp_path / "stats.safetensors", loras[::-1]).cases[3] == Case((0, 2))


def test_statistics_of_a_later_format_are_told_apart_from_other_files(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.ones(1)}, tmp_path / "new.safetensors", {"ssr.format": "statistics 9"})
    with pytest.raises(StatisticsError, match="newer version"):
        load_statistics(tmp_path / "new.safetensors", loras_for(mlp()))


def test_an_accumulator_gives_its_sums_the_number_of_its_case():
    site = Site.whole("layer", 6)
    space = collected([0]).subspaces[Site.whole("2", 8)]
    accumulator = Accumulator()
    accumulator.update(random(7, len(space.down)))
    assert accumulator.compute(5, space).tokens == (0, 0, 0, 0, 0, 7) and site.stop == 6


# --- what is told ---


def test_pairs_that_were_never_heard_together_are_found():
    assert list(unheard([Case((0, 1, 2)), Case(())], 4)) == [(0, 3), (1, 3), (2, 3)]
    assert list(unheard(singles(1), 1)) == []


def test_the_report_has_a_row_for_each_case_and_warns_of_pairs_that_were_not_heard():
    text = str(merge(collected()).report)
    rows = merge(collected()).report.details.splitlines()
    assert rows[1].startswith("cat ") and rows[4].startswith("cat + style") and rows[5].startswith("silence")
    assert "Never heard together: cat and dog, dog and style." in text
    assert "Never heard" not in str(merge(collected([0, 1, 2, (0, 1, 2)])).report)


def test_a_conflict_has_a_row_for_each_case():
    found = find_conflict(collected())
    assert found.labels == ["cat", "dog", "style", "cat + style", "silence"]
    assert found.cross_talk("plain").shape == (5, 3) and torch.isfinite(found.error("merge")).all()
