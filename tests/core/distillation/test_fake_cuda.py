"""Distilling on a device "cuda" that is not there: nothing on the wrong device, and no wait between two evaluations.

Autograd's engine wants a real device, so here gradients are given instead of computed.
"""

import importlib
from collections.abc import Iterator

import pytest
import torch
from fake_cuda import fake_cuda, on_device
from torch import Tensor, nn

from ssr_core import DistillationSettings, LowRankUpdate, Site, distil
from ssr_core.distillation.muon import Muon
from ssr_core.distillation.point import Point

WIDTH, TOKENS, BATCH = 64, 32, 2


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor, vector: Tensor) -> Tensor:
        return x + self.narrow(nn.functional.gelu(self.wide(x) * vector.mean()))


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x: Tensor, vector: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, vector)
        return x


def updates(rank: int = 4) -> dict[Site, LowRankUpdate]:
    sizes = {"wide": (4 * WIDTH, WIDTH), "narrow": (WIDTH, 4 * WIDTH)}
    return {
        Site.whole(f"blocks.{number}.{name}", out): LowRankUpdate(torch.randn(rank, inputs), torch.randn(out, rank))
        for number in range(3)
        for name, (out, inputs) in sizes.items()
    }


def points(count: int, dtype: torch.dtype) -> Iterator[Point]:
    for number in range(count):
        x, vector, answer = (torch.randn(1, size, WIDTH).to(dtype) for size in (TOKENS, 1, TOKENS))
        yield Point(number % 2, (x, vector), {}, (answer,))


@pytest.fixture
def given_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    learning: list[nn.Parameter] = []

    class Seen(Muon):
        def __init__(self, parameters, lr: float) -> None:
            learning.extend(parameters)
            super().__init__(learning, lr)

    def backward(loss: Tensor) -> None:
        assert loss.grad_fn is not None and loss.device.type == "cuda"
        for one in learning:
            one.grad = torch.ones_like(one)

    monkeypatch.setattr(importlib.import_module("ssr_core.distillation.distil"), "Muon", Seen)
    monkeypatch.setattr(Tensor, "backward", backward)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_between_two_evaluations_nothing_waits_for_the_device(dtype, given_gradients):
    known, given, held_out = updates(), list(points(4, dtype)), list(points(2, dtype))
    waits: list[set[str]] = []
    with fake_cuda() as seen:
        model = on_device(Network, dtype).requires_grad_(False)

        def on_point(done: int, total: int) -> None:
            waits.append(set(seen.waits))
            seen.reset()

        settings = DistillationSettings(steps=3, batch=BATCH, evaluations=1)
        distil(model, model, known, given, held_out, torch.device("cuda"), settings=settings, on_point=on_point)
    between = waits[1:]  # the first comes behind the first evaluation
    assert len(between) == 3 * BATCH - 1
    assert set().union(*between) == set()
