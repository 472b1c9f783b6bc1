"""Grams: half a matrix per task is all of it."""

import pytest
import torch

from ssr_core.statistics.grams import Grams, pack, unpack
from synthetic import random


def symmetric(size: int, seed: int = 0) -> torch.Tensor:
    z = random(20, size, seed=seed)
    return z.mT @ z


@pytest.mark.parametrize("size", [1, 2, 7])
def test_a_packed_matrix_is_unpacked_bit_for_bit(size):
    matrix = symmetric(size)
    assert len(pack(matrix)) == size * (size + 1) // 2
    assert torch.equal(unpack(pack(matrix), size), matrix.triu() + matrix.triu(1).mT)


def test_a_task_that_saw_nothing_takes_no_memory_and_is_zeros():
    grams = Grams.zeros(3, 4).replaced(1, pack(symmetric(4)))
    assert grams.nbytes == 8 * 10
    assert not grams.dense()[[0, 2]].any()
    assert torch.equal(grams.dense()[1], unpack(grams.packed[1], 4))


def test_sums_are_those_of_the_matrices_whoever_was_absent():
    one = Grams.zeros(3, 5).replaced(0, pack(symmetric(5))).replaced(1, pack(symmetric(5, 1)))
    other = Grams.zeros(3, 5).replaced(1, pack(symmetric(5, 2)))
    assert torch.equal((one + other).dense(), one.dense() + other.dense())
    assert (one + other).nbytes == one.nbytes


def test_rows_and_tasks_are_chosen_as_from_the_matrices():
    grams = Grams.of(torch.stack([symmetric(6, seed) for seed in range(3)]))
    rows = torch.tensor([0, 2, 5])
    assert torch.equal(grams.chosen([2, 0], rows).dense(), grams.dense()[[2, 0]][:, rows][:, :, rows])


def test_float32_takes_half_the_memory_and_is_computed_with_in_float64():
    exact = Grams.of(symmetric(6)[None])
    narrow = Grams.zeros(1, 6).replaced(0, exact.packed[0].float())
    assert 2 * narrow.nbytes == exact.nbytes
    assert narrow.dense().dtype == torch.float64
    torch.testing.assert_close(narrow.dense(), exact.dense(), rtol=1e-7, atol=1e-6)
