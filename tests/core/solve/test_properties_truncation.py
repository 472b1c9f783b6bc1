"""Truncation is the best there is on the activations, against dense answers and against random others."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from ssr_core import (
    Lora,
    LowRankUpdate,
    MergeSettings,
    Site,
    StatisticsCollector,
    merge,
    normal_equations,
    solve_router,
    truncate,
)
from ssr_core.solve.diagnostics import effects
from strategies import dimensions, problems, seeds
from synthetic import dense, random, random_update


@st.composite
def metrics(draw: st.DrawFn) -> tuple[LowRankUpdate, torch.Tensor]:
    """An update with rows that may depend on each other, and L of the Gram of what its `down` sees."""
    update = random_update(draw(dimensions()), draw(dimensions()), draw(st.integers(1, 8)), draw(seeds()))
    z = random(draw(st.integers(1, 30)), draw(dimensions()), seed=draw(seeds()))
    z = z @ random(z.shape[1], update.rank, seed=draw(seeds()))
    gram = z.T @ z
    return update, torch.linalg.cholesky(gram + 1e-3 * gram.diagonal().mean() * torch.eye(update.rank).double())


@given(metrics(), st.integers(1, 9))
def test_no_projection_of_its_rank_loses_less_on_the_activations(made, rank):
    update, factor = made
    up = update.up.double()
    smaller, found = truncate(update, factor, rank)
    values = torch.linalg.svdvals(up @ factor)
    most = min(rank, update.out_features, update.down[0].numel())
    lost = float((up @ (torch.eye(update.rank).double() - found.projection) @ factor).square().sum())
    best = float(values[most:].square().sum())
    assert smaller.rank <= max(1, most)
    assert abs(lost - best) <= 1e-9 * float(values.square().sum())
    assert abs(found.energy - (1 - best / float(values.square().sum()))) < 1e-9


@given(metrics(), st.floats(0.01, 0.999))
def test_a_share_of_energy_is_kept_with_as_few_directions_as_will_do(made, share):
    update, factor = made
    smaller, found = truncate(update, factor, share)
    values = torch.linalg.svdvals(update.up.double() @ factor).square()
    most = min(update.out_features, update.down[0].numel())
    shares = values.cumsum(0) / values.sum()
    assert found.energy >= min(share, float(shares[:most][-1])) - 1e-9
    if smaller.rank > 1:
        assert float(shares[smaller.rank - 2]) < share


@given(problems(least=2), st.integers(1, 30))
def test_a_rank_as_large_as_the_joint_one_loses_nothing(problem, more):
    joint = sum(update.rank for update in problem.updates if update is not None)
    whole, cut = problem.merged(), problem.merged(rank=joint + more)
    largest = max(dense(u).norm() for u in problem.updates if u is not None)
    assert float((whole - cut).norm() / largest.clamp_min(1e-9)) < 1e-4


@given(st.integers(2, 4), st.integers(1, 5), st.integers(1, 16), seeds())
def test_a_layer_with_fewer_inputs_than_the_signal_has_rows_loses_nothing_by_that(count, inputs, rows, seed):
    """Such as the first layer of a model: 64 inputs, and the ranks of all LoRAs with their context rows."""
    model = torch.nn.ModuleDict({"layer": torch.nn.Linear(inputs, 9)}).double()
    loras = [Lora(str(k), {Site.whole("layer", 9): random_update(9, inputs, 4, seed + k)}) for k in range(count)]
    collector = StatisticsCollector(loras)
    for see in (collector.surveying, collector.watching):
        for task in range(count):
            with torch.no_grad(), see(model, task):
                model["layer"](random(30, inputs, seed=seed + task) + task)
        if see == collector.surveying:
            collector.see(rows)
    calibration = collector.calibration()
    (space,), (statistics,) = calibration.subspaces.values(), calibration.statistics.values()
    weights = [1 / effect for effect in effects(statistics, space)]
    router = solve_router(normal_equations(statistics, space, weights, MergeSettings().ridge))
    whole = space.up.double() @ router @ space.down.double()
    (found,) = merge(calibration).updates.values()
    assert found.rank <= inputs
    assert float((dense(found) - whole).norm() / whole.norm()) < 1e-5
