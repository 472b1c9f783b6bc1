"""Statistics are sums: however tokens are split and ordered, whoever adds them, whichever LoRA is taken out again."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ssr_core import Lora, Site, StatisticsCollector, Subspace
from strategies import Problem, dimensions, problems, seeds
from synthetic import collect, inputs_of, measure, mlp, random, random_lora, random_update, run


def space_of(problem: Problem) -> Subspace:
    return Subspace.join(problem.updates)


@given(problems(), st.data())
def test_statistics_add_up_however_tokens_are_split_and_ordered(problem, data):
    space = space_of(problem)
    whole = measure(space, problem.tokens)
    orders = [torch.tensor(data.draw(st.permutations(range(len(x)))), dtype=torch.long) for x in problem.tokens]
    cuts = [data.draw(st.integers(0, len(x))) for x in problem.tokens]
    shuffled = [x[order] for x, order in zip(problem.tokens, orders, strict=True)]
    parts = [measure(space, [x[:cut] for x, cut in zip(shuffled, cuts, strict=True)])]
    parts += [measure(space, [x[cut:] for x, cut in zip(shuffled, cuts, strict=True)])]
    for total in (parts[0] + parts[1], parts[1] + parts[0]):
        assert total.tokens == whole.tokens
        torch.testing.assert_close(total.gram, whole.gram, rtol=1e-10, atol=1e-10)


@given(problems(least=2), st.data())
def test_without_a_lora_statistics_and_subspace_are_as_if_it_had_never_been_there(problem, data):
    task = data.draw(st.sampled_from(range(len(problem.updates))))
    rest = [k for k in range(len(problem.updates)) if k != task]
    calibration = problem.calibration()
    left = calibration.without(task)
    if all(problem.updates[k] is None for k in rest):
        assert not left.subspaces
        return
    never = problem.ordered(rest).calibration()
    assert left.subspaces.keys() == never.subspaces.keys() and left.statistics.keys() == never.statistics.keys()
    for site, space in never.subspaces.items():
        assert left.subspaces[site].fingerprint == space.fingerprint
        assert torch.equal(left.subspaces[site].up.double(), space.up.double())
    for site, statistics in never.statistics.items():
        assert left.statistics[site].tokens == statistics.tokens
        torch.testing.assert_close(left.statistics[site].gram, statistics.gram, rtol=1e-10, atol=1e-10)


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 12), seeds()), min_size=1, max_size=8), st.randoms())
def test_runs_add_up_in_any_order_of_runs_and_over_any_machines(runs, order):
    model = mlp()
    loras = [random_lora(name, model, rank, seed) for seed, (name, rank) in enumerate((("a", 3), ("b", 1), ("c", 12)))]

    def collected(parts):
        collector = StatisticsCollector(loras)
        for task, count, seed in parts:
            with torch.no_grad(), collector.watching(model, task):
                model(random(count, 8, seed=seed))
        return collector.calibration()

    shuffled, cut = order.sample(runs, len(runs)), order.randrange(len(runs) + 1)
    one, other = collected(runs), collected(shuffled[:cut]) + collected(shuffled[cut:])
    for site, statistics in one.statistics.items():
        assert statistics.tokens == other.statistics[site].tokens
        torch.testing.assert_close(statistics.gram, other.statistics[site].gram, rtol=1e-9, atol=1e-9)


@given(st.integers(1, 12), st.integers(1, 12), seeds())
def test_a_batch_counts_as_its_images_one_by_one(first, second, seed):
    model = mlp()
    loras = [random_lora("a", model, 2, 1), random_lora("b", model, 3, 2)]
    x = random(first + second, 8, seed=seed)
    together, apart = StatisticsCollector(loras), StatisticsCollector(loras)
    run(together, model, [x, x])
    for piece in (x[:first], x[first:]):
        run(apart, model, [piece, piece])
    for site, statistics in together.calibration().statistics.items():
        torch.testing.assert_close(statistics.gram, apart.calibration().statistics[site].gram, rtol=1e-9, atol=1e-9)


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[nn.Module, torch.Tensor]:
    """A layer of one to three dimensions, and images for it."""
    axes = draw(st.integers(1, 3))

    def each(low: int, high: int) -> list[int]:
        return [draw(st.integers(low, high)) for _ in range(axes)]

    kernel, stride, padding, dilation = each(1, 3), each(1, 2), each(0, 2), each(1, 2)
    mode = draw(st.sampled_from(("zeros", "zeros", "replicate", "circular")))
    inputs, out, batch = draw(dimensions(3)), draw(dimensions(4)), draw(st.integers(1, 2))
    layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1](
        inputs, out, kernel, stride=stride, padding=padding, dilation=dilation, padding_mode=mode
    )
    size = [dilation[i] * (kernel[i] - 1) + 1 + draw(st.integers(0, 3)) for i in range(axes)]
    return layer.double(), random(batch, inputs, *(max(s, 2) for s in size), seed=draw(seeds()))


@given(convolutions(), st.integers(1, 3), st.integers(1, 4))
def test_statistics_of_a_convolution_are_those_of_its_unfolded_inputs(made, rank, other):
    layer, images = made
    out, *in_shape = layer.weight.shape
    site = Site.whole("0", out)
    ranks = {"a": rank, "b": other}
    loras = [Lora(name, {site: random_update(out, in_shape, ranks[name], seed)}) for seed, name in enumerate(ranks)]
    calibration = collect(loras, nn.Sequential(layer), [images, images[:1]])
    down = calibration.subspaces[site].down.double().flatten(1)
    for task, x in enumerate((images, images[:1])):
        z = inputs_of(layer, x) @ down.T
        assert calibration.statistics[site].tokens[task] == len(z)
        torch.testing.assert_close(calibration.statistics[site].gram[task], z.T @ z, rtol=1e-9, atol=1e-9)
