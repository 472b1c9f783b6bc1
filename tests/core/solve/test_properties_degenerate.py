"""Whatever the sizes, a merge is finite: one token or none, LoRAs of zeros, twins, ranks above those of the layer."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ssr_core import LowRankUpdate, MergeSettings, SolveError, merge
from strategies import Problem, problems
from synthetic import dense

settings = st.builds(
    MergeSettings,
    rank=st.sampled_from((0, 0, 1, 3, 100, 0.5, 0.99)),
    routing=st.sampled_from((0.0, 0.5, 1.0)),
    spread=st.booleans(),
    balanced=st.booleans(),
    count_absent=st.booleans(),
)


@given(problems(), settings)
def test_every_merge_is_finite_and_its_report_can_be_read(problem, chosen):
    merged = merge(problem.calibration(), chosen)
    for update in merged.updates.values():
        assert update.is_finite() and update.rank >= 1
    assert str(merged.report)


@given(problems())
def test_nothing_is_kept_worse_than_leaving_it_out_and_shares_are_shares(problem):
    for site in merge(problem.calibration()).report.sites:
        for residual in site.residuals:
            assert all(math.isfinite(value) and value >= -1e-6 for value in (residual.base, residual.stack))


@given(problems(least=2, most=3), st.integers(2, 4))
def test_the_same_lora_several_times_is_that_lora_at_its_mean_times_their_strengths(problem, count):
    """On tokens of all of them alike: nothing tells them apart, so what each wants is what the merge writes."""
    update = next(u for u in problem.updates if u is not None)
    x = torch.cat(problem.tokens)
    twins = type(problem)((update,) * count, (x,) * count)
    found, alone = twins.merged(), dense(update)
    written, wanted = x @ found.T, x @ alone.T
    if len(x) and float(wanted.norm()) > 0:
        # shrunk or not, it is the one LoRA that is written, and not their sum
        assert float((written - wanted).norm() / wanted.norm()) < 0.5


@given(problems(least=2))
def test_a_lora_of_zeros_writes_nothing_and_harms_nobody(problem):
    silent = [u and LowRankUpdate(u.down, torch.zeros_like(u.up)) for u in problem.updates]
    assert float(problem.with_updates(silent).merged().abs().max()) == 0


sizes = st.sampled_from((0.0, 1e-45, 1e-20, 1.0, 1e20, 3e38))


@given(problems(least=2), st.lists(sizes, min_size=4, max_size=4), st.floats(-10, 10), settings)
def test_values_at_the_ends_of_float32_give_a_finite_merge_or_an_error_that_names_the_layer(
    problem, magnitudes, strength, chosen
):
    extreme = [u and _as_large(u, m) for u, m in zip(problem.updates, magnitudes, strict=False)]
    chosen = replace(chosen, strengths=(strength,) * len(extreme))
    try:
        merged = merge(problem.with_updates(extreme).calibration(), chosen)
    except SolveError as error:
        assert "layer" in str(error) and "float32" in str(error)
        return
    assert all(update.is_finite() for update in merged.updates.values())
    assert str(merged.report)


def _as_large(update: LowRankUpdate, size: float) -> LowRankUpdate:
    return LowRankUpdate(update.down, (update.up.double() / update.up.abs().max().clamp_min(1e-9) * size).float())


def test_a_merge_that_does_not_fit_into_float32_is_an_error_that_names_the_layer():
    update = LowRankUpdate(torch.ones(1, 2), torch.full((2, 1), 3e38))
    problem = Problem((update, update), (torch.ones(3, 2).double(), torch.ones(3, 2).double()))
    with pytest.raises(SolveError, match=r"layer: the merged values do not fit into float32\. Lower the strengths"):
        merge(problem.calibration(), MergeSettings(strengths=(10.0, 10.0)))
