"""Refinement: the merge walks beside each LoRA alone, and a second solution makes up for what the first one did."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from ssr_core import (
    Calibration,
    Lora,
    MergeSettings,
    Site,
    StatisticsCollector,
    load_statistics,
    merge,
    save_statistics,
)
from ssr_core.measure.refinement import Uncompared
from ssr_core.solve.weights import task_weights
from synthetic import dense, mlp, random, random_lora


def loras_for(model: nn.Module) -> list[Lora]:
    return [random_lora("cat", model, 3, 1).with_strength(0.8), random_lora("dog", model, 2, 2, ["2"])]


def batches() -> list[Tensor]:
    return [random(40, 8) + 1, random(40, 8, seed=1) - 1]


def watched(model: nn.Module, loras: list[Lora]) -> StatisticsCollector:
    collector = StatisticsCollector(loras)
    for task, batch in enumerate(batches()):
        with torch.no_grad(), collector.watching(model, task):
            model(batch)
    return collector


def refine(collector: StatisticsCollector, model: nn.Module, updates) -> None:
    for task, batch in enumerate(batches()):
        with torch.no_grad(), collector.refining(model, task, updates) as run:
            with run.alone():
                model(batch)
            with run.merged():
                model(batch)


def refined() -> tuple[nn.Sequential, StatisticsCollector, Calibration]:
    model = mlp()
    collector = watched(model, loras_for(model))
    refine(collector, model, merge(collector.calibration()).updates)
    return model, collector, collector.calibration()


def outputs(model: nn.Module, lora: Lora, x: Tensor) -> Tensor:
    with torch.no_grad(), StatisticsCollector([lora]).watching(model, 0):
        return model(x)


def error(model: nn.Module, loras: list[Lora], updates) -> float:
    """Of the whole model's output, mean over the LoRAs; 1 = the base model."""
    errors = []
    for lora, x in zip(loras, batches(), strict=True):
        wanted, found = outputs(model, lora, x), outputs(model, Lora("merge", updates), x)
        errors.append(float((found - wanted).square().sum() / (model(x).detach() - wanted).square().sum()))
    return sum(errors) / len(errors)


def test_the_sums_are_over_what_the_merged_model_sees_and_what_it_should_have_written():
    model = mlp()
    loras, collector = loras_for(model), watched(model, loras_for(model))
    updates = merge(collector.calibration()).updates
    refine(collector, model, updates)
    site, first = Site.whole("2", 8), Site.whole("0", 12)
    space, found = collector.calibration().subspaces[site], collector.calibration().corrections[site]
    for task, x in enumerate(batches()):
        own = dense(loras[task].updates[first]) * loras[task].strength if first in loras[task].updates else 0
        weight, bias = model[0].weight.detach().double(), model[0].bias.detach().double()
        alone = model[1](x.double() @ (weight + own).mT + bias)
        merged = model[1](x.double() @ (weight + dense(updates[first])).mT + bias)
        delta = dense(loras[task].updates[site]) * loras[task].strength
        w2 = model[2].weight.detach().double()
        missing, z = alone @ (w2 + delta).mT - merged @ w2.mT, merged @ space.down.double().mT
        torch.testing.assert_close(found.target[task].double(), missing.mT @ z, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.gram[task], z.mT @ z, rtol=1e-5, atol=1e-5)


def test_a_refined_merge_is_nearer_to_each_lora_alone():
    model, collector, calibration = refined()
    first = error(model, loras_for(model), merge(calibration, MergeSettings(corrected=False)).updates)
    second = error(model, loras_for(model), merge(calibration).updates)
    assert second < 0.9 * first
    refine(collector, model, merge(calibration).updates)
    assert error(model, loras_for(model), merge(collector.calibration()).updates) < 1.01 * second


def test_a_refined_merge_has_the_rank_that_was_asked_for():
    _, _, calibration = refined()
    updates = merge(calibration, MergeSettings(rank=2, spread=False)).updates
    ranks = {site.module: update.rank for site, update in updates.items()}
    assert ranks == {"0": 2, "2": 2}


def test_the_solution_is_that_of_least_squares_over_both_kinds_of_tokens():
    _, _, calibration = refined()
    site = Site.whole("2", 8)
    merged = merge(calibration, MergeSettings(balanced=False))
    statistics, correction = calibration.statistics[site], calibration.corrections[site]
    space = calibration.subspaces[site].scaled((0.8, 1.0))
    ridge = MergeSettings().ridge
    gram = statistics.gram.sum(0) + correction.gram.sum(0)
    penalty = ridge.penalties(gram, space, 80, 40).diag()
    target = sum(space.up[:, b].double() @ g[b] for b, g in zip(space.blocks, statistics.gram, strict=True))
    target = target + correction.target.double().sum(0) + space.up.double() / 2 @ penalty
    wanted = target @ torch.linalg.inv(gram + penalty) @ space.down.double()
    torch.testing.assert_close(dense(merged.updates[site]), wanted, rtol=1e-4, atol=1e-5)
    assert merged.report.sites[1].residuals[0].merge < merged.report.sites[1].residuals[0].stack


def test_corrections_of_other_strengths_do_not_count():
    _, _, calibration = refined()
    for strengths in ((0.5, 1.0), (0.8, 0.0)):
        with_, without = (
            merge(calibration, MergeSettings(strengths=strengths, corrected=corrected)).updates
            for corrected in (True, False)
        )
        assert all(torch.equal(dense(with_[site]), dense(without[site])) for site in with_)


def test_a_lora_that_is_its_own_merge_needs_no_correction():
    model = mlp()
    cat = random_lora("cat", model, 3, 1)
    collector = watched(model, [cat, random_lora("dog", model, 2, 2)])
    with torch.no_grad(), collector.refining(model, 0, cat.updates) as run:
        with run.alone():
            wanted = model(batches()[0])
        with run.merged():
            torch.testing.assert_close(model(batches()[0]), wanted)
    calibration = collector.calibration()
    for site, found in calibration.corrections.items():
        up = calibration.subspaces[site].task(0).up.double()
        torch.testing.assert_close(found.target[0].double(), up @ found.gram[0][:3], rtol=1e-4, atol=1e-4)
        assert not found.gram[1].any()


def test_a_broken_run_adds_nothing_and_leaves_no_hook():
    model, collector, before = refined()
    with pytest.raises(KeyboardInterrupt), collector.refining(model, 0, merge(before).updates) as run:
        with run.alone():
            model(batches()[0])
        raise KeyboardInterrupt
    assert not any(module._forward_hooks for module in model.modules())
    after = collector.calibration()
    assert all(torch.equal(after.corrections[s].gram, before.corrections[s].gram) for s in before.corrections)


def test_a_merge_that_runs_before_the_lora_alone_is_compared_with_nothing():
    model, collector, calibration = refined()
    with torch.no_grad(), collector.refining(model, 0, merge(calibration).updates) as run, run.merged():
        model(batches()[0])
    assert collector.uncompared == {"0": Uncompared.CALLS, "2": Uncompared.CALLS}
    assert collector.calibration().corrections == {}
    measured = collector.calibration().statistics
    assert all(torch.equal(measured[site].gram, known.gram) for site, known in calibration.statistics.items())


def test_where_a_step_cache_answers_for_the_merge_nothing_is_compared_and_what_was_measured_stands():
    model, batch = mlp(), batches()[0]
    collector = watched(model, loras_for(model))
    before = collector.calibration()
    with torch.no_grad(), collector.refining(model, 0, merge(before).updates) as run:
        for answered in (False, True):
            with run.alone():
                model(batch)
            with run.merged():
                if not answered:
                    model(batch)
    assert collector.uncompared == {"0": Uncompared.CALLS, "2": Uncompared.CALLS}
    after = collector.calibration()
    assert not after.corrections
    assert all(torch.equal(after.statistics[site].gram, known.gram) for site, known in before.statistics.items())


class Experts(nn.Module):
    """Each token goes to the first expert if its first value is positive, else to the second."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.experts = nn.Linear(8, 8), nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

    def forward(self, x: Tensor, chosen: Tensor) -> Tensor:
        x = self.first(x)
        return torch.cat([expert(x[chosen == number]) for number, expert in enumerate(self.experts)])


def test_experts_that_see_other_tokens_under_the_merge_get_no_correction_of_any_case():
    """Though one of them may see as many in some call; the other layers are refined."""
    model = Experts().double()
    collector = StatisticsCollector([random_lora("cat", model, 3, 1), random_lora("dog", model, 2, 2)])
    x, chosen = random(40, 8), torch.arange(40) % 2
    for task in range(2):
        with torch.no_grad(), collector.watching(model, task):
            model(x, chosen)
    updates = merge(collector.calibration()).updates
    for task, under_the_merge in ((0, chosen), (1, torch.where(chosen == 0, 3, chosen)), (0, chosen)):
        with torch.no_grad(), collector.refining(model, task, updates) as run:
            with run.alone():
                model(x, chosen)
            with run.merged():
                model(x, under_the_merge)
        expected = {"first"} if collector.uncompared else {"first", "experts.0", "experts.1"}
        assert {site.module for site in collector.calibration().corrections} == expected
    assert collector.uncompared == {"experts.0": Uncompared.TOKENS, "experts.1": Uncompared.TOKENS}


def test_what_runs_in_neither_branch_has_the_lora_alone_active_and_is_told():
    model, x = mlp(), batches()[0]
    loras = loras_for(model)
    collector = watched(model, loras)
    updates = merge(collector.calibration()).updates
    with torch.no_grad(), collector.refining(model, 0, updates) as run:
        seen = model[0](x)
        for branch in (run.alone, run.merged):
            with branch():
                model[2](seen)
    with torch.no_grad(), StatisticsCollector(loras).watching(model, 0):
        assert torch.equal(seen, model[0](x))
    assert run.outside == {"0"}
    assert {site.module for site in collector.calibration().corrections} == {"2"}


def test_corrections_add_up_and_are_saved_with_the_statistics(tmp_path):
    _, _, calibration = refined()
    twice = calibration + calibration
    save_statistics(calibration, tmp_path / "stats.safetensors")
    read = load_statistics(tmp_path / "stats.safetensors", calibration.loras)
    for site, correction in calibration.corrections.items():
        torch.testing.assert_close(twice.corrections[site].target, 2 * correction.target)
        assert torch.equal(read.corrections[site].gram, correction.gram)
        assert torch.equal(read.corrections[site].target, correction.target)
        assert read.corrections[site].strengths == correction.strengths


def test_without_one_lora_there_are_no_corrections():
    _, _, calibration = refined()
    assert calibration.without(0).corrections == {}


def test_a_limit_counts_so_many_tokens_of_each_pass_and_layer():
    model = mlp()
    collector = StatisticsCollector(loras_for(model))
    x = torch.eye(8, dtype=torch.float64).repeat(5, 1)
    with torch.no_grad(), collector.recording(0, tokens=12) as recording:
        recording.attach(model)
        wanted = model(x)
    assert collector.calibration().tokens == (12, 0)
    with torch.no_grad(), StatisticsCollector(loras_for(model)).watching(model, 0):
        torch.testing.assert_close(model(x), wanted)  # the LoRA is active on all of them


def test_every_token_is_as_likely_to_be_counted():
    model = nn.Sequential(nn.Linear(4, 6))
    collector = StatisticsCollector([random_lora("cat", model, 4, 1), random_lora("dog", model, 2, 2)])
    x = torch.eye(4).repeat_interleave(25, 0)
    for _ in range(40):
        with torch.no_grad(), collector.recording(0, tokens=20) as recording:
            recording.attach(model)
            for _ in range(10):
                model(x)
    statistics = next(iter(collector.calibration().statistics.values()))
    down = next(iter(collector.subspaces.values())).down.double()
    expected = down @ down.mT * sum(statistics.tokens) / 4
    torch.testing.assert_close(statistics.gram[0], expected, rtol=0.1, atol=0.1 * float(expected.diagonal().mean()))


def test_a_layer_whose_inputs_the_merge_does_not_change_is_not_corrected():
    model = mlp()
    loras = loras_for(model)
    collector = StatisticsCollector(loras)
    few, many = random(3, 8, seed=5), random(30, 8, seed=6)
    for task in range(2):
        with torch.no_grad(), collector.watching(model, task):
            model(many)
    updates = merge(collector.calibration()).updates
    with torch.no_grad(), collector.refining(model, 0, updates) as run:
        for _ in range(2):
            with run.alone():
                model(few)
                model(few)
            with run.merged():
                model(few)
                model(few)
    _, second = sorted(collector.subspaces)
    assert set(collector.calibration().corrections) == {second}


def test_groups_of_layers_one_after_the_other_give_the_same_as_all_at_once():
    model, _, whole = refined()
    parted = watched(model, loras_for(model))
    updates, groups = merge(parted.calibration()).updates, parted.groups(2)
    assert [sorted(group) for group in groups] == [["0"], ["2"]] and parted.groups(1) == [{"0", "2"}]
    for modules in groups:
        for task, batch in enumerate(batches()):
            with torch.no_grad(), parted.refinement(task, updates, modules) as run:
                run.attach(model)
                with run.alone():
                    model(batch)
                with run.merged():
                    model(batch)
                run.detach()
    found = parted.calibration().corrections
    for site, correction in whole.corrections.items():
        torch.testing.assert_close(found[site].gram, correction.gram)
        torch.testing.assert_close(found[site].target, correction.target)


def test_there_are_never_more_groups_than_layers_and_each_layer_is_in_one():
    collector = StatisticsCollector(loras_for(mlp()))
    groups = collector.groups(5)
    assert len(groups) == 2 and groups[0] | groups[1] == {"0", "2"}


def test_large_targets_are_kept_in_16_bits_in_memory_and_files_and_merge_to_the_same(tmp_path, monkeypatch):
    _, _, exact = refined()
    monkeypatch.setattr("ssr_core.measure.requirement.MANY", 0)
    model, collector, rounded = refined()
    target = rounded.corrections[Site.whole("2", 8)].targets[0]
    assert target.dtype == torch.bfloat16
    need, kept = collector.requirement(refine=True).host, sum(s.grams.nbytes for s in rounded.statistics.values())
    for correction in rounded.corrections.values():
        kept += correction.grams.nbytes + sum(found.nbytes for found in correction.targets)
    assert need == kept
    save_statistics(rounded, tmp_path / "stats.safetensors")
    again = load_statistics(tmp_path / "stats.safetensors", loras_for(model))
    assert torch.equal(again.corrections[Site.whole("2", 8)].targets[0], target)
    errors = [error(model, loras_for(model), merge(one).updates) for one in (exact, rounded, again)]
    assert errors[1] == errors[2] == pytest.approx(errors[0], rel=0.01)


def test_cases_summed_with_the_weights_of_the_merge_give_the_same_merge(tmp_path):
    model, _, apart = refined()
    collector = watched(model, loras_for(model))
    calibration = collector.calibration()
    weights, updates = task_weights(calibration, MergeSettings()), merge(calibration).updates
    for task, batch in enumerate(batches()):
        with torch.no_grad(), collector.refinement(task, updates, weights=weights) as run:
            run.attach(model)
            with run.alone():
                model(batch)
            with run.merged():
                model(batch)
            run.detach()
    folded = collector.calibration()
    for correction in folded.corrections.values():
        assert correction.is_folded
        assert [target.numel() > 0 for target in correction.targets] == [True, False]
    for one, other in (
        (merge(apart), merge(folded)),
        (merge(apart.reordered((1, 0))), merge(folded.reordered((1, 0)))),
    ):
        for site, update in one.updates.items():
            torch.testing.assert_close(dense(other.updates[site]), dense(update), rtol=1e-4, atol=1e-5)
    save_statistics(folded, tmp_path / "stats.safetensors")
    read = load_statistics(tmp_path / "stats.safetensors", loras_for(model))
    several = [folded, read, folded + apart, apart + folded, (folded + apart).reordered((1, 0))]
    assert all(one.is_folded for calibration in several for one in calibration.corrections.values())
    assert not any(one.is_folded for one in (apart + apart).corrections.values())


def test_the_report_of_a_refined_merge_tells_the_error_before_refinement():
    """On the inputs of the LoRAs alone a correction, which is for others, would seem to make it worse."""
    _, _, calibration = refined()
    with_it, without = merge(calibration).report, merge(replace(calibration, corrections={})).report
    assert [with_it.error(task) for task in (0, 1)] == pytest.approx([without.error(task) for task in (0, 1)])
    assert "before refinement" in str(with_it) and "at least" in str(with_it.summary)
    assert "before refinement" not in str(without) and "keeps at least" not in str(without.summary)
    cut = [
        merge(one, MergeSettings(rank=1)).report.error(0) for one in (calibration, replace(calibration, corrections={}))
    ]
    assert cut[0] == pytest.approx(cut[1], rel=0.2) and cut[0] > with_it.error(0)
