"""Subspace: the joint factors of all tasks at one site, by blocks."""

import pytest
import torch

from ssr_core import Lora, LoraError, LowRankUpdate, Site, Subspace, join_loras
from synthetic import dense, random, random_update


def mixed() -> list[LowRankUpdate | None]:
    return [random_update(6, 5, 3, 0), None, random_update(6, 5, 1, 1), random_update(6, 5, 4, 2)]


def test_the_joint_update_is_the_plain_stack():
    space = Subspace.join(mixed())
    wanted = sum(dense(update) for update in mixed() if update is not None)
    torch.testing.assert_close(dense(LowRankUpdate(space.down, space.up)), wanted)


def test_every_block_is_the_update_of_its_task_whatever_the_ranks():
    space = Subspace.join(mixed())
    assert (space.ranks, space.present, space.rank, space.context) == ((3, 0, 1, 4), (0, 2, 3), 8, 0)
    for task, update in enumerate(mixed()):
        wanted = torch.zeros(6, 5, dtype=torch.float64) if update is None else dense(update)
        assert torch.equal(dense(space.task(task)), wanted)


def test_a_site_is_shared_from_two_tasks_on():
    assert Subspace.join(mixed()).is_shared
    assert not Subspace.join([None, random_update(6, 5, 3)]).is_shared


def test_scaling_multiplies_each_task_by_its_own_strength():
    space = Subspace.join(mixed())
    scaled = space.scaled((0.5, 7.0, -1.0, 2.0))
    for task, strength in ((0, 0.5), (2, -1.0), (3, 2.0)):
        torch.testing.assert_close(dense(scaled.task(task)), strength * dense(space.task(task)))


def test_the_fingerprint_ignores_strength_and_alpha():
    space = Subspace.join(mixed())
    down, up = random(2, 5), random(6, 2)
    with_alpha = [Subspace.join([LowRankUpdate.from_factors(down, up, alpha)]) for alpha in (1.0, 4.0)]
    assert space.scaled((1.0, 2.0, 3.0, 4.0)).fingerprint == space.fingerprint
    assert with_alpha[0].fingerprint == with_alpha[1].fingerprint


def test_the_fingerprint_changes_with_the_order_the_ranks_and_the_values():
    updates = mixed()
    altered = random_update(6, 5, 3, 0)
    altered.down[0, 0] += 1e-3
    prints = [
        Subspace.join(given).fingerprint
        for given in (updates, updates[::-1], updates[:3], [*updates, None], [altered, *updates[1:]])
    ]
    assert len(set(prints)) == len(prints)


@pytest.mark.parametrize("task", range(4))
def test_a_subspace_without_a_task_is_the_one_joined_from_the_others(task):
    updates = mixed()
    reduced, wanted = Subspace.join(updates).without(task), Subspace.join(updates[:task] + updates[task + 1 :])
    assert (reduced.ranks, reduced.fingerprint) == (wanted.ranks, wanted.fingerprint)
    assert torch.equal(reduced.down, wanted.down)
    assert torch.equal(reduced.up, wanted.up)


def test_context_rows_belong_to_no_task_and_outlive_every_one():
    context = random(2, 5, seed=9, dtype=torch.float32)
    space = Subspace.join(mixed()).with_context(context)
    assert (space.rank, space.context) == (8, 2)
    assert torch.equal(space.without(0).down[-2:], context)
    assert torch.equal(space.scaled((1.0, 1.0, 1.0, 1.0)).down[-2:], context)


@pytest.mark.parametrize("kernel", [(), (3,), (3, 3), (1, 3, 3)], ids=str)
def test_context_rows_see_one_position_and_can_be_read_back(kernel):
    context = random(2, 5, seed=9, dtype=torch.float32)
    space = Subspace.join([random_update(6, (5, *kernel), 2, seed) for seed in range(2)]).with_context(context)
    centre = tuple(size // 2 for size in kernel)
    assert torch.equal(space.down[(slice(4, None), slice(None), *centre)], context)
    assert torch.equal(space.down[4:].flatten(2).sum(dim=2) if kernel else space.down[4:], context)
    assert torch.equal(space.context_rows, context)


def test_context_rows_change_the_fingerprint_and_come_only_once():
    plain = Subspace.join(mixed())
    space = plain.with_context(random(2, 5, dtype=torch.float32))
    assert space.fingerprint != plain.fingerprint
    with pytest.raises(LoraError, match="context rows already"):
        space.with_context(random(2, 5, dtype=torch.float32))


def test_both_spellings_of_a_pointwise_convolution_meet_in_the_fuller_one():
    flat, full = random_update(6, 5, 2, 0), random_update(6, (5, 1, 1), 3, 1)
    space = Subspace.join([flat, full])
    assert space.down.shape == (5, 5, 1, 1)
    torch.testing.assert_close(dense(LowRankUpdate(space.down, space.up)), dense(flat) + dense(full))


def test_loras_of_any_mix_of_sites_are_joined_at_every_site():
    one = Lora("cat", {Site.whole("a", 6): random_update(6, 5, 2), Site.whole("b", 4): random_update(4, 5, 3)})
    other = Lora("dog", {Site.whole("c", 4): random_update(4, 5, 1), Site.whole("a", 6): random_update(6, 5, 4)})
    ranks = {site.module: space.ranks for site, space in join_loras([one, other]).items()}
    assert ranks == {"a": (2, 4), "b": (3, 0), "c": (0, 1)}


@pytest.mark.parametrize(("out", "inner"), [(6, 7), (8, 5)])
def test_loras_of_different_models_are_refused_with_both_names_and_sizes(out, inner):
    one = Lora("cat", {Site.whole("a", 6): random_update(6, 5, 2)})
    other = Lora("dog", {Site.whole("a", out): random_update(out, inner, 2)})
    with pytest.raises(LoraError, match=f"dog and cat.* at a one has {inner} inputs and {out} outputs.* 5 and 6"):
        join_loras([one, other])
