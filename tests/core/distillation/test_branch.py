"""Branch: low-rank updates beside a frozen model, as if they were in its weights."""

import copy

import pytest
import torch
from torch import nn

from ssr_core import Branch, Lora, LowRankUpdate, ModelMismatchError, Site
from ssr_core.distillation.factors import Fixed, Learning, balanced_halves
from synthetic import dense, mlp, random, random_lora, random_update


def with_weights(model: nn.Module, updates) -> nn.Module:
    """A copy with the updates in its weights."""
    changed = copy.deepcopy(model)
    for site, update in updates.items():
        weight = changed.get_submodule(site.module).weight
        weight.data[site.start : site.stop] += dense(update).reshape(-1, *weight.shape[1:]).to(weight.dtype)
    return changed


CONVOLUTIONS = [
    nn.Conv2d(6, 10, 3, padding=1, stride=2),
    nn.Conv2d(6, 10, 3, padding=1, padding_mode="reflect"),
    nn.Conv1d(6, 10, 5, dilation=2),
    nn.Conv3d(6, 10, (1, 3, 3), padding="same"),
    nn.Conv2d(6, 10, 1),
]


@pytest.mark.parametrize("kind", [Fixed, lambda update: Learning(update, torch.device("cpu"))])
@pytest.mark.parametrize("layer", [nn.Linear(6, 10), *CONVOLUTIONS], ids=str)
def test_an_update_in_a_branch_is_as_one_in_the_weight(layer, kind):
    model = nn.Sequential(layer)
    updates = random_lora("cat", model, 3).updates
    x = random(2, 6, *(9,) * (layer.weight.ndim - 2), dtype=torch.float32)
    expected = with_weights(model, updates)
    with torch.no_grad(), Branch({site: kind(update) for site, update in updates.items()}).attached(model):
        torch.testing.assert_close(model(x), expected(x), rtol=1e-4, atol=1e-4)


def test_slices_of_a_fused_weight_write_to_their_own_rows():
    model = nn.Sequential(nn.Linear(6, 9))
    updates = {Site("0", start, start + 3, 9): random_update(3, 6, 2, seed=start) for start in (0, 6)}
    x = random(2, 5, 6, dtype=torch.float32)
    expected = with_weights(model, updates)
    with torch.no_grad(), Branch({site: Fixed(update) for site, update in updates.items()}).attached(model):
        torch.testing.assert_close(model(x), expected(x))


def test_several_loras_at_their_strengths():
    model = mlp()
    cat, dog = random_lora("cat", model, 3, 1).with_strength(0.8), random_lora("dog", model, 2, 2, ["2"])
    both = with_weights(with_weights(model, {s: u.scaled(0.8) for s, u in cat.updates.items()}), dog.updates)
    only = with_weights(model, {s: u.scaled(0.8) for s, u in cat.updates.items() if s.module == "0"})
    x = random(7, 8)
    with torch.no_grad(), Branch.of([cat, dog]).attached(model):
        torch.testing.assert_close(model(x), both(x), rtol=1e-6, atol=1e-6)
    with torch.no_grad(), Branch.of([cat, dog], modules={"0"}).attached(model):
        torch.testing.assert_close(model(x), only(x), rtol=1e-6, atol=1e-6)


def test_gradients_reach_the_factors_and_the_layers_before():
    model = mlp().requires_grad_(False)
    factors = {s: Learning(u, torch.device("cpu")) for s, u in random_lora("cat", model, 3).updates.items()}
    with Branch(factors).attached(model):
        model(random(7, 8)).square().sum().backward()
    assert all(one.grad.abs().sum() > 0 for each in factors.values() for one in each.parameters())


def test_hooks_come_off_after_an_error():
    model = mlp()
    with pytest.raises(ModelMismatchError, match="9"):
        Branch.of([Lora("cat", {Site.whole("9", 12): random_update(12, 8, 1)})]).attach(model)
    branch = Branch.of([random_lora("cat", model, 3)])
    with pytest.raises(ZeroDivisionError), branch.attached(model):
        _ = 1 / 0
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("scale", [1.0, 1e-9, 1e9])
def test_halves_of_an_update_are_equally_large_and_make_the_same(scale):
    update = random_update(10, 6, 3)
    down, up = balanced_halves(LowRankUpdate(update.down * scale, update.up / scale))
    torch.testing.assert_close(up @ down, update.dense())
    torch.testing.assert_close(up.mT @ up, down @ down.mT, atol=1e-5, rtol=1e-5)


def test_an_update_that_is_zero_stays_finite():
    zero = LowRankUpdate(torch.zeros(2, 6), torch.zeros(10, 2))
    assert Learning(zero, torch.device("cpu")).update().dense().abs().max() == 0


def test_a_learning_update_is_what_it_began_with():
    update = random_update(10, (6, 3, 3), 3)
    torch.testing.assert_close(Learning(update, torch.device("cpu")).update().dense(), update.dense())
    only_up = Learning(update, torch.device("cpu"), only_up=True)
    assert [one is only_up.up for one in only_up.parameters()] == [True]
