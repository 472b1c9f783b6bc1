"""SufficientStatistics: float64 Gram matrices that add up bit for bit."""

import pytest
import torch

from ssr_core import Accumulator, StatisticsError, Subspace, SufficientStatistics
from synthetic import measure, random, random_update


def space() -> Subspace:
    return Subspace.join([random_update(6, 5, 2, 0), None, random_update(6, 5, 3, 1)])


def tokens(seed: int, count: int = 7) -> list[torch.Tensor]:
    return [random(count + task, 5, seed=10 * seed + task) for task in range(3)]


def test_a_gram_is_the_sum_of_outer_products_over_its_tasks_tokens():
    statistics = measure(space(), tokens(0))
    for task, x in enumerate(tokens(0)):
        signals = [space().down.double() @ token for token in x]
        wanted = sum(torch.outer(z, z) for z in signals)
        torch.testing.assert_close(statistics.gram[task], wanted, rtol=1e-12, atol=1e-12)
    assert statistics.tokens == (7, 8, 9)
    assert statistics.gram.dtype == torch.float64


def test_the_sum_of_statistics_is_the_float64_sum_bit_for_bit():
    a, b, c = (measure(space(), tokens(seed)) for seed in range(3))
    total = a + b + c
    assert torch.equal(total.gram, a.gram + b.gram + c.gram)
    assert torch.equal((b + a).gram, (a + b).gram)
    assert total.tokens == (21, 24, 27)


def test_adding_leaves_both_summands_as_they_were():
    a, b = measure(space(), tokens(0)), measure(space(), tokens(1))
    before = a.gram.clone(), b.gram.clone()
    a + b
    assert torch.equal(a.gram, before[0])
    assert torch.equal(b.gram, before[1])


def test_empty_statistics_add_nothing():
    statistics = measure(space(), tokens(0))
    total = statistics + SufficientStatistics.empty(space())
    assert torch.equal(total.gram, statistics.gram)
    assert total.tokens == statistics.tokens


def test_updates_of_an_accumulator_add_up_to_the_sums_of_its_pieces():
    z = random(20, 5)
    pieces = z.split(6)
    accumulator = Accumulator()
    for piece in pieces:
        accumulator.update(piece)
    wanted = pieces[0].mT @ pieces[0]
    for piece in pieces[1:]:
        wanted = wanted + piece.mT @ piece
    statistics = accumulator.compute(2, space())
    torch.testing.assert_close(statistics.gram[2], wanted, rtol=1e-14, atol=1e-14)
    assert statistics.tokens == (0, 0, 20)
    assert not statistics.gram[:2].any()


def test_an_accumulator_keeps_what_it_computed_apart_from_what_comes_later():
    accumulator = Accumulator()
    accumulator.update(random(4, 5))
    early = accumulator.compute(0, space())
    kept = early.gram.clone()
    accumulator.update(random(4, 5, seed=1))
    assert torch.equal(early.gram, kept)


def test_an_accumulator_that_saw_nothing_computes_zeros():
    statistics = Accumulator().compute(1, space())
    assert not statistics.gram.any()
    assert statistics.tokens == (0, 0, 0)


def test_float32_signals_are_summed_in_float64():
    z = torch.full((4096, 5), 0.1, dtype=torch.float32)
    accumulator = Accumulator()
    accumulator.update(z)
    wanted = torch.full((5, 5), 4096 * float(z[0, 0]) ** 2, dtype=torch.float64)
    torch.testing.assert_close(accumulator.compute(0, space()).gram[0], wanted, rtol=1e-13, atol=0)


@pytest.mark.parametrize("task", range(3))
def test_statistics_without_a_task_are_those_measured_in_the_subspace_of_the_others(task):
    rows, fingerprint = space().rows_without(task), space().without(task).fingerprint
    reduced = measure(space(), tokens(0)).chosen([k for k in range(3) if k != task], rows, fingerprint)
    others = [x for k, x in enumerate(tokens(0)) if k != task]
    wanted = measure(space().without(task), others)
    assert (reduced.tokens, reduced.fingerprint) == (wanted.tokens, wanted.fingerprint)
    torch.testing.assert_close(reduced.gram, wanted.gram, rtol=1e-13, atol=1e-13)


def test_context_rows_stay_in_statistics_without_a_task():
    joint = space()
    wide = Subspace(torch.cat([joint.down, random(2, 5, dtype=torch.float32)]), joint.up, joint.ranks)
    reduced = measure(wide, tokens(0)).chosen([1, 2], wide.rows_without(0), wide.without(0).fingerprint)
    wanted = measure(wide.without(0), tokens(0)[1:])
    torch.testing.assert_close(reduced.gram, wanted.gram, rtol=1e-13, atol=1e-13)
    assert reduced.gram.shape == (2, 5, 5)


def test_statistics_of_other_loras_do_not_add_up():
    other = Subspace.join([random_update(6, 5, 2, 8), None, random_update(6, 5, 3, 9)])
    with pytest.raises(StatisticsError, match="other LoRAs"):
        measure(space(), tokens(0)) + measure(other, tokens(0))


def test_a_check_refuses_another_subspace_and_values_that_are_not_finite():
    statistics = measure(space(), tokens(0))
    statistics.check(space(), "blocks.0")
    with pytest.raises(StatisticsError, match=r"blocks\.0: .*other LoRAs"):
        statistics.check(space().without(0), "blocks.0")
    statistics.grams.packed[0][0] = float("inf")
    with pytest.raises(StatisticsError, match=r"blocks\.0: .*NaN or infinite"):
        statistics.check(space(), "blocks.0")
