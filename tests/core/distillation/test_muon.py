"""Muon: all directions of a gradient count alike."""

import pytest
import torch
from torch import nn

from ssr_core.distillation.muon import Muon, orthogonalized
from synthetic import random


@pytest.mark.parametrize("shape", [(4, 40), (40, 4), (8, 8), (1, 30), (30, 1)])
def test_singular_values_come_near_1_and_singular_vectors_stay(shape):
    left, values, right = torch.linalg.svd(random(*shape, seed=0), full_matrices=False)
    matrix = left * torch.logspace(0, -1.5, len(values)) @ right
    found = left.mT @ orthogonalized(matrix) @ right.mT
    assert found.diagonal().min() > 0.6 and found.diagonal().max() < 1.25
    assert (found - found.diagonal().diag()).abs().max() < 1e-6


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_the_size_of_a_gradient_does_not_count(scale):
    matrix = random(4, 40, seed=0, dtype=torch.float32)
    torch.testing.assert_close(orthogonalized(matrix * scale), orthogonalized(matrix), rtol=1e-3, atol=1e-3)


def test_directions_without_a_gradient_do_not_move():
    """As of a layer that few tokens pass."""
    matrix = random(8, 2, seed=0) @ random(2, 40, seed=1)
    assert torch.linalg.matrix_rank(orthogonalized(matrix), rtol=1e-6) == 2
    assert torch.equal(orthogonalized(torch.zeros(3, 5)), torch.zeros(3, 5))


@pytest.mark.parametrize("shape", [(8, 40), (40, 8)])
def test_a_step_is_as_large_as_the_learning_rate(shape):
    parameter = nn.Parameter(torch.zeros(shape))
    parameter.grad = 1e3 * random(*shape, seed=0, dtype=torch.float32)
    Muon([parameter], lr=0.01).step()
    assert 0.7 * 0.01 < parameter.square().mean().sqrt() < 1.2 * 0.01


def test_what_has_no_gradient_stays():
    parameters = [nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(2, 3))]
    parameters[1].grad = torch.zeros(2, 3)
    Muon(parameters, lr=0.1).step()
    assert all(torch.equal(one, torch.ones(2, 3)) for one in parameters)


def test_rounding_errors_beside_the_gradients_of_others_move_little():
    parameters = [nn.Parameter(torch.zeros(4, 6)), nn.Parameter(torch.zeros(4, 6))]
    for parameter, scale in zip(parameters, (1.0, 1e-7), strict=True):
        parameter.grad = scale * random(4, 6, seed=0, dtype=torch.float32)
    Muon(parameters, lr=0.1).step()
    assert parameters[1].norm() < 0.01 * parameters[0].norm()


def test_a_narrow_valley_is_crossed_in_few_steps():
    """A least-squares problem whose inputs have directions of very different size, as those of layers have."""
    scales = torch.logspace(0, -2, 8)
    inputs = random(200, 8, seed=0, dtype=torch.float32) * scales
    target = random(16, 8, seed=1, dtype=torch.float32)
    errors = {}
    for name, make in {
        "muon": lambda of: Muon(of, 0.05),
        "adam": lambda of: torch.optim.AdamW(of, lr=0.05, betas=(0.9, 0.99), weight_decay=0.0),
    }.items():
        weight = nn.Parameter(torch.zeros(16, 8))
        optimizer = make([weight])
        for _ in range(40):
            optimizer.zero_grad()
            (inputs @ (weight - target).mT / scales.square().mean().sqrt()).square().mean().backward()
            optimizer.step()
        errors[name] = float((weight.detach() - target).square().mean())
    assert errors["muon"] < 0.8 * errors["adam"]
