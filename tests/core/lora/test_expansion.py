"""Expansions against the dense updates they stand for."""

import pytest
import torch

from ssr_core import hadamard, kronecker, nearest
from ssr_core.lora.expansion import EXACT
from synthetic import random


def error(update, dense):
    return float((update.dense() - dense).norm() / dense.norm())


def of_rank(rank, out, inputs, seed=0):
    return random(out, rank, seed=seed, dtype=torch.float32) @ random(rank, inputs, seed=seed + 1, dtype=torch.float32)


@pytest.mark.parametrize("in_shape", [(12,), (4, 3), (3, 2, 2), (2, 3, 2, 1)])
def test_a_difference_of_low_rank_is_kept_whole_at_its_own_rank(in_shape):
    dense = of_rank(3, 20, torch.Size(in_shape).numel()).reshape(20, *in_shape)
    found = nearest(dense)
    assert (found.update.rank, found.update.in_shape) == (3, in_shape)
    assert found.kept == pytest.approx(1) and error(found.update, dense) < 1e-5


def test_the_nearest_update_leaves_out_the_smallest_singular_values_and_says_how_much_it_keeps():
    dense = random(16, 10, seed=5, dtype=torch.float32)
    values = torch.linalg.svdvals(dense)
    found = nearest(dense, 4)
    assert found.kept == pytest.approx(float(values[:4].square().sum() / values.square().sum()), abs=1e-5)
    assert error(found.update, dense) ** 2 == pytest.approx(1 - found.kept, abs=1e-5)


def test_a_large_difference_is_decomposed_by_projections_as_well_and_the_same_each_time():
    dense = of_rank(6, EXACT + 80, EXACT + 60) + 1e-3 * random(EXACT + 80, EXACT + 60, seed=9, dtype=torch.float32)
    state = torch.random.get_rng_state()
    first, second = nearest(dense, 6), nearest(dense, 6)
    assert first.kept > 1 - 1e-5 and error(first.update, dense) < 3e-3
    assert torch.equal(first.update.up, second.update.up)
    assert torch.equal(state, torch.random.get_rng_state())


def test_no_difference_at_all_is_an_update_of_zero():
    found = nearest(torch.zeros(4, 3, 2))
    assert (found.update.rank, found.kept) == (1, 1.0)
    assert not found.update.dense().any()


@pytest.mark.parametrize("kernel", [(), (3, 3)])
def test_a_kronecker_product_is_exact_at_the_product_of_the_ranks(kernel):
    left = of_rank(2, 4, 5)
    right = of_rank(3, 6, 7 * torch.Size(kernel).numel(), seed=2).reshape(6, 7, *kernel)
    found = kronecker(left, right)
    dense = torch.kron(left, right.flatten(1)).reshape(24, 35, *kernel)
    assert (found.update.rank, found.update.in_shape) == (6, (35, *kernel))
    assert found.kept == pytest.approx(1) and error(found.update, dense) < 1e-5


def test_a_kronecker_product_of_too_high_a_rank_is_cut_where_an_svd_of_it_would_be():
    left, right = random(4, 4, seed=1, dtype=torch.float32), random(6, 5, seed=2, dtype=torch.float32)
    found, whole = kronecker(left, right, 7), nearest(torch.kron(left, right), 7)
    assert torch.allclose(found.update.dense(), whole.update.dense(), atol=1e-4)
    assert found.kept == pytest.approx(whole.kept, abs=1e-5) and found.kept < 1


def test_a_product_of_two_low_rank_matrices_is_exact_at_the_product_of_the_ranks():
    pairs = [(random(9, r, seed=r, dtype=torch.float32), random(r, 7, seed=9 + r, dtype=torch.float32)) for r in (2, 3)]
    dense = (pairs[0][0] @ pairs[0][1]) * (pairs[1][0] @ pairs[1][1])
    exact, cut = hadamard(*pairs), hadamard(*pairs, rank=4)
    assert (exact.update.rank, exact.kept) == (6, 1.0) and error(exact.update, dense) < 1e-5
    assert cut.update.rank == 4 and error(cut.update, dense) ** 2 == pytest.approx(1 - cut.kept, abs=1e-5)


def test_a_product_with_zero_is_zero():
    found = kronecker(torch.zeros(2, 2), random(3, 3, dtype=torch.float32))
    assert not found.update.dense().any() and found.kept == 1.0
