"""Requirement: what is told before is what is taken."""

import pytest
import torch

from flux_sizes import flux
from ssr_core import Lora, LowRankUpdate, Requirement, Site, StatisticsCollector, merge
from synthetic import mlp, random, random_lora


@pytest.mark.parametrize("context", [0, 3])
@pytest.mark.parametrize("refine", [False, True])
@pytest.mark.parametrize(("cases", "unrefined"), [((0, 1), 0), ((0, 1, (0, 1), ()), 0), ((0, 1, (), (0, 1)), 1)])
def test_the_memory_of_statistics_is_told_to_the_byte(context, refine, cases, unrefined):
    model, loras = mlp(), [random_lora("cat", mlp(), 3, 1), random_lora("dog", mlp(), 2, 2)]
    collector = StatisticsCollector(loras, combinations=len(cases) - 2)
    need = collector.requirement(context, refine, unrefined=unrefined)
    batches = [random(40, 8, seed=number) for number in range(len(cases))]
    for task in range(2 if context else 0):
        with torch.no_grad(), collector.surveying(model, task, context):
            model(batches[task])
    collector.see(context)
    for case, batch in zip(cases, batches, strict=True):
        with torch.no_grad(), collector.watching(model, case):
            model(batch)
    updates = merge(collector.calibration()).updates
    for case, batch in zip(cases[: len(cases) - unrefined] if refine else (), batches, strict=False):
        with torch.no_grad(), collector.refining(model, case, updates) as run:
            with run.alone():
                model(batch)
            with run.merged():
                model(batch)
    calibration = collector.calibration()
    kept = sum(seen.grams.nbytes for seen in calibration.statistics.values())
    for correction in calibration.corrections.values():
        kept += correction.grams.nbytes + sum(target.nbytes for target in correction.targets)
    assert need.host == kept


def test_eight_loras_of_rank_128_fit_beside_an_fp8_flux_on_a_card_of_24_gb():
    need = Requirement.of(flux(8, 128), context=128, dtype=torch.bfloat16)
    assert need.device < 7 * 2**30 < (24 - 12 - 3) * 2**30
    assert need.host < 7 * 2**30


def test_large_statistics_are_kept_in_float32():
    few, many = (Requirement.of(flux(8, rank), dtype=torch.bfloat16).host for rank in (16, 128))
    assert many < 32 * few  # of 64 times as many numbers


def test_one_lora_alone_needs_nothing():
    update = LowRankUpdate(torch.zeros(2, 8), torch.zeros(8, 2))
    assert StatisticsCollector([Lora("cat", {Site.whole("0", 8): update})]).requirement() == Requirement(0, 0)
