"""Requirement of a distillation: what is told before is what is taken."""

import gc

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from allocations import allocations
from ssr_core import (
    Branch,
    Case,
    DistillationRequirement,
    DistillationSettings,
    Lora,
    PointRecorder,
    distil,
    footprint,
    memory_of,
)
from ssr_core.lora.low_rank_update import concatenate
from synthetic import random, random_lora

CPU = torch.device("cpu")
CASES = (Case((0,)), Case((1,)))


class Block(nn.Module):
    """Of a transformer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x, shift, scale):
        q, k, v = self.qkv(self.first(x)).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.second(x) * (1 + scale) + shift)


class Transformer(nn.Module):
    """Blocks that all see the same modulation."""

    shape = (1, 200, 64)

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(64, 64), nn.Linear(64, 64)
        self.modulation = nn.Linear(64, 128)
        self.blocks = nn.ModuleList([Block(64) for _ in range(6)])

    def forward(self, x):
        shift, scale = self.modulation(x.mean(1, keepdim=True)).chunk(2, -1)
        x = self.first(x)
        for block in self.blocks:
            x = block(x, shift, scale)
        return self.last(x)


class Convolutions(nn.Module):
    """Of a UNet: it writes to its activations."""

    def __init__(self, inner: int, out: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(inner, out, 3, padding=1), nn.Conv2d(out, out, 3, padding=1)
        self.past = nn.Conv2d(inner, out, 1)

    def forward(self, x):
        inside = self.second(F.silu(self.first(x), inplace=True))
        inside += self.past(x)
        return inside


class UNet(nn.Module):
    """Its second half sees what the first half left."""

    shape = (1, 8, 32, 32)

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([nn.Conv2d(8, 32, 3, padding=1), Convolutions(32, 32), Convolutions(32, 64)])
        self.middle = Convolutions(64, 64)
        self.up = nn.ModuleList([Convolutions(128, 32), Convolutions(64, 32)])
        self.last = nn.Conv2d(32, 8, 1)

    def forward(self, x):
        skipped = []
        for block in self.down:
            x = block(x)
            skipped.append(x)
            x = F.avg_pool2d(x, 2) if block is self.down[-1] else x
        x = F.interpolate(self.middle(x), scale_factor=2.0)
        for block in self.up:
            x = block(torch.cat([x, skipped.pop()], 1))
        return self.last(x)


def prepared(kind, rank, dtype=torch.float32):
    """(network, updates, points)"""
    torch.manual_seed(0)
    network = kind().to(dtype)
    layers = [name for name, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    loras = [random_lora(name, network, rank, seed, layers) for seed, name in enumerate(("cat", "dog"))]
    found = []
    for case, lora in enumerate(loras):
        recorder = PointRecorder(case)
        with torch.no_grad(), Branch.of([lora]).attached(network), recorder.attached(network):
            for seed in range(2):
                network(random(*kind.shape, seed=seed, dtype=torch.float32).to(dtype))
        found += recorder.points
    updates = {site: concatenate([lora.updates[site] for lora in loras]) for site in loras[0].updates}
    return network, updates, found


@pytest.mark.parametrize("only_up", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [1, 16])
@pytest.mark.parametrize("kind", [Transformer, UNet])
def test_no_more_is_taken_than_told_and_hardly_less(kind, rank, dtype, only_up):
    network, updates, points = prepared(kind, rank, dtype)
    activations = footprint(network, network, points[0], updates, CPU, only_up)
    need = DistillationRequirement.of(updates, activations, points, only_up)
    settings = DistillationSettings(steps=2, batch=3, evaluations=1, only_up=only_up)
    gc.collect()
    peak = allocations(lambda: distil(network, network, updates, points, points, CPU, CASES, settings)).peak
    told = need.device + need.results // 2  # while gradients pass, there is only the best step so far
    assert peak <= told < 1.15 * peak


def test_counting_takes_no_more_than_a_call_and_leaves_the_model_as_it_was():
    network, updates, points = prepared(Transformer, 4)
    with torch.no_grad(), Branch.of([Lora("merge", updates)]).attached(network):
        calling = allocations(lambda: points[0].answer(network, CPU)).peak
    found = []
    counting = allocations(lambda: found.append(footprint(network, network, points[0], updates, CPU))).peak
    assert counting < 1.3 * calling < found[0]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())
    assert not any("forward" in vars(module) for module in network.modules())
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_of_further_blocks_only_the_inputs_are_kept():
    sizes = []
    for depth in (3, 6):
        network, updates, points = prepared(Transformer, 1)
        network.blocks = network.blocks[:depth]
        updates = {site: one for site, one in updates.items() if site.module in dict(network.named_modules())}
        sizes.append(footprint(network, network, points[0], updates, CPU))
    given = 4 * torch.Size(Transformer.shape).numel()
    assert sizes[1] - sizes[0] == 3 * given


def test_what_points_share_counts_once():
    points = prepared(Transformer, 1)[2]
    size = 4 * torch.Size(Transformer.shape).numel()
    assert memory_of(points) == 8 * size
    assert memory_of([*points, *points]) == 8 * size
    assert memory_of([]) == 0


def test_half_of_what_learns_takes_half_of_its_memory():
    updates = prepared(Transformer, 4)[1]
    whole, up = (DistillationRequirement.of(updates, 0, only_up=only_up) for only_up in (False, True))
    downs, ups = (sum(getattr(one, name).numel() for one in updates.values()) for name in ("down", "up"))
    assert whole.device == 4 * 3 * (downs + ups) and up.device == 4 * (downs + 3 * ups)
    assert whole.results == up.results == 8 * (downs + ups)
