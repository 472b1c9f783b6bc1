"""Truncation: the best update of a given rank on the tokens, not on the weights."""

import pytest
import torch
from torch import Tensor

from ssr_core import LowRankUpdate, truncate
from ssr_core.solve.rank import isotropic_factor, spread_ranks
from synthetic import dense, random, random_update


def inputs(count: int = 200) -> Tensor:
    """Tokens that use some directions far more than others."""
    return random(count, 9) * torch.logspace(1, -2, 9, dtype=torch.float64) @ random(9, 9, seed=1)


def factor_of(update: LowRankUpdate, x: Tensor) -> Tensor:
    z = x @ dense_down(update).T
    return torch.linalg.cholesky(z.T @ z)


def dense_down(update: LowRankUpdate) -> Tensor:
    return update.down.double().flatten(1)


def lost(update: LowRankUpdate, smaller: LowRankUpdate, x: Tensor) -> float:
    return float((x @ (dense(update) - dense(smaller)).T).square().sum())


def best_loss(matrix: Tensor, x: Tensor, rank: int) -> float:
    """What the truncated SVD of the matrix, whitened by the inputs' covariance, loses: the optimum (Eckart-Young)."""
    whitened = matrix @ torch.linalg.cholesky(x.T @ x)
    return float(torch.linalg.svdvals(whitened)[rank:].square().sum())


def plain_svd(matrix: Tensor, rank: int) -> LowRankUpdate:
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    return LowRankUpdate(s[:rank, None] * v[:rank], u[:, :rank])


@pytest.mark.parametrize("rank", range(1, 6))
def test_truncation_is_the_best_approximation_of_its_rank_on_the_tokens(rank):
    update, x = random_update(7, 9, 6), inputs()
    smaller, _ = truncate(update, factor_of(update, x), rank)
    assert smaller.rank == rank
    optimum, whole = best_loss(dense(update), x, rank), float((x @ dense(update).T).square().sum())
    assert lost(update, smaller, x) == pytest.approx(optimum, rel=1e-6, abs=1e-12 * whole)


@pytest.mark.parametrize("rank", range(1, 6))
def test_truncation_loses_less_on_the_tokens_than_the_svd_of_the_weight(rank):
    update, x = random_update(7, 9, 6), inputs()
    smaller, _ = truncate(update, factor_of(update, x), rank)
    assert lost(update, smaller, x) < 0.9 * lost(update, plain_svd(dense(update), rank), x)


def test_the_truncated_update_is_the_whitened_svd_itself():
    update, x = random_update(7, 9, 6), inputs()
    smaller, _ = truncate(update, factor_of(update, x), 3)
    whitener = torch.linalg.cholesky(x.T @ x)
    wanted = dense(plain_svd(dense(update) @ whitener, 3)) @ torch.linalg.inv(whitener)
    # only what the tokens can see is determined; here they span the whole input space
    torch.testing.assert_close(dense(smaller), wanted, rtol=1e-5, atol=1e-5)


def test_full_rank_loses_nothing():
    update, x = random_update(7, 9, 6), inputs()
    smaller, truncation = truncate(update, factor_of(update, x), 6)
    torch.testing.assert_close(dense(smaller), dense(update), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(truncation.projection, torch.eye(6, dtype=torch.float64), rtol=1e-8, atol=1e-8)
    assert truncation.energy == pytest.approx(1.0)


def test_a_rank_above_the_updates_own_changes_nothing():
    update, x = random_update(7, 9, 4), inputs()
    smaller, _ = truncate(update, factor_of(update, x), 64)
    assert smaller.rank == 4
    torch.testing.assert_close(dense(smaller), dense(update), rtol=1e-9, atol=1e-9)


def test_the_rank_never_exceeds_the_rows_and_columns_of_the_weight():
    update = random_update(3, 9, 6)
    smaller, truncation = truncate(update, factor_of(update, inputs()), 5)
    assert smaller.rank == 3
    assert truncation.energy == pytest.approx(1.0)
    torch.testing.assert_close(dense(smaller), dense(update), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("share", [0.05, 0.3, 0.6, 0.9, 0.99, 0.9999])
def test_an_energy_request_keeps_the_share_with_the_fewest_directions(share):
    update, x = random_update(7, 9, 6), inputs()
    smaller, truncation = truncate(update, factor_of(update, x), share)
    whole = float((x @ dense(update).T).square().sum())
    assert truncation.energy >= share
    assert truncation.energy == pytest.approx(1 - lost(update, smaller, x) / whole, abs=1e-9)
    assert 1 - best_loss(dense(update), x, smaller.rank - 1) / whole < share


def test_the_projection_takes_the_joint_signal_to_the_smaller_update():
    update, x = random_update(7, 9, 6), inputs()
    smaller, truncation = truncate(update, factor_of(update, x), 2)
    wanted = update.up.double() @ truncation.projection @ dense_down(update)
    torch.testing.assert_close(dense(smaller), wanted)
    torch.testing.assert_close(truncation.projection @ truncation.projection, truncation.projection)


def test_factors_of_the_truncated_update_have_equal_norms():
    update = random_update(7, 9, 6)
    smaller, _ = truncate(update, factor_of(update, inputs()), 3)
    torch.testing.assert_close(smaller.down.norm(dim=1), smaller.up.norm(dim=0))


@pytest.mark.parametrize("rank", [1, 4, 0.5, 0.99])
def test_an_isotropic_factor_gives_the_svd_of_the_weight(rank):
    update = random_update(7, (3, 3), 5)
    smaller, truncation = truncate(update, isotropic_factor(update), rank)
    wanted = plain_svd(dense(update), smaller.rank)
    assert smaller.in_shape == (3, 3)
    torch.testing.assert_close(dense(smaller), dense(wanted), rtol=1e-6, atol=1e-6)
    kept = dense(wanted).square().sum() / dense(update).square().sum()
    assert truncation.energy == pytest.approx(float(kept), rel=1e-9)


def test_an_isotropic_factor_copes_with_repeated_directions():
    update = random_update(7, 9, 3)
    doubled = LowRankUpdate(torch.cat([update.down, update.down]), torch.cat([update.up, update.up], dim=1))
    smaller, truncation = truncate(doubled, isotropic_factor(doubled), 3)
    assert truncation.energy == pytest.approx(1.0)
    torch.testing.assert_close(dense(smaller), 2 * dense(update), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("silent", ["up", "down", "both"])
@pytest.mark.parametrize("rank", [1, 3, 0.9])
@pytest.mark.parametrize("metric", ["isotropic", "tokens"])
def test_an_update_of_zeros_stays_one_in_float32(silent, rank, metric):
    update = random_update(7, 9, 3)
    factor = torch.eye(3, dtype=torch.float64) if metric == "tokens" else None
    if silent != "down":
        update.up.zero_()
    if silent != "up":
        update.down.zero_()
    smaller, truncation = truncate(update, isotropic_factor(update) if factor is None else factor, rank)
    stored = LowRankUpdate(smaller.down.float(), smaller.up.float())
    assert smaller.rank >= 1
    assert stored.is_finite()
    assert not dense(stored).any()
    assert 0 <= truncation.energy <= 1


def test_spread_ranks_take_the_directions_that_matter_for_their_size():
    spectra = {"flat": [0.3, 0.3, 0.2, 0.2], "steep": [0.97, 0.01, 0.01, 0.01]}
    assert spread_ranks(spectra, {"flat": 10, "steep": 10}, 2) == {"flat": 3, "steep": 1}
    assert spread_ranks(spectra, {"flat": 10, "steep": 10}, 9) == {"flat": 4, "steep": 4}
    assert spread_ranks(spectra, {"flat": 1000, "steep": 10}, 1) == {"flat": 1, "steep": 1}


def test_spread_ranks_never_take_more_parameters_than_the_same_rank_everywhere():
    spectra = {
        name: sorted(torch.rand(12, generator=torch.Generator().manual_seed(name)).tolist())[::-1] for name in range(9)
    }
    costs = {name: 10 + 7 * name for name in spectra}
    for rank in range(1, 8):
        ranks = spread_ranks(spectra, costs, rank)
        assert sum(ranks[n] * costs[n] for n in spectra) <= rank * sum(costs.values())
        assert min(ranks.values()) >= 1
