"""Sketch: one pass in bounded memory finds the directions in which a layer's inputs vary most."""

import pytest
import torch
from torch import Tensor

from ssr_core.measure.sketch import OVERSAMPLING, Sketch, principal_rows, test_matrix
from synthetic import random

test_matrix.__test__ = False  # no test, whatever its name


def inputs(count: int = 400, width: int = 60, decay: float = 3.0) -> Tensor:
    """Tokens whose variance falls by `decay` decades over the width, along random directions."""
    rotation = torch.linalg.qr(random(width, width, seed=1))[0]
    return random(count, width) * torch.logspace(0, -decay / 2, width, dtype=torch.float64) @ rotation


def sketched(x: Tensor, rank: int, pieces: int = 1) -> Tensor:
    sketch = Sketch(rank)
    for piece in x.chunk(pieces):
        sketch.update(piece)
    return sketch.mean()


def leading(x: Tensor, rank: int) -> Tensor:
    return torch.linalg.svd(x, full_matrices=False)[2][:rank]


def captured(x: Tensor, rows: Tensor) -> float:
    return float((x @ rows.double().T).square().sum() / x.square().sum())


@pytest.mark.parametrize("rank", [1, 4, 16])
def test_the_rows_catch_nearly_what_the_best_rows_would(rank):
    x = inputs()
    rows = principal_rows(sketched(x, rank), rank)
    assert rows.shape == (rank, 60)
    assert captured(x, rows) > 0.9 * captured(x, leading(x, rank))


def test_inputs_of_few_directions_are_caught_whole():
    x = random(50, 5) @ random(5, 60, seed=1)
    assert captured(x, principal_rows(sketched(x, 8), 8)[:5]) > 1 - 1e-6


@pytest.mark.parametrize("width", [3, 8, 20, 60])
def test_rows_are_orthonormal_and_no_more_than_there_are_inputs(width):
    rows = principal_rows(sketched(inputs(width=width), 20), 20)
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows @ rows.T, torch.eye(min(20, width)), rtol=1e-5, atol=1e-5)


def test_a_sketch_wide_enough_for_all_inputs_gives_the_exact_directions():
    x = inputs(width=12)
    rows, exact = principal_rows(sketched(x, 12), 12)[:6].double(), leading(x, 6)
    torch.testing.assert_close((rows * exact).sum(dim=1).abs(), torch.ones(6, dtype=torch.float64))


def test_pieces_of_the_tokens_give_the_sketch_of_all():
    torch.testing.assert_close(sketched(inputs(), 8, pieces=7), sketched(inputs(), 8))


def test_a_sketch_is_the_mean_of_the_outer_products_seen_through_the_test_matrix():
    x = inputs()
    torch.testing.assert_close(sketched(x, 8), x.T @ x @ test_matrix(60, 8 + OVERSAMPLING).double() / len(x))


def test_the_test_matrix_is_the_same_at_every_call_so_that_sketches_add_up():
    test_matrix.cache_clear()
    first = test_matrix(60, 24)
    test_matrix.cache_clear()
    assert torch.equal(test_matrix(60, 24), first)
    assert (first.shape, test_matrix(9, 24).shape) == ((60, 24), (9, 9))


def test_the_random_numbers_of_others_are_left_alone():
    test_matrix.cache_clear()
    torch.manual_seed(5)
    wanted = torch.rand(1)
    torch.manual_seed(5)
    test_matrix(60, 8)
    assert torch.equal(torch.rand(1), wanted)


def test_a_layer_that_saw_only_zeros_still_has_rows():
    rows = principal_rows(sketched(torch.zeros(9, 60), 4), 4)
    assert torch.isfinite(rows).all()
    torch.testing.assert_close(rows @ rows.T, torch.eye(4), rtol=1e-5, atol=1e-5)
