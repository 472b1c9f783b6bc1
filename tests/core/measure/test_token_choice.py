"""Choice: which tokens are counted is drawn once and fair."""

import pytest
import torch

from ssr_core.measure.token_choice import SETS, Choice

CPU = torch.device("cpu")


@pytest.mark.parametrize(("limit", "tokens"), [(0, 100), (100, 100), (101, 100)])
def test_all_tokens_count_where_there_are_not_too_many(limit, tokens):
    assert Choice(limit, 0).of(tokens, CPU, 0) is None


def test_as_many_different_tokens_are_chosen_as_may_be():
    chosen = Choice(12, 0).of(40, CPU, 3)
    assert len(chosen) == len(chosen.unique()) == 12
    assert int(chosen.min()) >= 0 and int(chosen.max()) < 40


def test_a_layer_takes_other_tokens_each_time_and_after_a_while_the_same():
    choice = Choice(12, 0)
    sets = [choice.of(40, CPU, turn) for turn in range(SETS + 1)]
    assert len({tuple(indices.tolist()) for indices in sets}) == SETS
    assert sets[SETS] is sets[0]  # kept where the model computes: choosing copies nothing


def test_the_choice_is_the_same_in_every_run_of_a_task():
    one, other = (Choice(12, 7).of(40, CPU, 2) for _ in range(2))
    assert torch.equal(one, other)
    assert not torch.equal(one, Choice(12, 8).of(40, CPU, 2))
