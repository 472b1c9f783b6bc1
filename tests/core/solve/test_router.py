"""The router: ordinary least squares over all tasks' tokens, with a ridge toward the mean of the LoRAs."""

import pytest
import torch
from torch import Tensor

from ssr_core import LowRankUpdate, Ridge, SolveError, Subspace, normal_equations, route, solve_router
from synthetic import dense, measure, random, random_update, relative_error

NO_RIDGE = Ridge(relative=0.0, scarcity=0.0, floor=0.0, absolute=0.0, prior=False)
ALMOST_NO_RIDGE = Ridge(relative=1e-12, scarcity=0.0, floor=0.0, absolute=0.0, prior=False)


def space(context: int = 0) -> Subspace:
    joint = Subspace.join([random_update(6, 9, 2, 0), random_update(6, 9, 3, 1), random_update(6, 9, 1, 2)])
    rows = random(context, 9, seed=7, dtype=torch.float32)
    return Subspace(torch.cat([joint.down, rows]), joint.up, joint.ranks)


def tokens(counts: tuple[int, ...] = (40, 50, 60), seed: int = 0) -> list[Tensor]:
    """Of every task in another distribution, so that there is something to tell apart."""
    return [random(n, 9, seed=seed + 2 * k) @ random(9, 9, seed=seed + 2 * k + 1) / 3 + k for k, n in enumerate(counts)]


def solved(space: Subspace, x: list[Tensor], ridge: Ridge, weights: tuple[float, ...] | None = None) -> Tensor:
    return solve_router(normal_equations(measure(space, x), space, weights or (1.0,) * len(x), ridge))


def signals(space: Subspace, x: list[Tensor], weights: tuple[float, ...] | None = None) -> tuple[Tensor, Tensor]:
    """(tokens, R) what the router sees and (tokens, rank) what it should answer: the running task's own rows."""
    seen, wanted = [], []
    for task, (inputs, weight) in enumerate(zip(x, weights or (1.0,) * len(x), strict=True)):
        z = inputs @ space.down.double().T * weight**0.5
        own = torch.zeros(len(z), space.rank, dtype=torch.float64)
        own[:, space.blocks[task]] = z[:, space.blocks[task]]
        seen.append(z)
        wanted.append(own)
    return torch.cat(seen), torch.cat(wanted)


@pytest.mark.parametrize("ridge", [NO_RIDGE, ALMOST_NO_RIDGE], ids=["none", "vanishing"])
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.5, 3.0, 0.0), (2.0, 0.0, 0.0)])
@pytest.mark.parametrize("context", [0, 2])
def test_without_a_ridge_the_router_is_dense_least_squares(ridge, weights, context):
    seen, wanted = signals(space(context), tokens(), weights)
    least_squares = torch.linalg.lstsq(seen, wanted, driver="gelsd").solution.T
    torch.testing.assert_close(solved(space(context), tokens(), ridge, weights), least_squares, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(
    "ridge", [Ridge(), Ridge(0.1, 0.0, 0.0, 0.0, False), Ridge(0.0, 0.0, 0.0, 0.3, True), Ridge.PAPER]
)
def test_a_ridge_is_least_squares_with_the_penalties_as_extra_tokens(ridge):
    seen, wanted = signals(space(), tokens())
    penalties = normal_equations(measure(space(), tokens()), space(), (1.0, 1.0, 1.0), ridge).penalties
    prior = torch.eye(6, dtype=torch.float64) / 3 if ridge.prior else torch.zeros(6, 6, dtype=torch.float64)
    extra = penalties.sqrt().diag()
    least_squares = torch.linalg.lstsq(torch.cat([seen, extra]), torch.cat([wanted, extra @ prior.T])).solution.T
    torch.testing.assert_close(solved(space(), tokens(), ridge), least_squares, rtol=1e-8, atol=1e-8)


def test_the_correlation_and_the_guide_are_sums_over_tokens():
    equations = normal_equations(measure(space(2), tokens()), space(2), (1.0, 2.0, 0.5), Ridge())
    seen, wanted = signals(space(2), tokens(), (1.0, 2.0, 0.5))
    torch.testing.assert_close(equations.correlation, seen.T @ seen)
    torch.testing.assert_close(equations.guide, wanted.T @ seen)


def test_the_penalties_are_the_four_parts_of_the_ridge():
    correlation = torch.tensor([1.0, 3.0, 10.0, 0.0, 8.0, 5.0], dtype=torch.float64).diag()
    update = Subspace.join([random_update(6, 9, 2), random_update(6, 9, 2), random_update(6, 9, 2)])
    ridge = Ridge(relative=0.1, scarcity=2.56, floor=0.0, absolute=0.5)  # after 4 levels, 0.01 of each block's mean
    wanted = torch.tensor([0.12 + 10, 0.32 + 10, 1.05 + 10, 0.05 + 10, 0.865 + 10, 0.565 + 10], dtype=torch.float64)
    torch.testing.assert_close(ridge.penalties(correlation, update, 20, 4), wanted)
    floor = Ridge(relative=0.1, scarcity=0.0, floor=0.01, absolute=0.5)
    torch.testing.assert_close(floor.penalties(correlation, update, 20, 4), wanted)


def test_the_factor_is_the_cholesky_factor_of_the_regularized_correlation():
    equations = normal_equations(measure(space(), tokens()), space(), (1.0, 1.0, 1.0), Ridge())
    assert torch.equal(equations.factor, equations.factor.tril())
    torch.testing.assert_close(
        equations.factor @ equations.factor.T, equations.correlation + equations.penalties.diag()
    )


def test_the_condition_is_that_of_the_matrix_scaled_to_a_unit_diagonal():
    equations = normal_equations(measure(space(), tokens()), space(), (1.0, 1.0, 1.0), Ridge())
    matrix = equations.correlation + equations.penalties.diag()
    scale = matrix.diagonal().rsqrt()
    assert equations.condition == pytest.approx(float(torch.linalg.cond(scale[:, None] * matrix * scale)), rel=1e-8)


@pytest.mark.parametrize("prior", [True, False])
@pytest.mark.parametrize("scales", [(1e3, 1.0, 1e-3), (1e-4, 1e-4, 1e-4), (1.0, 1e5, 1.0)], ids=str)
def test_it_does_not_matter_where_scale_was_folded(prior, scales):
    updates = [space().task(k) for k in range(3)]
    folded = [LowRankUpdate(u.down * c, u.up / c) for u, c in zip(updates, scales, strict=True)]
    one, other = Subspace.join(updates), Subspace.join(folded)
    ridge = Ridge(prior=prior)
    merged = dense(route(one, solved(one, tokens(), ridge)))
    refolded = dense(route(other, solved(other, tokens(), ridge)))
    assert relative_error(refolded, merged) < 1e-5  # float32 factors


def test_an_absolute_ridge_does_depend_on_where_scale_was_folded():
    updates = [space().task(k) for k in range(3)]
    folded = Subspace.join([LowRankUpdate(u.down / 100, u.up * 100) for u in updates])
    merged = dense(route(space(), solved(space(), tokens(), Ridge.PAPER)))
    assert relative_error(dense(route(folded, solved(folded, tokens(), Ridge.PAPER))), merged) > 1e-3


@pytest.mark.parametrize("context", [0, 2])
def test_without_data_the_prior_is_the_mean_of_the_loras(context):
    router = solved(space(context), [x[:0] for x in tokens()], Ridge())
    torch.testing.assert_close(router, torch.eye(6, 6 + context, dtype=torch.float64) / 3)


def test_the_mean_counts_only_loras_that_are_at_the_site():
    partial = Subspace.join([random_update(6, 9, 2), None, random_update(6, 9, 3), None])
    router = solved(partial, [random(0, 9)] * 4, Ridge())
    torch.testing.assert_close(router, torch.eye(5, dtype=torch.float64) / 2)


def test_a_task_that_saw_nothing_keeps_its_prior_where_no_data_reach_it():
    # cat reads the first inputs, dog the last ones; only cat's inputs ever carry anything
    cat, dog = random_update(6, 9, 2, 0), random_update(6, 9, 2, 1)
    cat.down[:, 5:] = 0
    dog.down[:, :5] = 0
    x = tokens()[0] * torch.tensor([1.0] * 5 + [0.0] * 4)
    router = solved(Subspace.join([cat, dog]), [x, x[:0]], Ridge())
    torch.testing.assert_close(router[2:, 2:], torch.eye(2, dtype=torch.float64) / 2)
    assert not router[:2, 2:].any()
    assert not router[2:, :2].any()


@pytest.mark.parametrize("relative", [1e-2, 1.0, 100.0])
def test_a_lora_alone_is_left_exactly_as_it_is(relative):
    alone = Subspace.join([random_update(6, 9, 4, 0)])
    router = solved(alone, tokens()[:1], Ridge(relative=relative))
    torch.testing.assert_close(router, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("copies", [2, 3])
@pytest.mark.parametrize("relative", [1e-2, 1.0])
def test_copies_of_one_lora_merge_into_that_lora(copies, relative):
    update = random_update(6, 9, 3, 0)
    joint = Subspace.join([update] * copies)
    merged = route(joint, solved(joint, tokens()[:copies], Ridge(relative=relative)))
    assert relative_error(dense(merged), dense(update)) < 1e-6


def test_loras_that_never_meet_are_both_kept():
    # each reads inputs of its own, and each task only carries its own inputs
    cat, dog = random_update(6, 9, 2, 0), random_update(6, 9, 2, 1)
    cat.down[:, 5:] = 0
    dog.down[:, :5] = 0
    own = torch.tensor([1.0] * 5 + [0.0] * 4, dtype=torch.float64)
    joint = Subspace.join([cat, dog])
    router = solved(joint, [tokens()[0] * own, tokens()[1] * (1 - own)], ALMOST_NO_RIDGE)
    torch.testing.assert_close(router, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-9)


def test_a_site_with_an_absent_task_learns_to_leave_its_tokens_alone():
    partial = Subspace.join([random_update(6, 9, 2, 0), None, random_update(6, 9, 1, 2)])
    seen, wanted = signals(partial, tokens())
    assert not wanted[40:90].any()
    least_squares = torch.linalg.lstsq(seen, wanted).solution.T
    torch.testing.assert_close(solved(partial, tokens(), NO_RIDGE), least_squares, rtol=1e-8, atol=1e-8)


def test_scaling_all_weights_changes_nothing():
    one, other = (
        solved(space(), tokens(), Ridge(scarcity=0.0, floor=0.0), w) for w in ((1.0, 2.0, 3.0), (10.0, 20.0, 30.0))
    )
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_a_weight_of_two_counts_like_seeing_the_tokens_twice():
    x = tokens()
    twice = solved(space(), [x[0], torch.cat([x[1], x[1]]), x[2]], Ridge(scarcity=0.0))
    torch.testing.assert_close(solved(space(), x, Ridge(scarcity=0.0), (1.0, 2.0, 1.0)), twice, rtol=1e-10, atol=1e-10)


def test_strength_in_up_scales_the_routed_update_of_its_task():
    router = solved(space(), tokens(), Ridge())
    strengths = (0.5, -1.0, 2.0)
    parts = [
        dense(LowRankUpdate(router[block] @ space().down.double(), space().up[:, block])) for block in space().blocks
    ]
    wanted = sum(s * part for s, part in zip(strengths, parts, strict=True))
    torch.testing.assert_close(dense(route(space().scaled(strengths), router)), wanted, rtol=1e-6, atol=1e-6)


def squared_error(space: Subspace, x: list[Tensor], router: Tensor) -> float:
    """Of the outputs, over all tokens: each task should behave as its LoRA alone."""
    seen, wanted = signals(space, x)
    return float(((seen @ router.T - wanted) @ space.up.double().T).square().sum())


@pytest.mark.parametrize("seed", range(5))
def test_context_rows_never_make_the_fit_worse_and_do_help(seed):
    x = tokens(seed=10 * seed)
    narrow, wide = space(), space(context=2)
    routers = solved(narrow, x, NO_RIDGE), solved(wide, x, NO_RIDGE)
    assert routers[1].shape == (6, 8)
    assert squared_error(wide, x, routers[1]) < squared_error(narrow, x, routers[0])


def test_the_merged_update_reads_the_context_rows():
    wide = space(context=2)
    router = solved(wide, tokens(), Ridge())
    merged = route(wide, router)
    assert (merged.rank, merged.up.shape) == (8, (6, 8))
    x = tokens()[0]
    wanted = x @ wide.down.double().T @ router.T @ wide.up.double().T
    torch.testing.assert_close(x @ dense(merged).T, wanted)
    assert router[:, 6:].abs().max() > 1e-2


@pytest.mark.parametrize("seed", range(20))
def test_fewer_tokens_than_the_joint_rank_without_a_ridge_is_an_error_with_numbers_and_remedy(seed):
    x = tokens((1, 2, 1), seed)
    equations = normal_equations(measure(space(), x), space(), (1.0, 1.0, 1.0), NO_RIDGE, "blocks.0[4:8]")
    with pytest.raises(SolveError, match=r"blocks\.0\[4:8\] saw 4 tokens.*joint rank of 6.*singular.*Raise the ridge"):
        solve_router(equations)


def test_copies_of_one_lora_without_a_ridge_are_an_error():
    update = random_update(6, 9, 3, 0)
    joint = Subspace.join([update, update])
    with pytest.raises(SolveError, match="singular"):
        solved(joint, tokens()[:2], NO_RIDGE)


def test_no_tokens_without_a_ridge_is_an_error():
    with pytest.raises(SolveError, match="saw 0 tokens"):
        solved(space(), [x[:0] for x in tokens()], NO_RIDGE)


def test_rows_of_very_different_size_do_not_make_the_equations_singular():
    wild = space()
    wild.down.mul_(torch.tensor([1e-6, 1.0, 1e6, 1e-3, 1.0, 1e3])[:, None])
    seen, wanted = signals(wild, tokens())
    scale = seen.norm(dim=0)
    least_squares = torch.linalg.lstsq(seen / scale, wanted / scale).solution.T  # in units of the rows
    router = solved(wild, tokens(), NO_RIDGE) * scale / scale[:, None]
    torch.testing.assert_close(router, least_squares, rtol=1e-7, atol=1e-7)
