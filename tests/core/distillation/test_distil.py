"""Distillation: a merge comes nearer to its LoRAs, and is never worse than it was."""

import math

import pytest
import torch
from torch import nn

from ssr_core import Branch, Case, DistillationSettings, Lora, PointRecorder, SolveError, distil
from ssr_core.lora.low_rank_update import concatenate
from synthetic import dense, random, random_lora

CPU = torch.device("cpu")
CASES = (Case((0,)), Case((1,)), Case((0, 1)))


class Network(nn.Module):
    """Two blocks; answers with a list of two tensors, and is told how loud to be."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)) for _ in range(2)])
        self.to(dtype)

    def forward(self, x, options):
        for block in self.blocks:
            x = x + block(x) * options["loudness"]
        return [x, {"half": x[:, :4]}]


def loras(network: nn.Module) -> list[Lora]:
    return [random_lora("cat", network, 2, 1), random_lora("dog", network, 2, 2)]


def stack(of: list[Lora]) -> dict:
    return {site: concatenate([one.updates[site] for one in of]) for site in of[0].updates}


def points(network: nn.Module, of: list[Lora], seed: int = 0, count: int = 6, loudness: float = 0.5) -> list:
    """Of each LoRA, and of both together; each where inputs lie on a side of their own."""
    found = []
    for case, speaking in enumerate([of[:1], of[1:], of]):
        recorder = PointRecorder(case)
        with torch.inference_mode(), Branch.of(speaking).attached(network), recorder.attached(network):
            for number in range(count):
                x = random(10, 8, seed=100 * seed + 10 * number + case) + 2 * case
                network(x.to(next(network.parameters()).dtype), options={"loudness": torch.tensor(loudness)})
        found += recorder.points
    return found


def distilled(network=None, steps=20, **given):
    network = network or Network()
    of = loras(network)
    settings = DistillationSettings(steps=steps, batch=4, **given)
    return distil(network, network, stack(of), points(network, of), points(network, of, 1, 2), CPU, CASES, settings)


def test_the_error_falls_and_what_is_kept_is_where_it_was_smallest():
    found = distilled()
    assert found.start.step == 0 and found.best.error < 0.65 * found.start.error
    assert found.best.error == min(one.error for one in found.history)
    assert all(after < before for before, after in zip(found.start.cases[:2], found.best.cases[:2], strict=True))


def test_errors_are_relative_to_what_the_loras_change():
    """Each by itself has the error 0 in its own case, and no LoRA at all the error 1 in every case."""
    network = Network()
    of = loras(network)
    once = DistillationSettings(steps=1, learning_rate=1e-9)
    held_out = points(network, of, 1)
    for number, one in enumerate(of):
        found = distil(network, network, one.updates, points(network, of), held_out, CPU, CASES, once)
        assert found.start.cases[number] < 1e-6 < found.start.cases[1 - number]
    nothing = {site: update.scaled(0.0) for site, update in of[0].updates.items()}
    found = distil(network, network, nothing, points(network, of), held_out, CPU, CASES, once)
    assert found.start.cases == pytest.approx([1, 1, 1])


def test_an_error_of_a_combination_counts_beside_the_effect_of_its_weakest_lora():
    """A style that changes all of a picture leaves no room for a face, if only the whole counts."""
    network = Network()
    of = loras(network)
    of[1] = of[1].with_strength(8.0)
    given = (points(network, of), points(network, of, 1, 2), CPU)
    start = {site: update.scaled(0.5) for site, update in stack(of).items()}
    settings = DistillationSettings(steps=30, batch=4)
    knowing = distil(network, network, start, *given, CASES, settings)
    not_knowing = distil(network, network, start, *given, (Case((0,)), Case((1,)), Case((2, 3))), settings)
    assert knowing.best.cases[2] < not_knowing.best.cases[2]


def test_a_case_without_an_effect_counts_as_the_others_do():
    """Silence: the model as it is, which no LoRA shall change."""
    network = Network()
    of = loras(network)
    recorder = PointRecorder(3)
    with torch.no_grad(), recorder.attached(network):
        network(random(10, 8, dtype=torch.float32) - 3, options={"loudness": torch.tensor(0.5)})
    silent = recorder.points
    settings = DistillationSettings(steps=30, batch=4)
    given = (points(network, of) + 6 * silent, points(network, of, 1, 2) + silent, CPU)
    found = distil(network, network, stack(of), *given, (*CASES, Case(())), settings)
    assert 0 < found.best.cases[3] < 0.5 * found.start.cases[3] < math.inf


def test_the_same_seed_gives_the_same():
    for one, other in zip(distilled(seed=3).updates.values(), distilled(seed=3).updates.values(), strict=True):
        assert torch.equal(one.down, other.down) and torch.equal(one.up, other.up)
    assert distilled(seed=4).history != distilled(seed=3).history


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_models_in_other_precisions(dtype):
    found = distilled(Network(dtype))
    assert found.best.error < 0.65 * found.start.error
    assert all(update.down.dtype == torch.float32 for update in found.updates.values())


def test_the_result_has_the_rank_of_the_merge_and_may_keep_down():
    before = stack(loras(Network()))
    for site, update in distilled(only_up=True).updates.items():
        assert update.rank == before[site].rank
        kept = torch.linalg.lstsq(before[site].down.mT, update.down.mT).residuals
        assert kept.numel() == 0 or kept.max() < 1e-6
    assert distilled(only_up=True).best.error < distilled().start.error


def test_where_it_diverges_the_merge_stays_what_it_was():
    found = distilled(learning_rate=50.0)
    assert found.stopped and found.best.step == 0
    for site, update in found.updates.items():
        torch.testing.assert_close(dense(update), dense(stack(loras(Network()))[site]), rtol=1e-5, atol=1e-5)


def test_a_learning_rate_that_is_too_high_is_lowered_on_the_way():
    found = distilled(steps=60, learning_rate=2.0)
    assert found.returns and not found.stopped
    assert found.best.error < 0.8 * found.start.error


def test_an_interrupt_leaves_no_hook_and_no_gradient():
    network = Network()
    of = loras(network)

    def stop(done, total):
        if done == 5:
            raise KeyboardInterrupt

    kept = points(network, of)
    with pytest.raises(KeyboardInterrupt):
        distil(network, network, stack(of), kept, kept, CPU, on_point=stop)
    assert not any(module._forward_hooks or "forward" in vars(module) for module in network.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in network.parameters())


def test_progress_is_told_point_by_point_and_evaluation_by_evaluation():
    network = Network()
    of, done, steps = loras(network), [], []
    settings = DistillationSettings(steps=7, batch=3, evaluations=3)
    kept = points(network, of)
    distil(
        *(network, network, stack(of), kept, kept, CPU, CASES, settings),
        *(lambda number, total: done.append((number, total)), lambda one: steps.append(one.step)),
    )
    assert done == [(number, 21) for number in range(1, 22)]
    assert steps == [0, 2, 4, 6, 7]


def test_it_runs_where_everything_else_runs_under_inference_mode():
    with torch.inference_mode():
        found = distilled()
    assert found.best.error < 0.65 * found.start.error


def test_bad_input():
    network = Network()
    of = loras(network)
    kept = points(network, of)
    with pytest.raises(SolveError, match="too few points"):
        distil(network, network, stack(of), kept, [], CPU)
    with pytest.raises(SolveError, match="steps"):
        DistillationSettings(steps=0)
    broken = {site: update.scaled(math.inf) for site, update in stack(of).items()}
    with pytest.raises(SolveError, match="not finite"):
        distil(network, network, broken, kept, kept, CPU)


def test_answers_that_are_not_finite_are_not_learnt_from():
    network = Network()
    of = loras(network)
    kept = points(network, of)
    network.blocks[0][0].weight.data[0, 0] = math.nan
    with pytest.raises(SolveError, match="not finite"):
        distil(network, network, stack(of), kept, kept, CPU, CASES)
    with pytest.raises(SolveError, match="with cat is not finite"), PointRecorder(0, "cat").attached(network):
        network(random(10, 8, dtype=torch.float32), options={"loudness": torch.tensor(0.5)})
    assert not any(module._forward_hooks for module in network.modules())


def test_a_model_without_gradient_says_so():
    class Detached(Network):
        def forward(self, x, options):
            return [one.detach() for one in super().forward(x, options)[:1]]

    network = Detached()
    kept = points(network, loras(network))
    with pytest.raises(SolveError, match="no gradient"):
        distil(network, network, stack(loras(network)), kept, kept, CPU)
