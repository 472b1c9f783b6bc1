"""LowRankUpdate: factors of every kind fold into one exact weight update, and broken ones are refused by name."""

import pytest
import torch
from torch.nn import functional as F

from ssr_core import LoraError, LowRankUpdate, concatenate
from synthetic import dense, random, random_update


def test_an_update_without_alpha_is_up_times_down():
    down, up = random(3, 5), random(4, 3, seed=1)
    torch.testing.assert_close(LowRankUpdate.from_factors(down, up).dense().double(), up @ down, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 1.0, 3.0, 12.0])
def test_alpha_scales_the_update_by_alpha_over_rank(alpha):
    down, up = random(3, 5, dtype=torch.float32), random(4, 3, seed=1, dtype=torch.float32)
    update = LowRankUpdate.from_factors(down, up, alpha)
    torch.testing.assert_close(dense(update), alpha / 3 * up.double() @ down.double(), rtol=1e-6, atol=1e-6)


def test_alpha_keeps_float32_precision_next_to_bfloat16_factors():
    down, up = random(3, 5, dtype=torch.bfloat16), random(4, 3, seed=1, dtype=torch.bfloat16)
    update = LowRankUpdate.from_factors(down, up, alpha=1.0)
    torch.testing.assert_close(dense(update), up.double() @ down.double() / 3, rtol=1e-6, atol=1e-6)


def test_factors_stored_in_eight_bits_can_be_used():
    down, up = (random(*shape).to(torch.float8_e4m3fn) for shape in ((3, 5), (4, 3)))
    torch.testing.assert_close(dense(LowRankUpdate.from_factors(down, up)), up.double() @ down.double())


@pytest.mark.parametrize("kernel", [(3,), (3, 2), (3, 1, 2)])
def test_a_convolution_with_trailing_ones_in_up_acts_like_its_two_convolutions(kernel):
    conv = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(kernel)]
    down, up = random(3, 5, *kernel), random(4, 3, *(1 for _ in kernel), seed=1)
    x = random(2, 5, *(4 for _ in kernel), seed=2)
    update = LowRankUpdate.from_factors(down, up, alpha=6.0)
    assert update.in_shape == (5, *kernel)
    torch.testing.assert_close(
        conv(x, dense(update).reshape(4, 5, *kernel)), 2 * conv(conv(x, down), up), rtol=1e-6, atol=1e-6
    )


def test_dense_has_the_shape_of_the_weight():
    assert random_update(4, (5, 3, 3), 2).dense().shape == (4, 5, 3, 3)


@pytest.mark.parametrize("spelling", ["four axes", "two axes"])
def test_a_tucker_core_acts_like_its_three_convolutions(spelling):
    # LyCORIS LoCon with use_tucker: lora_up(lora_mid(lora_down(x))) * alpha / rank
    down, mid, up = random(3, 5, 1, 1), random(3, 3, 3, 3, seed=1), random(4, 3, 1, 1, seed=2)
    x = random(2, 5, 6, 6, seed=3)
    wanted = F.conv2d(F.conv2d(F.conv2d(x, down), mid), up) * 1.5 / 3
    given = down if spelling == "four axes" else down.flatten(1)
    update = LowRankUpdate.from_factors(given, up, alpha=1.5, mid=mid)
    torch.testing.assert_close(F.conv2d(x, dense(update).reshape(4, 5, 3, 3)), wanted, rtol=1e-5, atol=1e-5)


def test_a_tucker_core_between_two_ranks_divides_alpha_by_the_rank_of_down():
    # comfy.weight_adapter.lora: alpha / down.shape[0], whatever the core's own size
    down, mid, up = random(2, 5, 1, 1), random(3, 2, 3, 3, seed=1), random(4, 3, 1, 1, seed=2)
    x = random(1, 5, 4, 4, seed=3)
    wanted = F.conv2d(F.conv2d(F.conv2d(x, down), mid), up) * 8 / 2
    update = LowRankUpdate.from_factors(down, up, alpha=8.0, mid=mid)
    assert update.rank == 3
    torch.testing.assert_close(F.conv2d(x, dense(update).reshape(4, 5, 3, 3)), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("down", "up", "mid"),
    [
        ((0, 5), (4, 0), None),
        ((3, 5), (4, 2), None),
        ((3, 5, 3, 3), (4, 3, 3, 3), None),
        ((3,), (4, 3), None),
        ((3, 5), (4,), None),
        ((), (), None),
        ((3, 5), (0, 3), None),
        ((3, 5, 1, 1), (4, 3, 1, 1), (3, 2, 3, 3)),
        ((3, 5, 1, 1), (4, 3, 1, 1), (2, 3, 3, 3)),
        ((3, 5, 3, 3), (4, 3, 1, 1), (3, 3, 3, 3)),
        ((3, 5, 1, 1), (4, 3, 1, 1), (3,)),
    ],
    ids=str,
)
def test_factors_that_do_not_fit_together_are_refused_by_name(down, up, mid):
    with pytest.raises(LoraError, match=r"cat\.safetensors: blocks\.0"):
        LowRankUpdate.from_factors(
            torch.ones(down), torch.ones(up), 1.0, None if mid is None else torch.ones(mid), "cat.safetensors: blocks.0"
        )


@pytest.mark.parametrize("broken", ["down", "up", "mid", "alpha"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused_by_name(broken, value):
    factors = {"down": torch.ones(3, 5, 1, 1), "up": torch.ones(4, 3, 1, 1), "mid": torch.ones(3, 3, 2, 2)}
    alpha = 1.0
    if broken == "alpha":
        alpha = value
    else:
        factors[broken].view(-1)[1] = value
    with pytest.raises(LoraError, match=r"cat\.safetensors: blocks\.0 contains NaN"):
        LowRankUpdate.from_factors(
            factors["down"], factors["up"], alpha, factors["mid"], name="cat.safetensors: blocks.0"
        )


def test_a_scaled_update_is_the_scaled_matrix():
    update = random_update(4, 5, 2)
    torch.testing.assert_close(dense(update.scaled(-0.5)), -0.5 * dense(update))


def test_rows_taken_out_of_an_update_are_the_rows_of_its_matrix():
    update = random_update(7, 5, 2)
    assert torch.equal(dense(update.slice_rows(2, 5)), dense(update)[2:5])
    assert update.slice_rows(2, 5).down is update.down


def test_embedded_rows_stand_where_they_were_put_and_the_rest_is_zero():
    update = random_update(3, 5, 2)
    wanted = torch.zeros(7, 5, dtype=torch.float64)
    wanted[2:5] = dense(update)
    assert torch.equal(dense(update.embed_rows(2, 7)), wanted)


def test_a_pointwise_convolution_can_change_its_spelling():
    update = random_update(4, 5, 2)
    respelled = update.with_in_shape((5, 1, 1))
    assert respelled.in_shape == (5, 1, 1)
    assert torch.equal(dense(respelled), dense(update))


def test_an_update_is_not_laid_out_for_a_layer_with_other_inputs():
    with pytest.raises(LoraError, match=r"blocks\.0 has inputs \(5,\).*\(6,\)"):
        random_update(4, 5, 2).with_in_shape((6,), "blocks.0")


def test_concatenation_is_the_sum_of_the_matrices():
    updates = [random_update(4, (5, 3, 3), rank, seed) for seed, rank in enumerate((1, 3, 2))]
    joint = concatenate(updates)
    assert joint.rank == 6
    torch.testing.assert_close(dense(joint), sum(map(dense, updates)))


def test_a_balanced_update_is_the_same_matrix_with_equal_norms():
    update = random_update(4, (5, 3), 3)
    update = LowRankUpdate(update.down * torch.tensor([1e-4, 1.0, 1e4])[:, None, None], update.up)
    balanced = update.balanced()
    torch.testing.assert_close(dense(balanced), dense(update))
    torch.testing.assert_close(balanced.down.flatten(1).norm(dim=1), balanced.up.norm(dim=0))


@pytest.mark.parametrize("silent", ["down", "up", "both"])
def test_balancing_a_direction_that_does_nothing_stays_finite(silent):
    update = random_update(4, 5, 3)
    if silent != "up":
        update.down[1] = 0
    if silent != "down":
        update.up[:, 1] = 0
    balanced = update.balanced()
    assert balanced.is_finite()
    torch.testing.assert_close(dense(balanced), dense(update))
