"""SSR Collect Stats in a real ComfyUI: the LoRA really runs, and nothing is left behind."""

import importlib

import pytest
import torch

from run_nodes import apply, collect, hooks, load_lora, relative, sample, solve, task
from tiny_flux import conditioning, empty_latent, flux_lora

pytestmark = [pytest.mark.comfy, pytest.mark.usefixtures("pack")]

LORAS = {
    "kohya": lambda: flux_lora("kohya", rank=4, alpha=2.0, seed=1),
    "diffusers": lambda: flux_lora("diffusers", rank=3, seed=2),
    "generic": lambda: flux_lora("generic", rank=2, seed=3),
}


def bypass_sample(model, one_task, steps=4, before=None, **options):
    """The latent that a calibration run of the task ends with."""
    calibrate, sampling, runs, case_prompts, patches, core = (
        importlib.import_module(f"ssr_pack.{name}")
        for name in (
            "nodes.calibrating.diffusion_model",
            "nodes.calibrating.sampling",
            "nodes.calibrating.runs",
            "nodes.calibrating.case_prompts",
            "nodes.reading.patches",
            "ssr_core",
        )
    )
    loaded = patches.read_task(one_task, model)
    seen = []
    collector = core.StatisticsCollector([loaded.lora])
    how = runs.Sampling(0, steps, "euler", "simple", **options)
    with torch.inference_mode(), collector.recording(0) as recording:
        (one,) = case_prompts.cases_of([one_task], ())
        run = runs.Run(0, one, one.conditioning, how, runs.Kind.MEASURE)
        begun = sampling.begin(model, run, empty_latent(), seen.append, before) if run.unseen else ()
        sampling.sample(calibrate.prepared(model, [loaded]), run, recording, empty_latent(), seen.append, begun)
        assert recording.idle == set()
    # the sampler's last step ends at sigma 0, where the latent is the predicted clean one
    return model.model.process_latent_out(seen[-1])


@pytest.mark.parametrize("strength", [1.0, -0.7])
@pytest.mark.parametrize("spelling", LORAS)
def test_a_calibration_run_is_what_load_lora_would_sample(tiny_flux, spelling, strength):
    model, lora = tiny_flux(), LORAS[spelling]()
    expected = sample(load_lora(model, lora, strength))
    assert relative(sample(model), expected) > 0.05  # the LoRA matters
    assert relative(bypass_sample(model, task(lora, strength=strength)), expected) < 1e-5


def test_differences_of_norms_and_biases_are_active_while_calibrating(tiny_flux):
    model, lora = tiny_flux(), LORAS["generic"]()
    lora["diffusion_model.double_blocks.0.img_attn.proj.diff_b"] = torch.full((128,), 0.5)
    lora["diffusion_model.double_blocks.0.img_attn.norm.query_norm.diff"] = torch.full((128,), 0.5)
    expected = sample(load_lora(model, lora))
    assert relative(sample(load_lora(model, LORAS["generic"]())), expected) > 1e-3
    assert relative(bypass_sample(model, task(lora)), expected) < 1e-5


def test_statistics_are_those_of_the_layers_own_inputs_under_the_running_lora(tiny_flux):
    """Against a model that really carries the LoRA in its weights, watched by a plain hook."""
    model, loras = tiny_flux(), [LORAS["kohya"](), LORAS["generic"]()]
    stats = collect(model, *(task(lora, f"l{i}") for i, lora in enumerate(loras)))
    site = next(s for s in stats.calibration.statistics if s.module.endswith("single_blocks.0.linear2"))
    down = stats.calibration.subspaces[site].down.double()
    for index, lora in enumerate(loras):
        patched = load_lora(model, lora)
        grams = []
        layer = patched.model.get_submodule(site.module)
        handle = layer.register_forward_hook(lambda m, args, out, grams=grams: grams.append(gram(args[0], down)))
        sample(patched)
        handle.remove()
        assert relative(stats.calibration.statistics[site].gram[index], sum(grams)) < 1e-5


def gram(x, down):
    z = x.reshape(-1, x.shape[-1]).double() @ down.T
    return z.T @ z


def test_every_prompt_and_every_image_of_the_batch_is_counted(tiny_flux):
    model = tiny_flux()
    tasks = [task(LORAS["kohya"](), "a", seeds=(1, 2)), task(LORAS["generic"](), "b", seeds=(1, 2, 3))]
    stats = collect(model, *tasks, steps=2, batch=3)
    tokens = {s.module: statistics.tokens for s, statistics in stats.calibration.statistics.items()}
    pixels, text = 16, 8  # 8x8 latents in patches of 2x2; text tokens of the test's conditioning
    assert tokens["diffusion_model.double_blocks.0.img_attn.qkv"] == (2 * 3 * 2 * pixels, 3 * 3 * 2 * pixels)
    assert tokens["diffusion_model.single_blocks.0.linear1"] == (12 * (pixels + text), 18 * (pixels + text))
    assert tokens["diffusion_model.double_blocks.0.img_mod.lin"] == (12, 18)


def test_collecting_leaves_no_hook_no_patch_and_every_weight_where_it_was(tiny_flux):
    model = tiny_flux()
    before = sample(model)
    weights = {name: (p.data_ptr(), p.detach().clone()) for name, p in model.model.named_parameters()}
    uuid = model.patches_uuid
    collect(model, task(LORAS["kohya"](), "a"), task(LORAS["diffusers"](), "b"))
    assert hooks(model) == 0
    assert (model.patches, model.injections, model.patches_uuid) == ({}, {}, uuid)
    for name, p in model.model.named_parameters():
        assert p.data_ptr() == weights[name][0] and torch.equal(p, weights[name][1])
    assert torch.equal(sample(model), before)


def test_collecting_on_a_model_that_carries_a_lora_measures_on_top_of_it(tiny_flux):
    model, speed = tiny_flux(), flux_lora("generic", rank=2, seed=9)
    based = load_lora(model, speed)
    expected = sample(load_lora(based, LORAS["kohya"]()))
    assert relative(bypass_sample(based, task(LORAS["kohya"]())), expected) < 1e-5


@pytest.mark.parametrize("error", [RuntimeError("layer broke"), KeyboardInterrupt()])
def test_an_error_inside_a_layer_leaves_nothing_behind(tiny_flux, error):
    model = tiny_flux()
    before = sample(model)
    broken = model.model.diffusion_model.single_blocks[1].linear2
    handle = broken.register_forward_hook(lambda *_: (_ for _ in ()).throw(error))
    with pytest.raises(type(error)):
        collect(model, task(LORAS["kohya"](), "a"), task(LORAS["generic"](), "b"))
    handle.remove()
    assert hooks(model) == 0
    assert torch.equal(sample(model), before)


def test_the_same_seed_gives_the_same_statistics_to_the_bit(tiny_flux):
    model = tiny_flux()
    tasks = [task(LORAS["kohya"](), "a"), task(LORAS["generic"](), "b")]
    one, other = (collect(model, *tasks).calibration.statistics for _ in range(2))
    assert all(torch.equal(one[site].gram, other[site].gram) for site in one)


def test_activations_that_are_not_finite_are_named_with_the_layer(tiny_flux):
    model = tiny_flux()
    core = importlib.import_module("ssr_pack.ssr_core")
    layer = model.model.diffusion_model.double_blocks[0].img_mlp[2]
    handle = layer.register_forward_pre_hook(lambda m, args: (args[0] * float("nan"),))
    with pytest.raises(core.StatisticsError, match="NaN"):
        collect(model, task(LORAS["kohya"](), "a"), task(LORAS["generic"](), "b"))
    handle.remove()


def test_bfloat16_models_are_measured_in_full_precision(tiny_flux):
    model = tiny_flux()
    tasks = [task(LORAS["kohya"](), "a"), task(LORAS["generic"](), "b")]
    exact = collect(model, *tasks, context=0).calibration.statistics
    model.set_model_compute_dtype(torch.bfloat16)
    narrow = collect(model, *tasks, context=0).calibration.statistics
    assert (
        max(relative(narrow[site].gram, exact[site].gram) for site in exact) < 0.05
    )  # bf16 activations differ a little


def test_the_prompt_of_each_lora_is_its_own(tiny_flux):
    model, lora = tiny_flux(), LORAS["kohya"]()
    same = [task(lora, "a", seeds=(1,)), task(lora, "b", seeds=(1,))]
    other = [task(lora, "a", seeds=(1,)), task(lora, "b", seeds=(2,))]
    site = next(iter(collect(model, *same).calibration.statistics))
    equal, different = (collect(model, *tasks).calibration.statistics[site].gram for tasks in (same, other))
    assert torch.equal(equal[0], equal[1]) and not torch.equal(different[0], different[1])
    assert conditioning(1)[0][0].shape == (1, 8, 32)


def two(**images) -> list:
    return [task(LORAS["kohya"](), "a", **images), task(LORAS["generic"](), "b", **images)]


def test_given_images_are_looked_at_with_the_noise_of_each_step(tiny_flux):
    model, layer = tiny_flux(), "diffusion_model.img_in"
    latent = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(3))
    seen = []
    handle = model.model.get_submodule(layer).register_forward_hook(lambda m, args, out: seen.append(args[0].clone()))
    collect(model, *two(images={"samples": latent}), steps=3, context=0)
    handle.remove()
    samplers = importlib.import_module("comfy.samplers")
    sigmas = samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", 3).tolist()
    scaled = model.model.process_latent_in(latent)
    tokens = [x.reshape(2, -1) for x in seen[:3]]  # patches of 2 x 2, every value of the latent once
    noise = tokens[0]
    clean = (tokens[1] - sigmas[1] * noise) / (1 - sigmas[1])
    assert sorted(clean.flatten().tolist()) == pytest.approx(sorted(scaled.flatten().tolist()), abs=1e-4)
    again = sigmas[2] * noise + (1 - sigmas[2]) * clean
    torch.testing.assert_close(tokens[2], again, rtol=1e-4, atol=1e-4)


def test_a_negative_prompt_is_measured_too_where_cfg_uses_it(tiny_flux):
    model = tiny_flux()
    plain, guided = (collect(model, *two(), negative=conditioning(9), cfg=cfg).calibration.tokens for cfg in (1.0, 3.0))
    assert guided == tuple(2 * n for n in plain)


def test_cfg_without_a_negative_prompt_is_refused(tiny_flux):
    with pytest.raises(Exception, match="negative prompt"):
        collect(tiny_flux(), *two(), cfg=4.0)


def test_no_more_tokens_are_counted_than_asked_for(tiny_flux):
    stats = collect(tiny_flux(), *two(), tokens=10)
    counts = {statistics.tokens for statistics in stats.calibration.statistics.values()}
    assert counts == {(40, 40), (32, 32), (4, 4)}  # 4 steps of at most 10: image and joint, text (8), modulation (1)


def test_noise_levels_are_told_apart(tiny_flux):
    stats = collect(tiny_flux(), *two(), steps=5)
    assert {statistics.coverage for statistics in stats.calibration.statistics.values()} == {(5, 5)}


def test_refining_adds_corrections_and_leaves_nothing_behind(tiny_flux):
    model = tiny_flux()
    before = sample(model)
    plain, refined = (collect(model, *two(), refine=n).calibration for n in (0, 1))
    # modulation layers see the time and the pooled text, which no merge changes
    moved = {site for site in refined.statistics if "mod" not in site.module.removesuffix(".lin").rpartition(".")[2]}
    assert plain.corrections == {} and refined.corrections.keys() == moved
    for site, statistics in plain.statistics.items():
        assert torch.equal(statistics.gram, refined.statistics[site].gram)
    assert hooks(model) == 0
    assert torch.equal(sample(model), before)


def test_a_refined_merge_follows_each_lora_more_closely(tiny_flux):
    model, tasks = tiny_flux(), two()
    errors = []
    for refine in (0, 2):
        lora, _ = solve(collect(model, *tasks, refine=refine, context=64))
        merged = apply(model, lora)
        errors.append(sum(relative(sample(merged), sample(load_lora(model, one.lora))) ** 2 for one in tasks))
    assert errors[1] < errors[0]


def test_few_steps_are_not_refined(tiny_flux):
    assert collect(tiny_flux(), *two(), steps=2, refine=1).calibration.corrections == {}


def test_other_strengths_than_collected_leave_the_refinement_out_and_say_so(tiny_flux):
    model = tiny_flux()
    plain, refined = (collect(model, *two(), refine=n) for n in (0, 1))
    (one, _), (other, report) = (solve(stats, strengths="1, 0.5") for stats in (plain, refined))
    assert "left out" in report
    assert all(relative(other[key], one[key]) < 1e-6 for key in one)
    assert "left out" not in solve(refined)[1]


def test_an_automatic_rank_keeps_nearly_everything_and_the_report_tells_what_ranks_lose(tiny_flux):
    stats = collect(tiny_flux(), *two())
    (full, report), (smaller, _) = (solve(stats, rank=rank) for rank in (0, -1))
    ranks = [
        [len(value) for key, value in lora.items() if "lora_down" in key or "lora_A" in key] for lora in (full, smaller)
    ]
    assert 0 < sum(ranks[1]) <= sum(ranks[0])
    assert "Effect lost if every layer is cut to rank 4:" in report


def test_one_step_is_reported_as_too_few(tiny_flux):
    assert "1 noise level only" in solve(collect(tiny_flux(), *two(), steps=1))[1]


# --- a range of steps ---


def levels(stats):
    return {level for seen in stats.calibration.statistics.values() for task in seen.levels for level in task}


def test_only_the_steps_of_the_range_are_measured(tiny_flux):
    model, tasks = tiny_flux(), [task(LORAS[name](), name) for name in ("kohya", "generic")]
    whole = sorted(levels(collect(model, *tasks, steps=6, context=0)), reverse=True)
    found = collect(model, *tasks, steps=6, context=0, start_at_step=2, end_at_step=4)
    assert sorted(levels(found), reverse=True) == whole[2:4]
    tokens = {tokens for seen in found.calibration.statistics.values() for tokens in seen.tokens}
    assert max(tokens) == 2 * (16 + 8)  # image and text tokens of two steps


def test_a_model_may_go_on_where_another_stopped_as_ksampler_advanced_does(tiny_flux):
    import nodes

    first, second, lora = tiny_flux(), tiny_flux(seed=5), LORAS["kohya"]()
    cond, loaded = conditioning(1), load_lora(second, lora)
    common = ("euler", "simple", cond, cond)
    with torch.inference_mode():
        begun = nodes.common_ksampler(first, 0, 5, 1.0, *common, empty_latent(), last_step=2)[0]
        (expected,) = nodes.common_ksampler(loaded, 0, 5, 1.0, *common, begun, start_step=2, disable_noise=True)
    found = bypass_sample(second, task(lora), steps=5, before=first, start=2)
    assert relative(found, expected["samples"]) < 1e-5
    alone = bypass_sample(second, task(lora, strength=0.0), steps=5, start=2)  # nothing is lost on the way
    assert relative(alone, sample(second, steps=5)) < 1e-5


def test_given_images_are_looked_at_in_the_range_only(tiny_flux):
    images = {"samples": torch.randn(1, 16, 8, 8)}
    tasks = [task(LORAS[name](), name, images=images) for name in ("kohya", "generic")]
    found = collect(tiny_flux(), *tasks, steps=6, context=0, start_at_step=4)
    assert len(levels(found)) == 2


@pytest.mark.parametrize(("start", "end"), [(4, 4), (3, 2), (9, 100)])
def test_a_range_without_steps_is_refused(tiny_flux, start, end):
    core = importlib.import_module("ssr_pack.ssr_core")
    with pytest.raises(core.SSRError, match=f"no step from start_at_step {start} to end_at_step {end} among 4"):
        collect(tiny_flux(), task(LORAS["kohya"]()), start_at_step=start, end_at_step=end)


def test_the_unseen_steps_are_sampled_once_for_all_runs(tiny_flux):
    first, model = tiny_flux(), tiny_flux(seed=5)
    calls = []
    first.model.diffusion_model.register_forward_hook(lambda *_: calls.append(1))
    tasks = [task(LORAS[name](), name, seeds=(1, 2)) for name in ("kohya", "generic")]
    collect(model, *tasks, steps=6, start_at_step=2, refine=1, model_before=first)
    assert len(calls) == 2 * 2 * 2  # LoRAs, prompts, steps


def test_a_model_before_without_a_step_for_it_is_refused(tiny_flux):
    core = importlib.import_module("ssr_pack.ssr_core")
    with pytest.raises(core.SSRError, match="model_before is connected, but start_at_step is 0"):
        collect(tiny_flux(), task(LORAS["kohya"]()), model_before=tiny_flux())


def test_a_schedule_with_a_step_more_than_asked_for_is_seen_to_its_end(tiny_flux):
    import comfy.samplers

    model, tasks = tiny_flux(), [task(LORAS[name]()) for name in ("kohya", "generic")]
    found = collect(model, *tasks, steps=6, scheduler="ddim_uniform")
    sampler = comfy.samplers.KSampler(model, 6, model.load_device, "euler", "ddim_uniform")
    assert len(levels(found)) == len(sampler.sigmas) - 1


def test_a_layer_that_never_runs_is_told_and_stops_nothing(tiny_flux):
    model = tiny_flux()
    model.model.diffusion_model.idle = torch.nn.Linear(128, 128)
    loras = [LORAS["kohya"](), LORAS["generic"]()]
    for lora in loras:
        lora["diffusion_model.idle.lora_A.weight"] = torch.randn(2, 128)
        lora["diffusion_model.idle.lora_B.weight"] = torch.randn(128, 2)
    _, report = solve(collect(model, *map(task, loras), steps=3, refine=1))
    assert "1 layers never ran while collecting, such as diffusion_model.idle, and are summed." in report


def test_the_memory_that_collecting_takes_is_told_before_it_starts(tiny_flux, monkeypatch):
    told = []
    monkeypatch.setattr(
        importlib.import_module("ssr_pack.nodes.calibrating.diffusion_model"), "check_host", told.append
    )
    stats = collect(tiny_flux(), *two(), steps=4, context=8, refine=1)
    calibration = stats.calibration
    kept = sum(s.grams.nbytes for s in calibration.statistics.values())
    kept += sum(c.grams.nbytes + sum(t.nbytes for t in c.targets) for c in calibration.corrections.values())
    (need,) = told
    assert kept <= need.host < 2 * kept  # modulation layers need no correction in the end
    assert need.device > 0


def test_too_little_memory_for_the_statistics_is_an_error_before_the_first_step(tiny_flux, monkeypatch):
    room = importlib.import_module("ssr_pack.nodes.calibrating.memory")
    monkeypatch.setattr(room.management, "get_free_memory", lambda device: 1000)
    monkeypatch.setattr("comfy.samplers.CFGGuider.sample", lambda *args, **kwargs: pytest.fail("a step was sampled"))
    with pytest.raises(ValueError, match=r"need .* of memory, and 0 MB are free.*refine"):
        collect(tiny_flux(), *two())


def test_epochs_of_one_training_are_told_to_be_the_same_subject(tiny_flux, caplog):
    first, later = flux_lora(rank=3, seed=1), flux_lora(rank=3, seed=1)
    later = {key: value * 1.2 + 0.02 * torch.randn_like(value) for key, value in later.items()}
    epochs = task(first, "anna-000004"), task(later, "anna-000008", seeds=(2,))
    stats = collect(tiny_flux(), *epochs, steps=1)
    assert "keep one of anna-000004 and anna-000008" in caplog.text
    assert "keep one of anna-000004 and anna-000008" in solve(stats)[1].splitlines()[1]
    caplog.clear()
    collect(tiny_flux(), epochs[0], task(flux_lora(rank=3, seed=5), "bert"), steps=1)
    assert "keep one" not in caplog.text


def test_on_a_small_card_layers_are_refined_in_groups_and_come_to_the_same(tiny_flux, monkeypatch):
    module = importlib.import_module("ssr_pack.nodes.calibrating.diffusion_model")
    asked = {"steps": 3, "context": 8, "refine": 1}
    whole = collect(tiny_flux(), *two(), **asked)
    told = []
    monkeypatch.setattr(module, "groups_that_fit", lambda patcher, latent, need: told.extend((need(1), need(3))) or 3)
    parted = collect(tiny_flux(), *two(), **asked)
    assert 0 < told[1] <= told[0]
    assert parted.calibration.corrections.keys() == whole.calibration.corrections.keys()
    for site, correction in whole.calibration.corrections.items():
        found = parted.calibration.corrections[site]
        torch.testing.assert_close(found.gram, correction.gram)
        torch.testing.assert_close(found.target, correction.target)


def test_there_are_as_few_groups_as_fit_beside_the_model(tiny_flux, monkeypatch):
    memory = importlib.import_module("ssr_pack.nodes.calibrating.memory")
    patcher, latent = tiny_flux(), empty_latent()["samples"]
    assert memory.groups_that_fit(patcher, latent, lambda groups: 2**60) == 1  # on the processor

    def groups(room: int) -> int:
        used = patcher.model_size() + memory.management.minimum_inference_memory()
        monkeypatch.setattr(memory.management, "get_total_memory", lambda device: used + room)
        return memory.groups_that_fit(patcher, latent, lambda groups: 100 + 1200 // groups)

    monkeypatch.setattr(patcher, "load_device", torch.device("cuda"))
    assert [groups(room) for room in (1300, 1299, 500, 0)] == [1, 2, 3, memory.GROUPS]
