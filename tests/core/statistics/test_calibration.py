"""Calibration: all that was measured adds up over runs, and a LoRA can leave it without a new run."""

import pytest
import torch
from torch import nn

from ssr_core import Calibration, Lora, MergeSettings, Site, StatisticsCollector, StatisticsError, merge
from synthetic import collect, dense_modules, mlp, random, random_lora, random_update, run


def loras_for(model: nn.Module) -> list[Lora]:
    return [
        random_lora("cat", model, 3, seed=1),
        random_lora("dog", model, 2, seed=2, modules=["0"]).with_strength(0.5),
        random_lora("style", model, 4, seed=3),
        random_lora("pose", model, 1, seed=4, modules=["2"]),
    ]


def batches(seed: int = 0) -> list[torch.Tensor]:
    return [random(30 + task, 8, seed=10 * seed + task) for task in range(4)]


@pytest.mark.parametrize("task", range(4))
@pytest.mark.parametrize(
    "settings",
    [MergeSettings(), MergeSettings.PAPER, MergeSettings(rank=2), MergeSettings(rank=0.8, routing=0.5)],
    ids=["default", "paper", "rank 2", "energy 0.8"],
)
def test_leaving_a_lora_out_equals_a_collection_that_never_had_it(task, settings):
    model, inputs = mlp(), batches()
    loras = loras_for(model)
    reduced = collect(loras, model, inputs).without(task)
    never = collect(loras[:task] + loras[task + 1 :], model, inputs[:task] + inputs[task + 1 :])
    assert (reduced.names, reduced.tokens) == (never.names, never.tokens)
    assert list(reduced.subspaces) == list(never.subspaces)
    assert list(reduced.statistics) == list(never.statistics)
    for site, statistics in never.statistics.items():
        torch.testing.assert_close(reduced.statistics[site].gram, statistics.gram, rtol=1e-12, atol=1e-12)
        assert reduced.statistics[site].fingerprint == statistics.fingerprint
    one, other = (dense_modules(merge(c, settings).updates) for c in (reduced, never))
    assert one.keys() == other.keys()
    for module in one:
        torch.testing.assert_close(one[module], other[module], rtol=1e-6, atol=1e-6)


def test_leaving_out_a_lora_of_split_rows_gives_the_merge_of_the_fused_ones():
    model = nn.ModuleDict({"qkv": nn.Linear(8, 12)}).double()
    fused = [Lora(name, {Site.whole("qkv", 12): random_update(12, 8, 3, seed)}) for seed, name in enumerate("ab")]
    split = Lora("split", {Site("qkv", at, at + 4, 12): random_update(4, 8, 2, 10 + at) for at in (0, 4, 8)})

    def collected(loras):
        collector = StatisticsCollector(loras)
        for task, x in enumerate(batches()[: len(loras)]):
            with torch.no_grad(), collector.watching(model, task):
                model["qkv"](x)
        return collector.calibration()

    one, other = (
        dense_modules(merge(c).updates)["qkv"] for c in (collected([*fused, split]).without(2), collected(fused))
    )
    torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_a_site_that_only_the_left_out_lora_had_is_gone():
    model = mlp()
    one, other = random_lora("cat", model, 2, 1, ["0"]), random_lora("dog", model, 2, 2)
    calibration = collect([one, other], model, batches()[:2]).without(1)
    assert [site.module for site in calibration.subspaces] == ["0"]
    assert calibration.statistics == {}
    torch.testing.assert_close(dense_modules(merge(calibration).updates), dense_modules(one.updates))


def test_one_lora_can_leave_after_another():
    model = mlp()
    calibration = collect(loras_for(model), model, batches())
    one, other = calibration.without(3).without(0), calibration.without(0).without(2)
    assert one.names == other.names == ("dog", "style")
    for site, statistics in one.statistics.items():
        assert torch.equal(statistics.gram, other.statistics[site].gram)


@pytest.mark.parametrize("task", [-1, 4])
def test_a_lora_that_is_not_there_cannot_leave(task):
    model = mlp()
    with pytest.raises(StatisticsError, match=f"no task {task}"):
        collect(loras_for(model), model, batches()).without(task)


def test_calibrations_add_up_bit_for_bit():
    model = mlp()
    a, b = (collect(loras_for(model), model, batches(seed)) for seed in (0, 1))
    total = a + b
    for site, statistics in total.statistics.items():
        assert torch.equal(statistics.gram, a.statistics[site].gram + b.statistics[site].gram)
    assert total.tokens == (60, 62, 64, 66)
    assert a.tokens == (30, 31, 32, 33)


def test_prompts_collected_on_two_machines_make_the_merge_of_one():
    model, inputs = mlp(), batches()
    nothing = [x[:0] for x in inputs]
    halves = [
        collect(loras_for(model), model, [*inputs[:2], *nothing[2:]]),
        collect(loras_for(model), model, [*nothing[:2], *inputs[2:]]),
    ]
    one = merge(halves[0] + halves[1]).updates
    other = merge(collect(loras_for(model), model, inputs)).updates
    assert all(torch.equal(one[site].up, other[site].up) for site in other)


@pytest.mark.parametrize("change", ["order", "values", "sites"])
def test_calibrations_of_other_loras_do_not_add_up(change):
    model = mlp()
    loras = loras_for(model)
    others = {
        "order": [loras[1], loras[0], *loras[2:]],
        "values": [random_lora("cat", model, 3, seed=9), *loras[1:]],
        "sites": [random_lora("cat", model, 3, seed=1, modules=["2"])],
    }[change]
    with pytest.raises(StatisticsError, match="other LoRAs"):
        collect(loras, model, batches()) + collect(others, model, batches()[: len(others)])


def test_tokens_are_those_of_the_busiest_site():
    model = mlp()
    collector = StatisticsCollector([random_lora("cat", model, 2, 1), random_lora("dog", model, 2, 2)])
    with torch.no_grad(), collector.watching(model, 0):
        model(random(5, 8))
        model[0](random(4, 8))
    assert collector.calibration().tokens == (9, 0)
    assert Calibration(collector.loras, collector.subspaces, {}).tokens == (0, 0)


@pytest.mark.parametrize("order", [(1, 0, 3, 2), (3, 2, 1, 0), (0, 1, 2, 3)])
def test_loras_in_another_order_equal_a_collection_in_that_order(order):
    model, inputs = mlp(), batches()
    loras = loras_for(model)
    reordered = collect(loras, model, inputs).reordered(order)
    collected = collect([loras[i] for i in order], model, [inputs[i] for i in order])
    assert (reordered.names, reordered.tokens) == (collected.names, collected.tokens)
    for site, statistics in collected.statistics.items():
        torch.testing.assert_close(reordered.statistics[site].gram, statistics.gram, rtol=1e-12, atol=1e-12)
        assert reordered.statistics[site].fingerprint == statistics.fingerprint
    sum_ = reordered + collected
    assert sum_.tokens == tuple(2 * n for n in collected.tokens)


def test_corrections_follow_the_loras_into_another_order():
    model, inputs = mlp(), batches()
    loras = loras_for(model)
    calibration = refined(loras, model, inputs)
    order = (2, 0, 3, 1)
    one, other = merge(calibration), merge(calibration.reordered(order))
    assert one.report.strengths == tuple(other.report.strengths[order.index(i)] for i in range(4))
    for module, delta in dense_modules(one.updates).items():
        torch.testing.assert_close(dense_modules(other.updates)[module], delta, rtol=1e-5, atol=1e-6)
    without = merge(calibration, MergeSettings(corrected=False))
    assert any(not torch.allclose(dense_modules(without.updates)[m], d) for m, d in dense_modules(one.updates).items())


def refined(loras, model, inputs):
    collector = StatisticsCollector(loras)
    run(collector, model, inputs)
    updates = merge(collector.calibration()).updates
    for task, batch in enumerate(inputs):
        with torch.no_grad(), collector.refining(model, task, updates) as both:
            with both.alone():
                model(batch)
            with both.merged():
                model(batch)
    return collector.calibration()


def test_statistics_are_ordered_as_the_loras_at_hand_and_take_their_strengths():
    model = mlp()
    loras = loras_for(model)
    at_hand = [lora.with_strength(0.3) for lora in loras[::-1]]
    calibration = collect(loras, model, batches()).ordered_as(at_hand)
    assert calibration.names == tuple(lora.name for lora in at_hand)
    assert {lora.strength for lora in calibration.loras} == {0.3}
    with pytest.raises(StatisticsError, match=r"measured with other LoRAs .*: pose is missing"):
        calibration.ordered_as(at_hand[1:])
