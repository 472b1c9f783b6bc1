"""StatisticsCollector: a block adds all that one task saw or nothing, and leaves the model as it was."""

import pytest
import torch
from torch import nn

from ssr_core import (
    Lora,
    LoraError,
    ModelMismatchError,
    Site,
    StatisticsCollector,
    StatisticsError,
    merge,
)
from synthetic import collect, dense_modules, mlp, random, random_lora, random_update, relative_error, run


def loras_for(model: nn.Module) -> list[Lora]:
    return [
        random_lora("cat", model, 3, seed=1),
        random_lora("dog", model, 2, seed=2, modules=["0"]),
        random_lora("style", model, 4, seed=3),
    ]


def batches(seed: int = 0, count: int = 30) -> list[torch.Tensor]:
    return [random(count + task, 8, seed=10 * seed + task) for task in range(3)]


def with_deltas(model: nn.Module, lora: Lora, strength: float) -> nn.Module:
    """A copy of `model` whose weights carry the LoRA."""
    patched = mlp()
    patched.load_state_dict(model.state_dict())
    for module, delta in dense_modules(lora.updates).items():
        patched.get_submodule(module).weight.data += strength * delta
    return patched


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


def grams(collector: StatisticsCollector) -> dict[Site, torch.Tensor]:
    return {site: statistics.gram.clone() for site, statistics in collector.calibration().statistics.items()}


def same(one: dict[Site, torch.Tensor], other: dict[Site, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[site], other[site]) for site in one)


@pytest.mark.parametrize("task", range(3))
@pytest.mark.parametrize("strength", [1.0, 0.6, -0.5, 0.0])
def test_only_the_running_lora_is_active_and_as_strong_as_its_user_wants(task, strength):
    model = mlp()
    loras = [lora.with_strength(strength) for lora in loras_for(model)]
    x = random(9, 8)
    with torch.no_grad(), StatisticsCollector(loras).watching(model, task):
        out = model(x)
    with torch.no_grad():
        torch.testing.assert_close(out, with_deltas(model, loras[task], strength)(x), rtol=1e-6, atol=1e-6)


def test_grams_are_sums_over_what_each_layer_sees_while_its_task_runs():
    model = mlp()
    loras, inputs = loras_for(model), batches()
    calibration = collect(loras, model, inputs)
    for site, statistics in calibration.statistics.items():
        for task, x in enumerate(inputs):
            with torch.no_grad():
                seen = with_deltas(model, loras[task], 1.0)[: int(site.module)](x)  # what enters the module
            z = seen @ calibration.subspaces[site].down.double().T
            torch.testing.assert_close(statistics.gram[task], z.T @ z, rtol=1e-6, atol=1e-6)
        assert statistics.tokens == (30, 31, 32)


def test_tokens_of_a_task_count_where_it_has_no_lora_of_its_own():
    model = mlp()
    statistics = collect(loras_for(model), model, batches()).statistics[Site.whole("2", 8)]
    assert statistics.tokens[1] == 31
    assert statistics.gram[1].diagonal().min() > 0


def test_a_site_of_one_lora_is_measured_on_the_tokens_of_all():
    model = mlp()
    cat, dog = (random_lora(name, model, 2, seed, [module]) for name, seed, module in (("c", 1, "0"), ("d", 2, "2")))
    collector = StatisticsCollector([cat, dog])
    x = random(9, 8)
    with torch.no_grad(), collector.watching(model, 1):
        out = model(x)
        torch.testing.assert_close(out, with_deltas(model, dog, 1.0)(x), rtol=1e-6, atol=1e-6)
    calibration = collector.calibration()
    sites = {Site.whole("0", 12), Site.whole("2", 8)}
    assert set(calibration.subspaces) == set(calibration.statistics) == sites
    assert [calibration.statistics[site].tokens for site in sites] == [(0, 9), (0, 9)]


def test_a_lora_alone_is_active_but_nothing_of_it_is_measured():
    model = mlp()
    calibration = collect([random_lora("cat", model, 2, 1)], model, [random(9, 8)])
    assert calibration.statistics == {}


def test_noise_levels_are_counted_once_however_often_they_are_seen():
    model = mlp()
    collector = StatisticsCollector(loras_for(model))
    for levels in ((1.0, 0.5, 0.5), (0.5, 0.25)):
        with torch.no_grad(), collector.watching(model, 1) as recording:
            for level in levels:
                recording.at(level)
                model(random(9, 8))
    statistics = next(iter(collector.calibration().statistics.values()))
    assert statistics.coverage == (0, 3, 0)
    assert (statistics + statistics).coverage == (0, 3, 0)
    assert statistics.samples[1] == 45


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.qkv(x)


def fused_and_split() -> list[Lora]:
    fused = Lora("fused", {Site.whole("qkv", 12): random_update(12, 8, 3, 1)})
    split = Lora("split", {Site("qkv", at, at + 4, 12): random_update(4, 8, 2, 2 + at) for at in (0, 4, 8)})
    odd = Lora("odd", {Site("qkv", 3, 9, 12): random_update(6, 8, 2, 20)})
    return [fused, split, odd]


@pytest.mark.parametrize("task", range(3))
def test_a_fused_layer_cut_into_slices_still_gets_the_running_update_whole(task):
    model = Attention().double()
    loras = fused_and_split()
    x = random(2, 9, 8)
    with torch.no_grad():
        wanted = model(x) + 0.8 * x @ dense_modules(loras[task].updates)["qkv"].T
        with StatisticsCollector([lora.with_strength(0.8) for lora in loras]).watching(model, task):
            out = model(x)
    torch.testing.assert_close(out, wanted, rtol=1e-6, atol=1e-6)


def test_every_slice_of_a_fused_layer_has_the_gram_of_its_own_subspace():
    model = Attention().double()
    inputs = batches()
    calibration = collect(fused_and_split(), model, inputs)
    assert len(calibration.statistics) == 5
    for site, statistics in calibration.statistics.items():
        for task, x in enumerate(inputs):
            z = x @ calibration.subspaces[site].down.double().T
            torch.testing.assert_close(statistics.gram[task], z.T @ z, rtol=1e-10, atol=1e-10)


def test_a_layer_that_runs_twice_counts_both_times():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(self.inner(x))

    model = Twice().double()
    calibration = collect([random_lora("a", model, 2, 1), random_lora("b", model, 2, 2)], model, [random(5, 8)])
    assert calibration.tokens == (10, 0)


def test_runs_add_up_bit_for_bit_to_the_sum_of_separate_collections():
    model = mlp()
    loras = loras_for(model)
    first, second = collect(loras, model, batches(0)), collect(loras, model, batches(1))
    collector = StatisticsCollector(loras)
    run(collector, model, batches(0))
    run(collector, model, batches(1))
    both, total = collector.calibration(), first + second
    for site, statistics in total.statistics.items():
        assert torch.equal(statistics.gram, first.statistics[site].gram + second.statistics[site].gram)
        assert torch.equal(statistics.gram, both.statistics[site].gram)
    assert total.tokens == both.tokens == (60, 62, 64)


def test_a_calibration_taken_early_does_not_change_when_more_is_collected():
    model = mlp()
    collector = StatisticsCollector(loras_for(model))
    run(collector, model, batches(0))
    early = collector.calibration()
    kept = {site: statistics.gram.clone() for site, statistics in early.statistics.items()}
    run(collector, model, batches(1))
    assert same(kept, {site: statistics.gram for site, statistics in early.statistics.items()})


@pytest.mark.parametrize("interruption", [RuntimeError, KeyboardInterrupt, GeneratorExit, SystemExit])
def test_an_interrupted_block_adds_nothing_and_takes_its_hooks_off(interruption):
    model = mlp()
    collector = StatisticsCollector(loras_for(model))
    run(collector, model, batches(0))
    before = grams(collector)
    with pytest.raises(interruption), torch.no_grad(), collector.watching(model, 0):
        model(batches(1)[0])
        assert hooks(model) == 2
        raise interruption
    assert hooks(model) == 0
    assert same(grams(collector), before)
    assert collector.calibration().tokens == (30, 31, 32)


def test_hooks_are_off_after_a_block_that_ends_well():
    model = mlp()
    run(StatisticsCollector(loras_for(model)), model, batches())
    assert hooks(model) == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_are_refused_by_site_and_leave_all_sums_alone(value):
    model = mlp()
    collector = StatisticsCollector(loras_for(model))
    run(collector, model, batches(0))
    before = grams(collector)

    def break_off(module, args):  # only the second layer sees it, after the first was counted
        return (torch.full_like(args[0], value),)

    handle = model[2].register_forward_pre_hook(break_off)
    with pytest.raises(StatisticsError, match=r"^2: .*NaN or infinite"), torch.no_grad(), collector.watching(model, 1):
        model(batches(1)[1])
    handle.remove()
    assert hooks(model) == 0
    assert same(grams(collector), before)


def test_weights_keep_their_bits_and_their_memory():
    model = mlp()
    before = {name: (value.data_ptr(), value.clone()) for name, value in model.state_dict().items()}
    run(StatisticsCollector(loras_for(model)), model, batches())
    for name, value in model.state_dict().items():
        assert (value.data_ptr(), True) == (before[name][0], torch.equal(value, before[name][1]))


def test_input_and_base_output_are_not_written_to():
    model = nn.Sequential(nn.Identity(), nn.Linear(8, 8)).double()
    x = random(5, 8)
    kept, outputs = x.clone(), []
    model[1].register_forward_hook(lambda module, args, output: outputs.append((output, output.clone())))
    with (
        torch.no_grad(),
        StatisticsCollector([random_lora("a", model, 2, 1), random_lora("b", model, 2, 2)]).watching(model, 0),
    ):
        model(x)
    assert torch.equal(x, kept)
    assert torch.equal(*outputs[0])


def test_attaching_twice_counts_once():
    model = mlp()
    collector = StatisticsCollector(loras_for(model))
    with torch.no_grad(), collector.recording(0) as recording:
        recording.attach(model)
        recording.attach(model)
        assert hooks(model) == 2
        model(random(5, 8))
    assert collector.calibration().tokens == (5, 0, 0)


def test_a_recording_may_be_taken_off_and_put_on_again():
    model, clone = mlp(), mlp()
    collector = StatisticsCollector(loras_for(model))
    with torch.no_grad(), collector.recording(0) as recording:
        recording.attach(model)
        model(random(5, 8))
        recording.detach()
        model(random(5, 8))
        recording.attach(clone)
        clone(random(5, 8))
        recording.attach(model)
        assert (hooks(model), hooks(clone)) == (2, 0)
    assert collector.calibration().tokens == (10, 0, 0)


def test_modules_that_never_ran_are_named():
    model = mlp()
    with torch.no_grad(), StatisticsCollector(loras_for(model)).watching(model, 0) as recording:
        assert recording.idle == {"0", "2"}
        model[0](random(5, 8))
        assert recording.idle == {"2"}


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.double_blocks = nn.ModuleList([nn.ModuleDict({"img_attn": nn.ModuleDict({"qkv": nn.Linear(8, 8)})})])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.double_blocks[0]["img_attn"]["qkv"](x)


DOTTED = "double_blocks.0.img_attn.qkv"
KOHYA = "double_blocks_0_img_attn_qkv"


def named(name: str, module: str, seed: int) -> Lora:
    return Lora(name, {Site.whole(module, 8): random_update(8, 8, 2, seed)})


def test_kohya_names_find_their_modules_and_the_calibration_speaks_the_models_names():
    model = Nested().double()
    loras = [named("cat", KOHYA, 1), named("dog", KOHYA, 2)]
    calibration = collect(loras, model, batches()[:2])
    assert [site.module for site in calibration.subspaces] == [DOTTED]
    assert [site.module for site in calibration.statistics] == [DOTTED]
    assert [site.module for site in merge(calibration).updates] == [DOTTED]
    dotted = collect([named("cat", DOTTED, 1), named("dog", DOTTED, 2)], model, batches()[:2])
    assert torch.equal(*(c.statistics[Site.whole(DOTTED, 8)].gram for c in (calibration, dotted)))


def test_loras_that_spell_one_module_differently_meet_there():
    model = Nested().double()
    mixed = collect([named("cat", KOHYA, 1), named("dog", DOTTED, 2)], model, batches()[:2])
    wanted = collect([named("cat", DOTTED, 1), named("dog", DOTTED, 2)], model, batches()[:2])
    assert relative_error(
        dense_modules(merge(mixed).updates)[DOTTED], dense_modules(merge(wanted).updates)[DOTTED]
    ) == pytest.approx(0, abs=1e-9)


def test_statistics_of_inference_mode_serve_outside_of_it():
    model = mlp()
    collector = StatisticsCollector(loras_for(model))
    with torch.inference_mode():
        for task, batch in enumerate(batches(0)):
            with collector.watching(model, task):
                model(batch)
    run(collector, model, batches(1))
    calibration = collector.calibration()
    assert calibration.tokens == (60, 62, 64)
    usual = collect(loras_for(model), model, batches(0)) + collect(loras_for(model), model, batches(1))
    one, other = (dense_modules(merge(c).updates) for c in (calibration, usual))
    for module in one:
        torch.testing.assert_close(one[module], other[module])


def test_a_block_may_mix_inference_mode_with_plain_runs():
    model = mlp()
    collector = StatisticsCollector(loras_for(model))
    with collector.watching(model, 0):
        with torch.inference_mode():
            model(batches(0)[0])
        with torch.no_grad():
            model(batches(0)[0])
    assert collector.calibration().tokens == (60, 0, 0)


def survey(collector: StatisticsCollector, model: nn.Module, inputs: list[torch.Tensor], rows: int = 3) -> None:
    for task, batch in enumerate(inputs):
        with torch.no_grad(), collector.surveying(model, task, rows):
            model(batch)


def test_a_survey_gives_every_site_the_principal_directions_of_their_inputs():
    model = mlp()
    loras = [random_lora("cat", model, 3, 1, ["0"]), random_lora("dog", model, 2, 2)]
    inputs = [x * torch.tensor([9.0, 1, 1, 5, 1, 1, 1, 1]) for x in batches()[:2]]
    collector = StatisticsCollector(loras)
    survey(collector, model, inputs, rows=2)
    collector.see(2)
    contexts = {site.module: space.context_rows for site, space in collector.subspaces.items()}
    best = torch.linalg.svd(torch.cat([x / len(x) ** 0.5 for x in inputs]))[2][:2]  # every task counts the same
    torch.testing.assert_close((contexts["0"].double() * best).sum(dim=1).abs(), torch.ones(2).double())
    assert len(contexts["2"]) == 2


def test_a_survey_runs_the_lora_but_counts_no_token():
    model = mlp()
    loras = loras_for(model)
    collector = StatisticsCollector(loras)
    x = random(9, 8)
    with torch.no_grad(), collector.surveying(model, 2, 3):
        out = model(x)
    torch.testing.assert_close(out, with_deltas(model, loras[2], 1.0)(x).detach(), rtol=1e-6, atol=1e-6)
    assert collector.calibration().tokens == (0, 0, 0)
    assert hooks(model) == 0


def test_statistics_after_a_survey_are_measured_with_the_context_rows():
    model, inputs = Attention().double(), batches()
    collector = StatisticsCollector(fused_and_split())
    survey(collector, model, inputs)
    collector.see(3)
    run(collector, model, inputs)
    for site, statistics in collector.calibration().statistics.items():
        space = collector.subspaces[site]
        assert space.context == 3
        for task, x in enumerate(inputs):
            z = x @ space.down.double().T
            torch.testing.assert_close(statistics.gram[task], z.T @ z, rtol=1e-10, atol=1e-10)


def test_a_convolution_is_surveyed_and_measured_at_the_centre_of_its_kernel():
    model = nn.Sequential(nn.Conv2d(4, 5, 3, padding=1)).double()
    inputs = [random(2, 4, 6, 6, seed=seed) for seed in range(2)]
    collector = StatisticsCollector([random_lora("cat", model, 2, 1), random_lora("dog", model, 2, 2)])
    survey(collector, model, inputs)
    collector.see(3)
    run(collector, model, inputs)
    ((site, space),) = collector.subspaces.items()
    seen = inputs[0].movedim(1, -1).flatten(0, -2) @ space.context_rows.double().T
    gram = collector.calibration().statistics[site].gram[0]
    torch.testing.assert_close(gram[4:, 4:], seen.T @ seen)


def test_context_rows_come_before_any_statistics_or_not_at_all():
    model = mlp()
    collector = StatisticsCollector(loras_for(model))
    survey(collector, model, batches())
    run(collector, model, batches())
    with pytest.raises(StatisticsError, match="survey first"):
        collector.see(3)


def test_fewer_context_rows_can_be_used_than_were_surveyed():
    model = nn.Sequential(nn.Linear(100, 8)).double()
    inputs = [random(50, 100, seed=seed) for seed in range(2)]
    contexts = {}
    for rows in (2, 5):
        collector = StatisticsCollector([random_lora("cat", model, 3, 1), random_lora("dog", model, 2, 2)])
        survey(collector, model, inputs, rows=5)
        collector.see(rows)
        (contexts[rows],) = (space.context_rows for space in collector.subspaces.values())
    torch.testing.assert_close(contexts[2], contexts[5][:2])


def test_asking_for_more_context_rows_than_were_surveyed_gives_what_there_is():
    model = nn.Sequential(nn.Linear(100, 8)).double()
    collector = StatisticsCollector([random_lora("cat", model, 3, 1), random_lora("dog", model, 2, 2)])
    survey(collector, model, [random(50, 100), random(50, 100)], rows=2)
    collector.see(64)
    (space,) = collector.subspaces.values()
    assert 2 <= space.context < 64
    torch.testing.assert_close(
        space.context_rows @ space.context_rows.T, torch.eye(space.context), rtol=1e-5, atol=1e-5
    )


def test_a_survey_that_was_interrupted_or_not_finite_is_as_if_it_had_not_been():
    model, inputs = mlp(), batches()
    disturbed, usual = StatisticsCollector(loras_for(model)), StatisticsCollector(loras_for(model))
    with pytest.raises(KeyboardInterrupt), torch.no_grad(), disturbed.surveying(model, 0, 3):
        model(100 * inputs[0])
        raise KeyboardInterrupt
    with pytest.raises(StatisticsError, match="NaN"), torch.no_grad(), disturbed.surveying(model, 0, 3):
        model(torch.full_like(inputs[0], torch.nan))
    for collector in (disturbed, usual):
        survey(collector, model, inputs)
        collector.see(3)
    for site, space in usual.subspaces.items():
        assert torch.equal(space.down, disturbed.subspaces[site].down)


def test_a_second_collection_with_the_subspaces_of_the_first_adds_up():
    model = mlp()
    first = StatisticsCollector(loras_for(model))
    survey(first, model, batches(0))
    first.see(3)
    run(first, model, batches(0))
    second = StatisticsCollector(loras_for(model), first.calibration().subspaces)
    run(second, model, batches(1))
    total = first.calibration() + second.calibration()
    assert total.tokens == (60, 62, 64)


def test_whether_any_module_ran_is_known():
    model = mlp()
    with torch.no_grad(), StatisticsCollector(loras_for(model)).watching(model, 0) as recording:
        assert not recording.heard
        model[0](random(5, 8))
        assert recording.heard


def test_a_module_the_model_lacks_is_named_and_no_hook_stays():
    model = mlp()
    collector = StatisticsCollector([random_lora("cat", model, 2), named("dog", "blocks.7.qkv", 1)])
    with (
        pytest.raises(ModelMismatchError, match=r"no layer 'blocks\.7\.qkv'"),
        collector.watching(model, 1),
    ):
        pass
    assert hooks(model) == 0


@pytest.mark.parametrize("task", [-1, 3])
def test_a_task_that_is_not_there_is_refused(task):
    collector = StatisticsCollector(loras_for(mlp()))
    with pytest.raises(StatisticsError, match=f"no task {task}"), collector.watching(mlp(), task):
        pass


def test_nothing_to_collect_is_refused():
    with pytest.raises(LoraError, match="at least one"):
        StatisticsCollector([])
    with pytest.raises(LoraError, match="None of cat, dog"):
        StatisticsCollector([Lora("cat", {}), Lora("dog", {})])
