"""Weight calibrations: Grams that stand for what each LoRA reads, from its weights alone."""

import pytest
import torch

from ssr_core import (
    Lora,
    LoraError,
    LowRankUpdate,
    MergeSettings,
    Site,
    StatisticsError,
    find_conflict,
    merge,
    save_statistics,
    weight_calibration,
)
from ssr_core.statistics.weight_calibration import UNREAD
from synthetic import dense, random_update

SITE, CONV = Site.whole("layer", 12), Site.whole("conv", 6)


def lora(name, seed, rank=3, sites=((SITE, 20),), scale=1.0):
    updates = {site: random_update(site.out_features, shape, rank, seed).scaled(scale) for site, shape in sites}
    return Lora(name, updates)


def test_a_gram_is_that_of_inputs_with_the_covariance_of_the_weights_rows():
    one, two = lora("one", 1), lora("two", 2, rank=5)
    calibration = weight_calibration([one, two])
    down = calibration.subspaces[SITE].down.double()
    for task, weight in enumerate(dense(found.updates[SITE]) for found in (one, two)):
        covariance = weight.mT @ weight / weight.square().sum() + UNREAD * torch.eye(20).double() / 20
        torch.testing.assert_close(calibration.statistics[SITE].gram[task], down @ covariance @ down.mT)


def test_more_is_kept_of_loras_that_read_different_directions_than_of_equal_ones():
    basis = torch.linalg.qr(torch.randn(400, 4, generator=torch.Generator().manual_seed(0)))[0].mT
    up = random_update(12, 400, 2, seed=1).up
    one, other = (Lora("x", {SITE: LowRankUpdate(rows, up)}) for rows in basis.split(2))

    def kept_of_one(second):
        merged = dense(merge(weight_calibration([one, second])).updates[SITE])
        alone = dense(one.updates[SITE])
        return float((merged * alone).sum() / alone.square().sum())

    assert kept_of_one(other) > 0.7
    assert kept_of_one(one) == pytest.approx(1, abs=0.02)  # half of each


def test_the_merge_does_not_depend_on_where_a_loras_scale_is_folded_in():
    one, two = lora("one", 1), lora("two", 2)
    update = one.updates[SITE]
    moved = Lora("one", {SITE: LowRankUpdate(update.down * 64, update.up / 64)})
    results = [dense(merge(weight_calibration([first, two])).updates[SITE]) for first in (one, moved)]
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_a_layer_of_one_lora_only_stays_as_it_is_and_convolutions_are_merged_too():
    one = lora("one", 1, sites=((SITE, 20), (CONV, (4, 3, 3))))
    merged = merge(weight_calibration([one, lora("two", 2, sites=((CONV, (4, 3, 3)),))]))
    torch.testing.assert_close(dense(merged.updates[SITE]), dense(one.updates[SITE]), rtol=1e-4, atol=1e-5)
    assert merged.updates[CONV].in_shape == (4, 3, 3)


def test_a_lora_without_effect_and_strengths_are_taken_as_in_any_merge():
    nothing = lora("nothing", 3, scale=0.0)
    merged = merge(weight_calibration([lora("one", 1), nothing]), MergeSettings(strengths=(0.5, 1.0)))
    assert merged.updates[SITE].is_finite()


def test_the_report_says_that_nothing_was_measured_and_nothing_of_few_samples():
    text = str(merge(weight_calibration([lora("one", 1), lora("two", 2)])).report)
    assert "from the weights alone" in text
    assert "on the calibration tokens" not in text and "Never heard together" not in text and "sample" not in text


def test_what_was_not_measured_is_neither_saved_added_nor_reported_on(tmp_path):
    calibration = weight_calibration([lora("one", 1), lora("two", 2)])
    for use in (
        lambda: save_statistics(calibration, tmp_path / "x.safetensors"),
        lambda: calibration + calibration,
        lambda: find_conflict(calibration),
        lambda: find_conflict(calibration.reordered((1, 0))),
    ):
        with pytest.raises(StatisticsError, match="Nothing was measured of"):
            use()
    assert not list(tmp_path.iterdir())


def test_nothing_to_merge_is_refused():
    for loras in ([], [Lora("empty", {})]):
        with pytest.raises(LoraError, match="no LoRA to merge, or none holds"):
            weight_calibration(loras)
