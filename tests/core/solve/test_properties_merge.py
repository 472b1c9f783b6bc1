"""A merge does not depend on how the same LoRAs are written down, and is what it has to be where that is known."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from ssr_core import Lora, LowRankUpdate, MergeSettings, Site, StatisticsCollector, merge
from strategies import Problem, distance, merged_dense, problems, seeds
from synthetic import calibration_at, dense, dense_modules, mlp, random, random_lora, run

TOLERANCE = 1e-5  # results are float32


def stack(problem: Problem, strengths: Sequence[float] | None = None) -> torch.Tensor:
    strengths = strengths or [1.0] * len(problem.updates)
    return sum(s * dense(u) for s, u in zip(strengths, problem.updates, strict=True) if u is not None)


def largest(problem: Problem) -> torch.Tensor:
    """What errors are measured by: identical LoRAs of opposite signs may cancel in the stack."""
    return max((dense(u) for u in problem.updates if u is not None), key=torch.norm)


@given(problems(), st.data())
def test_it_does_not_matter_in_which_factor_a_loras_scale_is(problem, data):
    def moved(update: LowRankUpdate | None) -> LowRankUpdate | None:
        scale = data.draw(st.sampled_from((1e-3, 0.1, 0.5, 3.0, 64.0)))
        return update and LowRankUpdate(update.down * scale, update.up / scale)

    other = problem.with_updates([moved(update) for update in problem.updates])
    assert distance(other.merged(), problem.merged(), largest(problem)) < TOLERANCE


@given(problems(), st.floats(0.05, 20))
def test_alpha_over_rank_is_a_factor_of_up(problem, alpha):
    def written(update: LowRankUpdate | None) -> LowRankUpdate | None:
        return update and LowRankUpdate.from_factors(update.down, update.up * (update.rank / alpha), alpha)

    other = problem.with_updates([written(update) for update in problem.updates])
    assert distance(other.merged(), problem.merged(), largest(problem)) < TOLERANCE


@given(problems(least=2), st.randoms())
def test_the_order_of_loras_does_not_matter(problem, rng):
    order = rng.sample(range(len(problem.updates)), len(problem.updates))
    assert distance(problem.ordered(order).merged(), problem.merged(), largest(problem)) < TOLERANCE


@given(problems(least=2), st.data())
def test_a_fused_lora_may_as_well_come_in_slices(problem, data):
    whole = problem.calibration()
    out = problem.site.out_features
    edges = sorted({0, out, *data.draw(st.lists(st.integers(0, out), max_size=3))})
    sliced = data.draw(st.sets(st.sampled_from(range(len(problem.updates))), min_size=1))
    loras = []
    for task, lora in enumerate(whole.loras):
        pieces = {
            Site("layer", a, b, out): update.slice_rows(a, b)
            for site, update in lora.updates.items()
            for a, b in pairwise(edges)
        }
        loras.append(Lora(lora.name, pieces) if task in sliced else lora)
    model = torch.nn.ModuleDict({"layer": torch.nn.Linear(problem.tokens[0].shape[1], out)}).double()
    collector = StatisticsCollector(loras)
    for task, tokens in enumerate(problem.tokens):
        with torch.no_grad(), collector.watching(model, task):
            if len(tokens):
                model["layer"](tokens)
    assert distance(merged_dense(collector.calibration()), merged_dense(whole), largest(problem)) < TOLERANCE


@given(problems(most=1), st.sampled_from((0, 1)))
def test_one_lora_alone_is_left_as_it_is(problem, routing):
    assert distance(problem.merged(routing=float(routing)), stack(problem)) < 1e-6


@given(problems(), st.lists(st.floats(-2, 2), min_size=4, max_size=4))
def test_without_routing_the_merge_is_the_plain_stack(problem, strengths):
    strengths = tuple(strengths[: len(problem.updates)])
    found = problem.merged(routing=0.0, strengths=strengths)
    assert distance(found, stack(problem, strengths), largest(problem)) < 1e-6


numbers = st.tuples(*[st.floats(-2, 2)] * 4)


@given(problems(), numbers, numbers, st.floats(-1, 1))
def test_the_merge_is_linear_in_the_strengths(problem, first, second, share):
    count = len(problem.updates)
    blend = tuple(a + share * b for a, b in zip(first, second, strict=True))
    one, other, both = (problem.merged(strengths=tuple(s[:count])) for s in (first, second, blend))
    assert distance(one + share * other, both, largest(problem)) < TOLERANCE


@given(problems(least=2), st.floats(0, 1))
def test_routing_between_0_and_1_lies_on_the_line_between_stack_and_merge(problem, routing):
    none, half, full = (problem.merged(routing=r) for r in (0.0, routing, 1.0))
    assert distance(torch.lerp(none, full, routing), half, largest(problem)) < TOLERANCE


@given(problems(least=2), st.floats(0.1, 10))
def test_a_unit_of_the_activations_does_not_matter(problem, unit):
    other = Problem(problem.updates, tuple(unit * x for x in problem.tokens))
    assert distance(other.merged(), problem.merged(), largest(problem)) < TOLERANCE


@given(problems(least=2))
def test_seeing_everything_twice_changes_nothing(problem):
    """At the same number of samples: these say how much the data are trusted."""
    once = problem.calibration()
    site = problem.site
    twice = calibration_at(site, problem.updates, [torch.cat([x, x]) / 2**0.5 for x in problem.tokens])
    assume(once.statistics)
    settings = MergeSettings(ridge=type(MergeSettings().ridge)(scarcity=0.0))
    found = [dense(merge(c, settings).updates[site]) for c in (once, twice)]
    assert distance(found[0], found[1], largest(problem)) < 1e-4


@given(st.integers(2, 3), st.integers(1, 20), st.integers(1, 9), seeds())
def test_context_rows_change_the_router_and_keep_what_is_linear_linear(count, tokens, rows, seed):
    model = mlp()
    loras = [random_lora(str(k), model, 1 + k, seed + k) for k in range(count)]
    batches = [random(tokens + k, 8, seed=seed + k) for k in range(count)]
    collector = StatisticsCollector(loras)
    for task, x in enumerate(batches):
        with torch.no_grad(), collector.surveying(model, task, rows):
            model(x)
    collector.see(rows)
    run(collector, model, batches)
    calibration = collector.calibration()
    once, twice = (dense_modules(merge(calibration, MergeSettings(strengths=(s,) * count)).updates) for s in (1.0, 2.0))
    for module, found in once.items():
        alone = [dense(lora.updates[Site.whole(module, len(found))]) for lora in loras]
        assert torch.isfinite(found).all()
        assert distance(twice[module], 2 * found, max(alone, key=torch.norm)) < 1e-4
