"""The text encoder's part of LoRAs in a real ComfyUI: routed where a CLIP is connected, else summed."""

import importlib

import pytest
import torch

from run_nodes import collect, execute, lora_folder, node, relative, solve
from tiny_clip import tiny_clip
from tiny_flux import flux_for_tiny_clip, flux_lora

pytestmark = [pytest.mark.comfy, pytest.mark.usefixtures("pack")]

SPELLINGS = {
    "kohya": ("lora_te1_text_model_encoder_layers_{}_{}", "_"),
    "diffusers": ("text_encoder.text_model.encoder.layers.{}.{}", "."),
    "generic": ("text_encoders.clip_l.transformer.text_model.encoder.layers.{}.{}", "."),
}
LAYERS = {"self_attn.q_proj": (64, 64), "self_attn.out_proj": (64, 64), "mlp.fc1": (128, 64), "mlp.fc2": (64, 128)}
PROMPTS = (
    "a cat on the grass\na cat at night\na black cat in the kitchen\ntwo cats",
    "a house in the snow\na tree, sepia style\na red car on a road\nan old ship at sea, sepia style",
)


def cases_of(loras):
    """Each LoRA by itself, with its prompts."""
    module = importlib.import_module("ssr_pack.nodes.calibrating.case_prompts")
    return module.cases_of([lora.task for lora in loras], (), 0)


@pytest.fixture(scope="module")
def clip(pack):
    return tiny_clip(torch.float32)


def text_lora(spelling="kohya", rank=3, seed=1, layers=(0, 1)):
    name, dot = SPELLINGS[spelling]
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for i in layers:
        for layer, (out, inputs) in LAYERS.items():
            key = name.format(i, layer.replace(".", dot))
            tensors[f"{key}.lora_down.weight"] = torch.randn(rank, inputs, generator=generator) / inputs**0.5
            tensors[f"{key}.lora_up.weight"] = 0.5 * torch.randn(out, rank, generator=generator)
            tensors[f"{key}.alpha"] = torch.tensor(2.0)
    return tensors


def prompts(clip, text):
    return execute(node("prompts.SSRPrompts"), clip=clip, text=text)[0]


def with_model(*spellings):
    """LoRAs that change both the model and the text encoder."""
    return [
        flux_lora("kohya", rank=2, seed=seed) | text_lora(spelling, rank=2 + seed, seed=seed)
        for seed, spelling in enumerate(spellings, 1)
    ]


def tasks_of(clip, loras, clip_strengths=(None, None)):
    task = importlib.import_module("ssr_pack.nodes.reading.task")
    return [
        task.Task(f"lora{i}", lora, 1.0, prompts(clip, text), None, clip_strength)
        for i, (lora, clip_strength, text) in enumerate(zip(loras, clip_strengths, PROMPTS, strict=True))
    ]


@pytest.fixture
def model(tiny_flux):
    """With text inputs as wide as the tiny CLIP's outputs."""
    return importlib.import_module("comfy.sd").load_diffusion_model_state_dict(flux_for_tiny_clip())


def apply_to(clip, model, lora):
    return execute(node("apply.SSRApply"), model=model, lora=lora, strength=1.0, clip=clip)[1]


def load_text(clip, *loras, strengths=(1.0, 1.0)):
    """By ComfyUI's own Load LoRA."""
    sd = importlib.import_module("comfy.sd")
    for lora, strength in zip(loras, strengths, strict=False):
        clip = sd.load_lora_for_models(None, clip, dict(lora), 0, strength)[1]
    return clip


def read(clip, text="a cat in the rain"):
    with torch.inference_mode():
        return clip.encode_from_tokens(clip.tokenize(text))


@pytest.mark.parametrize("spellings", [("kohya", "kohya"), ("diffusers", "generic"), ("generic", "kohya")])
@pytest.mark.parametrize("connected", [True, False])
def test_stacked_without_routing_the_text_encoder_reads_as_with_load_lora(model, clip, spellings, connected):
    loras = with_model(*spellings)
    lora, _ = solve(collect(model, *tasks_of(clip, loras), steps=1, clip=clip if connected else None), routing=0.0)
    expected = read(load_text(clip, *loras))
    assert relative(read(clip), expected) > 1e-2
    assert relative(read(apply_to(clip, model, lora)), expected) < 1e-5


def test_calibration_prompts_are_encoded_with_their_own_lora_on_the_text_encoder(model, clip):
    patches, text_encoder = (
        importlib.import_module(f"ssr_pack.nodes.{name}") for name in ("reading.patches", "calibrating.text_encoder")
    )
    loras = with_model("kohya", "diffusers")
    loras[0]["lora_te1_text_model_encoder_layers_0_mlp_fc1.diff_b"] = torch.full((128,), 0.3)
    read_loras = [patches.read_task(task, model, clip) for task in tasks_of(clip, loras)]
    with torch.inference_mode():
        tasks, calibration = text_encoder.calibrate_text(clip, read_loras, cases_of(read_loras))
        for task, lora, lines in zip(tasks, loras, PROMPTS, strict=True):
            for (cond, options), line in zip(task.conditioning, lines.splitlines(), strict=True):
                alone = load_text(clip, lora)
                ((expected, more),) = alone.encode_from_tokens_scheduled(alone.tokenize(line))
                assert relative(cond, expected) < 1e-5
                assert relative(options["pooled_output"], more["pooled_output"]) < 1e-5
    assert len(calibration.statistics) == 8 and min(min(s.tokens) for s in calibration.statistics.values()) == 4 * 77
    assert not any(m._forward_hooks for m in clip.cond_stage_model.modules())


def test_a_routed_text_encoder_reads_each_prompt_more_like_its_own_lora_than_a_stack_does(model, clip):
    loras = with_model("kohya", "generic")
    lora, report = solve(collect(model, *tasks_of(clip, loras), steps=1, clip=clip))
    assert "2 LoRAs, 8 sites, 8 of them shared" in report.partition("Text encoder:")[2]
    merged, stacked = apply_to(clip, model, lora), load_text(clip, *loras)
    for alone, lines in zip(loras, PROMPTS, strict=True):
        for line in lines.splitlines():
            wanted = read(load_text(clip, alone), line)
            assert relative(read(merged, line), wanted) < 0.7 * relative(read(stacked, line), wanted)


def test_the_saved_file_through_load_lora_is_ssr_apply_on_the_text_encoder_too(model, clip, caplog):
    import comfy.sd
    import comfy.utils
    import folder_paths

    loras = with_model("kohya", "generic")
    loras[0]["lora_te1_text_model_encoder_layers_0_mlp_fc1.diff_b"] = torch.full((128,), 0.3)
    lora, _ = solve(collect(model, *tasks_of(clip, loras), steps=1, clip=clip))
    name = execute(node("save_lora.SSRSaveLoRA"), lora=lora, filename_prefix="text", dtype="float32")[0]
    file = comfy.utils.load_torch_file(folder_paths.get_full_path("loras", name), safe_load=True)
    caplog.clear()
    _, loaded = comfy.sd.load_lora_for_models(model, clip, file, 1.0, 1.0)
    assert "not loaded" not in caplog.text.lower()
    assert relative(read(loaded), read(apply_to(clip, model, lora))) < 1e-6


def test_the_text_encoder_has_a_strength_of_its_own(model, clip):
    loras = with_model("kohya", "generic")
    tasks = tasks_of(clip, loras, clip_strengths=(0.25, 0.0))
    for connected in (clip, None):
        stats = collect(model, *tasks, steps=1, clip=connected)
        lora, _ = solve(stats, routing=0.0)
        assert relative(read(apply_to(clip, model, lora)), read(load_text(clip, loras[0], strengths=(0.25,)))) < 1e-5
        lora, _ = solve(stats, routing=0.0, strengths="2, 1")  # both parts in proportion
        assert relative(read(apply_to(clip, model, lora)), read(load_text(clip, loras[0], strengths=(0.5,)))) < 1e-5


def test_rules_can_leave_the_text_encoder_out(model, clip):
    loras = with_model("kohya", "generic")
    for connected in (clip, None):
        lora, _ = solve(collect(model, *tasks_of(clip, loras), steps=1, clip=connected), layers="drop text_encoder")
        assert not any(key.startswith(("text_encoder", "lora_te")) for key in lora)
        lora, _ = solve(collect(model, *tasks_of(clip, loras), steps=1, clip=connected), layers="drop double_blocks")
        assert any(key.startswith(("text_encoder", "lora_te")) for key in lora)


def test_a_lora_of_the_text_encoder_alone_can_be_merged_where_a_clip_is_connected(model, clip):
    loras = [text_lora("kohya", seed=1), with_model("kohya")[0]]
    stats = collect(model, *tasks_of(clip, loras), steps=1, clip=clip)
    lora, report = solve(stats, routing=0.0)
    assert "lora0, 24 tensors: 24 routed." in report
    assert relative(read(apply_to(clip, model, lora)), read(load_text(clip, *loras))) < 1e-5


def test_options_that_other_nodes_gave_a_prompt_are_kept_and_what_they_encoded_anew_too(model, clip):
    patches, text_encoder = (
        importlib.import_module(f"ssr_pack.nodes.{name}") for name in ("reading.patches", "calibrating.text_encoder")
    )
    first, second = tasks_of(clip, with_model("kohya", "kohya"))
    first.conditioning[0][1]["guidance"] = 3.5
    second.conditioning[0][0] = torch.cat([second.conditioning[0][0]] * 2, dim=1)  # as Conditioning (Concat) does
    loras = [patches.read_task(task, model, clip) for task in (first, second)]
    with torch.inference_mode():
        (one, two), _ = text_encoder.calibrate_text(clip, loras, cases_of(loras))
    assert one.conditioning[0][1]["guidance"] == 3.5
    assert not torch.equal(one.conditioning[0][0], first.conditioning[0][0])
    assert torch.equal(two.conditioning[0][0], second.conditioning[0][0])


def test_prompts_of_unknown_text_are_refused_with_a_remedy(model, clip):
    core = importlib.import_module("ssr_pack.ssr_core")
    tasks = tasks_of(clip, with_model("kohya", "kohya"))
    del tasks[1].conditioning[0][1]["ssr_prompt"]
    with pytest.raises(core.SSRError, match=r"lora1: clip is connected, but the text .* SSR Prompts"):
        collect(model, *tasks, steps=1, clip=clip)
    collect(model, *tasks, steps=1)


# --- stacks of other packs ---


def add_stack(clip, stack, text, tasks=()):
    return execute(node("add_lora_stack.SSRAddLoRAStack"), lora_stack=stack, clip=clip, prompts=text, tasks=tasks)[0]


@pytest.fixture
def files(pack, tmp_path):
    from safetensors.torch import save_file

    (tmp_path / "people").mkdir()
    for name, lora in zip(("people/cat", "house"), with_model("kohya", "generic"), strict=True):
        save_file({key: value.contiguous() for key, value in lora.items()}, tmp_path / f"{name}.safetensors")
    with lora_folder(tmp_path):
        yield tmp_path


STACK = [("people\\cat.safetensors", 0.8, 0.3), ("house.safetensors", 1.2, 1.0), ("None", 1.0, 1.0)]


def test_a_stack_becomes_one_task_per_lora_with_its_strengths_and_its_own_prompts(clip, files):
    first, second = add_stack(clip, STACK, "a cat\na cat at night\n \n\na house")
    assert (first.name, first.strength, first.text_strength) == ("cat", 0.8, 0.3)
    assert (second.name, second.strength, second.text_strength) == ("house", 1.2, 1.0)
    assert [len(task.conditioning) for task in (first, second)] == [2, 1]
    assert add_stack(clip, STACK[1:2], "a house", (first,))[0] is first


def test_a_merged_stack_does_what_load_lora_does_with_its_strengths(model, clip, files):
    from safetensors.torch import load_file

    loras = [load_file(files / "people" / "cat.safetensors"), load_file(files / "house.safetensors")]
    tasks = add_stack(clip, STACK, "a cat\n\na house")
    lora, _ = solve(collect(model, *tasks, steps=1, clip=clip), routing=0.0)
    assert relative(read(apply_to(clip, model, lora)), read(load_text(clip, *loras, strengths=(0.3, 1.0)))) < 1e-5


@pytest.mark.parametrize("text", ["a cat", "a cat\n\na house\n\na tree", ""])
def test_a_stack_with_prompts_for_another_number_of_loras_is_refused(clip, files, text):
    core = importlib.import_module("ssr_pack.ssr_core")
    with pytest.raises(core.LoraError, match=r"2 LoRAs in the stack \(cat, house\) and prompts for"):
        add_stack(clip, STACK, text)


def test_a_stack_that_names_a_file_nobody_has_is_refused(clip, files):
    core = importlib.import_module("ssr_pack.ssr_core")
    with pytest.raises(core.LoraError, match=r"no LoRA file 'gone\.safetensors'"):
        add_stack(clip, [("gone.safetensors", 1.0, 1.0)], "a prompt")


# --- more ---


def test_a_lora_may_change_the_text_encoder_only_by_its_strengths(model, clip):
    loras = with_model("kohya", "generic")
    task = importlib.import_module("ssr_pack.nodes.reading.task")
    tasks = [task.Task("a", loras[0], 0.0, prompts(clip, PROMPTS[0]), None, 1.0), tasks_of(clip, loras)[1]]
    for connected in (clip, None):
        lora, _ = solve(collect(model, *tasks, steps=1, clip=connected), routing=0.0)
        assert relative(read(apply_to(clip, model, lora)), read(load_text(clip, *loras))) < 1e-5


def test_a_lora_of_another_base_is_not_accepted_for_its_text_encoder(model, clip):
    core = importlib.import_module("ssr_pack.ssr_core")
    wrong = {f"lora_unet_input_blocks_4_1_proj_in.lora_{half}.weight": torch.ones(4, 4) for half in ("up", "down")}
    good, bad = tasks_of(clip, [with_model("kohya")[0], wrong | text_lora("kohya", seed=2)])
    for connected in (clip, None):
        with pytest.raises(core.ModelMismatchError, match=r"lora1 does not fit this model .* none of its 2 tensors"):
            collect(model, good, bad, steps=1, clip=connected)


def test_at_least_one_lora_must_change_the_model(model, clip):
    core = importlib.import_module("ssr_pack.ssr_core")
    tasks = tasks_of(clip, [text_lora("kohya", seed=seed) for seed in (1, 2)])
    with pytest.raises(core.LoraError, match="None of lora0, lora1 changes a layer of the model"):
        collect(model, *tasks, steps=1, clip=clip)


def test_differences_in_two_spellings_are_summed_too(model, clip):
    loras = with_model("kohya", "diffusers")
    loras[0]["lora_te1_text_model_encoder_layers_0_mlp_fc1.diff_b"] = torch.full((128,), 0.3)
    loras[1]["text_encoder.text_model.encoder.layers.0.mlp.fc1.diff_b"] = torch.full((128,), -0.8)
    for connected in (clip, None):
        lora, _ = solve(collect(model, *tasks_of(clip, loras), steps=1, clip=connected), routing=0.0)
        assert relative(read(apply_to(clip, model, lora)), read(load_text(clip, *loras))) < 1e-5


def test_a_negative_prompt_of_known_text_is_read_with_each_lora(model, clip):
    patches, text_encoder = (
        importlib.import_module(f"ssr_pack.nodes.{name}") for name in ("reading.patches", "calibrating.text_encoder")
    )
    loras = with_model("kohya", "generic")
    negative = [*prompts(clip, "blurry"), [torch.zeros(1, 77, 64), {}]]
    with torch.inference_mode():
        read_loras = [patches.read_task(task, model, clip) for task in tasks_of(clip, loras)]
        tasks, _ = text_encoder.calibrate_text(clip, read_loras, cases_of(read_loras), negative)
        for task, lora in zip(tasks, loras, strict=True):
            assert relative(task.negative[0][0], read(load_text(clip, lora), "blurry")) < 1e-5
            assert torch.equal(task.negative[1][0], negative[1][0])
    collect(model, *tasks_of(clip, loras), steps=1, clip=clip, negative=negative, cfg=3.0)


def test_few_prompts_are_told_as_such_and_not_as_few_steps(model, clip):
    loras = with_model("kohya", "generic")
    tasks = tasks_of(clip, loras)
    for task in tasks:
        del task.conditioning[2:]
    _, report = solve(collect(model, *tasks, steps=4, clip=clip))
    assert "seen at 2 samples only" in report and "prompts or more" in report
    assert "noise level" not in report


# --- its statistics ---


def load_stats(stats, model, tasks, **more):
    file = execute(node("save_stats.SSRSaveStats"), stats=stats, filename_prefix="text", keep_prompts=True)[0]
    return execute(node("load_stats.SSRLoadStats"), file=file, model=model, tasks=tuple(tasks), **more)[0]


@pytest.mark.parametrize("order", [1, -1])
def test_saved_statistics_of_the_text_encoder_solve_to_the_same_lora(model, clip, order):
    tasks = tasks_of(clip, with_model("kohya", "generic"))
    stats = collect(model, *tasks, steps=1, clip=clip)
    loaded = load_stats(stats, model, tasks[::order], clip=clip)
    (lora, _), (again, _) = solve(stats), solve(loaded)
    assert any(key.startswith("text_encoders.") for key in lora)
    if order == 1:
        assert lora.keys() == again.keys() and all(torch.equal(lora[key], again[key]) for key in lora)
    assert relative(read(apply_to(clip, model, again)), read(apply_to(clip, model, lora))) < 1e-5
    assert loaded.collections[0].prompts == tuple(tuple(text.splitlines()) for text in PROMPTS[::order])


def test_saved_statistics_ask_for_the_clip_they_were_collected_with_and_ignore_one_they_were_not(model, clip):
    core = importlib.import_module("ssr_pack.ssr_core")
    tasks = tasks_of(clip, with_model("kohya", "generic"))
    with pytest.raises(core.StatisticsError, match="collected with clip connected; connect it here"):
        load_stats(collect(model, *tasks, steps=1, clip=clip), model, tasks)
    loaded = load_stats(collect(model, *tasks, steps=1), model, tasks, clip=clip)
    assert loaded.text is None and not loaded.with_clip


def test_statistics_of_the_text_encoder_add_up_where_they_were_collected_like_each_other(model, clip):
    core = importlib.import_module("ssr_pack.ssr_core")
    tasks = tasks_of(clip, with_model("kohya", "generic"))
    first = collect(model, *tasks, steps=1, clip=clip, pairs=0)
    second = collect(model, *tasks[::-1], steps=1, seed=7, clip=clip, like=first, pairs=0)
    both = execute(node("add_stats.SSRAddStats"), stats_a=first, stats_b=second)[0]
    for site, statistics in both.text.statistics.items():
        torch.testing.assert_close(statistics.gram, 2 * first.text.statistics[site].gram, rtol=1e-5, atol=1e-5)
    with pytest.raises(core.StatisticsError, match="at like were collected with clip; connect clip here"):
        collect(model, *tasks, steps=1, like=first)


def test_the_report_on_conflicts_has_a_part_on_the_text_encoder(model, clip):
    stats = collect(model, *tasks_of(clip, with_model("kohya", "kohya")), steps=1, clip=clip)
    text = execute(node("report.SSRReport"), stats=stats)[0]
    assert "Text encoder: 2 LoRAs in 8 sites of 2 blocks" in text
