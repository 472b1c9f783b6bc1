"""A frozen model: gradients are those of the plain model, however its weights are held and its blocks are written."""

import copy
import gc
import weakref
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ssr_core import SolveError
from ssr_core.distillation.frozen import blocks_of, frozen
from ssr_core.distillation.overwriting import Overwriting
from synthetic import random


class Block(nn.Module):
    """Writes to its input in place, and to the options it is given."""

    def __init__(self, in_place: bool = True) -> None:
        super().__init__()
        self.norm, self.linear, self.in_place = nn.LayerNorm(8), nn.Linear(8, 8), in_place

    def forward(self, x, options=None, shift=()):
        number = options["number"] if options else 0
        added = self.linear(self.norm(x)) * (number + 1) + sum(one["by"] for one in shift)
        if self.in_place:
            x += added
            return (x, [x * 2])
        x = x + added
        return (x, [x * 2])


class Model(nn.Module):
    def __init__(self, in_place: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(8, 8)
        self.blocks = nn.ModuleList([Block(in_place) for _ in range(3)])

    def forward(self, x):
        options, x = {}, self.first(x)
        shift = x.mean(0, keepdim=True)
        for number, block in enumerate(self.blocks):
            options["number"] = number
            x, (twice,) = block(x, options=options, shift=[{"by": shift}])
        return x + twice


def gradient(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    x = x.clone().requires_grad_()
    with Overwriting():
        model(x).square().sum().backward()
    return x.grad


def loaded_under_inference_mode() -> Model:
    with torch.inference_mode():
        return copy.deepcopy(Model())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("load", [Model, loaded_under_inference_mode])
def test_the_gradient_is_the_plain_model_s(load, checkpointing):
    x, model = random(5, 8, dtype=torch.float32), load()
    with frozen(model, checkpointing):
        found = gradient(model, x)
    torch.testing.assert_close(found, gradient(Model(in_place=False), x))


def test_weights_that_are_converted_at_every_call_are_not_kept():
    class Converted(nn.Linear):
        def forward(self, x):
            return nn.functional.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))

    layer = Converted(8, 8).to(torch.bfloat16).requires_grad_(False)
    kept: list[torch.Size] = []
    x = random(5, 8, dtype=torch.float32).requires_grad_()
    with frozen(layer), torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        output = layer(x)
    output.sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.float().sum(0).expand(5, 8))
    assert kept == [torch.Size([5, 8])]


def test_of_a_block_only_its_inputs_are_kept():
    kept: list[int] = []
    model = Model(in_place=False)
    with frozen(model), torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        model(random(5, 8, dtype=torch.float32).requires_grad_())
    weight, always = 8 * 8, 0  # of the first layer, and what each block is told to want a gradient
    assert sorted(kept) == sorted([weight, *3 * [always], *3 * [5 * 8, 8]]) or kept == [weight, *3 * [5 * 8, 8]]


def test_the_model_is_as_before():
    model = loaded_under_inference_mode()
    learning = Model()
    learning.blocks[0].forward = own = lambda x: x
    before = {name: (id(p), p.requires_grad) for name, p in [*model.named_parameters(), *learning.named_parameters()]}
    for one in (model, learning):
        with pytest.raises(ZeroDivisionError), frozen(one):
            assert not any(p.requires_grad for p in one.parameters())
            _ = 1 / 0
    after = {name: (id(p), p.requires_grad) for name, p in [*model.named_parameters(), *learning.named_parameters()]}
    assert after == before
    assert learning.blocks[0].forward is own
    assert [m for m in [*model.modules(), *learning.modules()] if "forward" in vars(m)] == [learning.blocks[0]]


def test_tensors_are_found_in_whatever_a_block_is_given():
    class Slots:
        __slots__ = ("scale",)

        def __init__(self, scale):
            self.scale = scale

    class Pair(NamedTuple):
        shift: Any
        name: str

    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x, slots, pair):
            return Pair(self.linear(x) * slots.scale + pair.shift, "answer")

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.blocks = nn.ModuleList([Inner(), Inner()])

        def forward(self, x):
            slots, pair = Slots(x.mean(1, keepdim=True)), Pair(x * 2, "given")
            for block in self.blocks:
                x = block(x, slots, pair).shift
            return x

    x, model = random(5, 8, dtype=torch.float32), Outer()
    with frozen(model):
        found = gradient(model, x)
    torch.testing.assert_close(found, gradient(model, x))


def test_blocks_lie_in_lists_at_any_depth():
    class UNet(nn.Module):
        def __init__(self):
            super().__init__()
            self.down = nn.ModuleList([nn.Sequential(nn.Linear(2, 2), nn.SiLU()), nn.ModuleList([Block(), Block()])])
            self.middle = nn.Sequential(nn.Linear(2, 2))
            self.inner = nn.Module()
            self.inner.stages = nn.ModuleList([Block()])

    model = UNet()
    expected = [model.down[0][0], *model.down[1], model.inner.stages[0]]
    assert blocks_of(model) == expected


def test_a_value_that_is_overwritten_behind_its_back_is_an_error():
    x = random(5, 8, dtype=torch.float32).requires_grad_()
    with Overwriting():
        kept = x * 2
        squared = kept.square()
        with torch._C.DisableTorchFunction():
            kept.data.mul_(2)
            kept.detach().add_(1)
        with pytest.raises(SolveError, match="overwrites"):
            squared.sum().backward()


@pytest.mark.parametrize(
    "write",
    [
        lambda x: x.mul_(3),
        lambda x: x.__setitem__(0, 0.0),
        lambda x: torch.add(x, 1, out=x) if not x.requires_grad else x.add_(1),
        lambda x: nn.functional.silu(x, inplace=True),
        lambda x: x.view(-1)[3:].zero_(),
        lambda x: torch._foreach_mul_([x], 2.0),
    ],
)
def test_a_value_may_be_overwritten_after_it_was_used(write):
    x = random(5, 8, dtype=torch.float32)
    given = x.clone().requires_grad_()
    with Overwriting():
        kept = given * 1
        squared = kept.square().sum()
        write(kept)
        squared.backward()
    torch.testing.assert_close(given.grad, 2 * x)


def test_blocks_that_gradients_have_passed_are_gone():
    """Neither what a block was given nor what it answered when it was computed again is kept to the end."""
    alive: list[int] = []
    answers: list[weakref.ref] = []

    class Noting(Block):
        def forward(self, x, options=None, shift=()):
            gc.collect()
            alive.append(sum(one() is not None for one in answers))
            x, twice = super().forward(x, options, shift)
            answers.extend((weakref.ref(x.untyped_storage()), weakref.ref(twice[0].untyped_storage())))
            return x, twice

    model = Model()
    model.blocks = nn.ModuleList([Noting(in_place=False) for _ in range(6)])
    with frozen(model):
        gradient(model, random(5, 8, dtype=torch.float32))
    assert alive[:6] == [0, 2, 3, 4, 5, 6]
    assert alive[6:] == [5, 4, 3, 2, 1, 0]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # as it is, and converted at every call
def test_a_layer_that_passes_no_gradient_is_named(dtype, checkpointing):
    class Converted(nn.Linear):
        def forward(self, x):
            return nn.functional.linear(x.detach(), self.weight.to(x.dtype), self.bias.to(x.dtype))

    model = Model(in_place=False)
    model.blocks[1].linear = Converted(8, 8).to(dtype)
    with frozen(model, checkpointing), pytest.raises(SolveError, match=r"blocks\.1\.linear \(Converted\)"):
        gradient(model, random(5, 8, dtype=torch.float32))


def test_a_block_that_passes_no_gradient_is_named():
    class Detached(Block):
        def forward(self, x, options=None, shift=()):
            x, (twice,) = super().forward(x, options, shift)
            return x.detach(), [twice.detach()]

    model = Model(in_place=False)
    model.blocks[1] = Detached()
    with frozen(model), pytest.raises(SolveError, match=r"blocks\.1 \(Detached\)"):
        gradient(model, random(5, 8, dtype=torch.float32))


@pytest.mark.parametrize("function", [torch.exp, torch.tanh, lambda x: F.scaled_dot_product_attention(x, x, x)])
def test_what_no_gradient_was_asked_for_is_gone(function):
    """As of a block that somebody stopped while it was computed again: some functions save their own answer."""
    before = alive()
    with Overwriting():
        function(2 * random(1, 4, 8, dtype=torch.float32).requires_grad_())
    assert alive() == before


def alive() -> int:
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())
