"""Diagnostics: numbers of the report are sums over the tokens, and its text says what to look at."""

import math

import pytest
import torch
from torch import Tensor

from ssr_core import MergeSettings, Report, Residual, Ridge, Site, SiteReport, Subspace, merge, residuals
from synthetic import calibration_at, dense, measure, random, random_update

SITE = Site.whole("blocks.0", 6)


def updates() -> list:
    return [random_update(6, 9, 2, 0), None, random_update(6, 9, 3, 1)]


def tokens(counts: tuple[int, ...] = (40, 50, 60)) -> list[Tensor]:
    return [random(count, 9, seed=task) + task for task, count in enumerate(counts)]


def explicit(x: Tensor, one: Tensor, other: Tensor) -> float:
    """The sum over tokens of the squared distance of two weights' outputs."""
    return float(sum(((one - other) @ token).square().sum() for token in x))


def test_residuals_are_explicit_sums_over_the_tokens():
    strengths = (0.5, 1.0, -2.0)
    space = Subspace.join(updates())
    scaled, router = space.scaled(strengths), random(5, 5, seed=3)
    alone = [torch.zeros(6, 9) if u is None else s * dense(u) for u, s in zip(updates(), strengths, strict=True)]
    merged = scaled.up.double() @ router @ scaled.down.double()
    found = residuals(measure(space, tokens()), scaled, router)
    for x, own, residual in zip(tokens(), alone, found, strict=True):
        assert residual.base == pytest.approx(explicit(x, own.double(), torch.zeros(6, 9)), rel=1e-6)
        assert residual.stack == pytest.approx(explicit(x, own, sum(alone)), rel=1e-6)
        assert residual.merge == pytest.approx(explicit(x, own, merged), rel=1e-6)


def test_residuals_with_context_rows_are_explicit_sums_over_the_tokens():
    joint = Subspace.join(updates())
    space = Subspace(torch.cat([joint.down, random(2, 9, seed=5, dtype=torch.float32)]), joint.up, joint.ranks)
    router = random(5, 7, seed=3)
    merged = space.up.double() @ router @ space.down.double()
    found = residuals(measure(space, tokens()), space, router)
    assert found[0].merge == pytest.approx(explicit(tokens()[0], dense(updates()[0]), merged), rel=1e-9)
    stack = dense(updates()[0]) + dense(updates()[2])
    assert found[2].stack == pytest.approx(explicit(tokens()[2], dense(updates()[2]), stack), rel=1e-9)


@pytest.mark.parametrize(
    "settings",
    [
        MergeSettings(),
        MergeSettings(rank=2),
        MergeSettings(rank=0.7, routing=0.5),
        MergeSettings(strengths=(2.0, 1.0, -0.5)),
        MergeSettings.PAPER,
    ],
    ids=["default", "rank 2", "energy", "strengths", "paper"],
)
def test_the_reported_errors_are_those_of_the_merged_weight_on_the_tokens(settings):
    result = merge(calibration_at(SITE, updates(), tokens()), settings)
    strengths = settings.strengths or (1.0, 1.0, 1.0)
    alone = [
        torch.zeros(6, 9, dtype=torch.float64) if u is None else s * dense(u)
        for u, s in zip(updates(), strengths, strict=True)
    ]
    merged, nothing = dense(result.updates[SITE]), torch.zeros(6, 9, dtype=torch.float64)
    for task, x in enumerate(tokens()):
        if task == 1:
            assert math.isnan(result.report.error(1))
            continue
        base = explicit(x, alone[task], nothing)
        assert result.report.error(task) == pytest.approx(explicit(x, alone[task], merged) / base, rel=1e-4)
        assert result.report.error(task, "stack") == pytest.approx(
            explicit(x, alone[task], sum(alone)) / base, rel=1e-4
        )


def site_report(name: str = "a", tokens: tuple[int, ...] = (40, 50), **given) -> SiteReport:
    both = (Residual(4.0, 2.0, 1.0), Residual(6.0, 3.0, 2.0))
    return SiteReport(Site.whole(name, 6), given.pop("ranks", (2, 3)), 5, tokens, given.pop("residuals", both), **given)


def test_errors_of_several_sites_are_ratios_of_sums():
    other = (Residual(16.0, 8.0, 1.0), Residual(0.0, 0.0, 0.0))
    report = Report(("cat", "dog"), (1.0, 0.5), (site_report(), site_report("b", residuals=other)))
    assert report.error(0) == pytest.approx(2 / 20)
    assert report.error(0, "stack") == pytest.approx(10 / 20)
    assert report.error(1) == pytest.approx(2 / 6)
    assert report.sites[0].error("merge") == pytest.approx(3 / 10)


def test_sites_of_one_lora_are_not_counted_in_the_errors():
    lonely = SiteReport(Site.whole("b", 6), (2, 0), 2)
    report = Report(("cat", "dog"), (1.0, 1.0), (site_report(), lonely))
    assert report.shared == (site_report(),)
    assert report.error(0) == pytest.approx(1 / 4)
    assert "2 sites, 1 of them shared" in str(report)


def test_the_text_has_one_line_per_lora_with_its_numbers():
    lines = Report(("cat", "long name"), (1.0, 0.5), (site_report(),)).details.splitlines()
    assert lines[0].split() == ["plain", "stack", "this", "merge", "strength", "tokens"]
    assert lines[1].split() == ["cat", "0.500", "0.250", "1.00", "40"]
    assert lines[2].split() == ["long", "name", "0.500", "0.333", "0.50", "50"]
    assert lines[4] == "2 LoRAs, 1 sites, 1 of them shared by two or more."
    assert lines[5].startswith("Never heard together: cat and long name.") and len(lines) == 6


def test_an_error_that_cannot_be_known_is_a_dash():
    lonely = SiteReport(Site.whole("b", 6), (2, 0), 2)
    lines = Report(("cat", "dog"), (1.0, 1.0), (lonely,)).details.splitlines()
    assert lines[1].split() == ["cat", "-", "-", "1.00", "0"]


def test_sites_with_fewer_tokens_than_rank_are_named():
    report = Report(("cat", "dog"), (1.0, 1.0), (site_report(), site_report("b", (2, 2)), site_report("c", (2, 3))))
    assert [str(site.site) for site in report.short_of_tokens()] == ["b"]
    assert "1 site saw fewer tokens than their joint rank" in str(report)
    assert "more than the data: b. More steps" in str(report)


def test_sites_that_saw_nothing_are_named_and_not_called_short():
    report = Report(("cat", "dog"), (1.0, 1.0), (site_report(), site_report("b", (0, 0))))
    assert "1 site saw no token and got the sum of the LoRAs: b." in str(report)
    assert "fewer tokens" not in str(report)


def test_sites_worse_than_the_plain_stack_are_named():
    worse = (Residual(4.0, 1.0, 2.0), Residual(6.0, 1.0, 2.0))
    report = Report(("cat", "dog"), (1.0, 1.0), (site_report(), site_report("b", residuals=worse)))
    assert [str(site.site) for site in report.worse_than_stack()] == ["b"]
    assert "1 site fit worse than the plain stack: b." in str(report)


def test_a_merge_that_saw_enough_has_no_remarks():
    assert "saw" not in str(Report(("cat", "dog"), (1.0, 1.0), (site_report(),)))


def test_long_lists_of_sites_are_cut_short():
    sites = tuple(site_report(f"blocks.{index}", (0, 0)) for index in range(5))
    assert "5 sites saw no token and got the sum of the LoRAs: blocks.0, blocks.1, blocks.2, ...." in str(
        Report(("cat", "dog"), (1.0, 1.0), sites)
    )


def test_the_text_says_what_truncation_kept():
    report = Report(("cat", "dog"), (1.0, 1.0), (site_report(energy=0.9), site_report("b", energy=0.8)))
    assert "kept 85.0% of the effect on average, at least 80.0%" in str(report)


def test_notes_of_the_host_end_the_text():
    report = Report(("cat", "dog"), (1.0, 1.0), (site_report(),), ("first",)).with_notes("second", "third")
    assert str(report).splitlines()[-3:] == ["first", "second", "third"]


def test_the_report_of_a_merge_names_unseen_and_short_sites():
    unseen = merge(calibration_at(SITE, updates(), tokens((0, 0, 0)))).report
    short = merge(calibration_at(SITE, updates(), tokens((1, 1, 2)))).report
    assert "1 site saw no token and got the sum of the LoRAs: blocks.0." in str(unseen)
    assert "1 site saw fewer tokens than their joint rank" in str(short)


def test_the_condition_falls_when_the_ridge_rises():
    calibration = calibration_at(SITE, updates(), tokens())
    low, high = (merge(calibration, MergeSettings(ridge=Ridge(relative=r))).report.sites[0] for r in (1e-6, 1.0))
    assert low.condition > high.condition >= 1
