"""split(): LoRAs that add up to their merge, each of them quiet on the prompts of the others."""

import pytest
import torch
from torch import Tensor

from ssr_core import Calibration, Lora, MergeSettings, Rule, SSRError, StatisticsCollector, merge, split
from synthetic import dense_modules, mlp, random, random_lora, relative_error

CASES = ((0,), (1,), (2,), (0, 2), (1, 2), ())  # "2" is a layer without the third
WHOLE = 100  # a rank that no layer has


def loras() -> list[Lora]:
    made = [
        random_lora("cat", mlp(), 3, 1),
        random_lora("dog", mlp(), 2, 2, ["2"]),
        random_lora("sepia", mlp(), 1, 3, ["0"]),
    ]
    return [lora.with_strength(strength) for lora, strength in zip(made, (1.0, 0.7, -0.5), strict=True)]


def batch(case: int) -> Tensor:
    return random(40, 8, seed=case) + random(8, seed=50 + case)


def calibration(context: int = 0, refined: bool = False) -> Calibration:
    model, collector = mlp(), StatisticsCollector(loras())
    with torch.no_grad():
        for number, case in enumerate(CASES[:3] if context else ()):
            with collector.surveying(model, case, context):
                model(batch(number))
        if context:
            collector.see(context)
        for number, case in enumerate(CASES):
            with collector.watching(model, case):
                model(batch(number))
        updates = merge(collector.calibration()).updates
        for number, case in enumerate(CASES if refined else ()):
            with collector.refining(model, case, updates) as run:
                with run.alone():
                    model(batch(number))
                with run.merged():
                    model(batch(number))
    return collector.calibration()


def difference(parts, whole) -> float:
    """Between the sum of the parts and the merge, of the layer where it is largest."""
    total: dict[str, Tensor] = {}
    for part in parts:
        for module, matrix in dense_modules(part.updates).items():
            total[module] = total.get(module, 0) + matrix
    wanted = dense_modules(whole.updates)
    assert total.keys() == wanted.keys()
    return max(relative_error(total[module], wanted[module]) for module in wanted)


@pytest.mark.parametrize("context", [0, 2])
@pytest.mark.parametrize("routing", [1.0, 0.4, 0.0])
def test_parts_as_large_as_their_loras_add_up_to_the_merge(context, routing):
    measured, settings = calibration(context), MergeSettings(routing=routing)
    parts = split(measured, settings).parts
    assert difference(parts, merge(measured, settings)) < 1e-6
    for part, lora in zip(parts, loras(), strict=True):
        assert {site: update.rank for site, update in part.updates.items()} == {
            site: update.rank for site, update in lora.updates.items()
        }


@pytest.mark.parametrize("context", [0, 2])
def test_refined_parts_that_are_not_cut_add_up_to_the_merge(context):
    measured = calibration(context, refined=True)
    whole = MergeSettings(rank=WHOLE, spread=False)  # a merge cuts its corrections to the joint rank, too
    assert difference(split(measured, whole).parts, merge(measured, whole)) < 1e-6


def test_what_a_cut_of_refined_parts_loses_is_told():
    found = split(calibration(2, refined=True))
    kept = [site.energy for part in found.parts for site in part.report.sites]
    assert 0.8 < min(kept) < 1
    assert f"at least {min(kept):.1%}" in str(found)
    assert "Cut to their rank" not in str(split(calibration(2)))


def test_the_paper_s_settings_and_other_strengths_split_as_well():
    measured = calibration()
    for settings in (MergeSettings.PAPER, MergeSettings(strengths=(0.3, 2.0, 1.0))):
        assert difference(split(measured, settings).parts, merge(measured, settings)) < 1e-6


def test_a_part_alone_is_its_lora_on_its_own_prompts_and_adds_less_to_those_of_others():
    measured = calibration(4)
    found = split(measured)
    for task, part in enumerate(found.parts):
        site = next(iter(part.updates))
        seen, space = measured.statistics[site], measured.subspaces[site].scaled(part.report.strengths)
        down, own = space.down.double(), torch.zeros(len(space.up), len(space.down), dtype=torch.float64)
        own[:, space.blocks[task]] = space.up.double()[:, space.blocks[task]]
        written = torch.linalg.lstsq(down.mT, dense_modules({site: part.updates[site]})[site.module].mT).solution.mT
        off, added, before = written - own, 0.0, 0.0
        grams = list(seen.grams)
        for gram, case in zip(grams, measured.cases, strict=True):
            if task not in case.speakers:
                added += float((written @ gram @ written.mT).trace())
                before += float((own @ gram @ own.mT).trace())
        alone = float((off @ grams[task] @ off.mT).trace() / (own @ grams[task] @ own.mT).trace())
        told = next(one for one in part.report.sites if one.site == site)
        assert told.residuals[task].merge / told.residuals[task].base == pytest.approx(alone, rel=1e-4)
        assert sum(told.residuals[c].merge for c in range(len(CASES)) if task not in CASES[c]) == pytest.approx(
            added, rel=1e-4
        )
        assert added < before
        assert found.added(task) < found.added(task, "stack")
        assert found.off_alone(task) < 1


def test_layers_are_dropped_and_stacked_as_the_rules_say():
    measured = calibration(2)
    dropped = split(measured, MergeSettings(rules=(Rule("drop", "0"),)))
    assert {site.module for part in dropped.parts for site in part.updates} == {"2"}
    stacked = split(measured, MergeSettings(rules=(Rule("stack", "all"),)))
    for part, lora in zip(stacked.parts, loras(), strict=True):
        own = dense_modules({site: update.scaled(lora.strength) for site, update in lora.updates.items()})
        for module, matrix in dense_modules(part.updates).items():
            assert relative_error(matrix, own[module]) < 1e-6


def test_a_small_rank_holds_for_each_part():
    for part in split(calibration(2), MergeSettings(rank=1)).parts:
        assert max(update.rank for update in part.updates.values()) <= 2  # what others need less is spread
        assert min(update.rank for update in part.updates.values()) >= 1


def test_one_lora_is_not_split():
    collector = StatisticsCollector(loras()[:1])
    with pytest.raises(SSRError, match="cat is the only LoRA"):
        split(collector.calibration())


def test_it_tells_how_far_it_is():
    told: list[tuple[int, int]] = []
    split(calibration(), on_site=lambda done, total: told.append((done, total)))
    assert told == [(number, 4) for number in range(4)]
