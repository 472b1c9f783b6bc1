"""SSR Quick Merge in a real ComfyUI: what the chain of nodes gives, in one."""

import importlib
from pathlib import Path

import pytest
import torch

from run_nodes import execute, lora_folder, node, relative
from tiny_clip import tiny_clip
from tiny_flux import empty_latent, flux_for_tiny_clip, flux_lora

pytestmark = [pytest.mark.comfy, pytest.mark.usefixtures("pack")]

PROMPTS = ("a cat\na cat at night", "\na house\n\na house in the snow ")


@pytest.fixture(scope="module")
def files(pack, tmp_path_factory):
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("loras")
    key = "lora_te1_text_model_encoder_layers_0_mlp_fc1"
    pair = {f"{key}.lora_up.weight": torch.randn(128, 2), f"{key}.lora_down.weight": torch.randn(2, 64)}
    for seed, name in enumerate(("cat", "house", "third"), 1):
        save_file(flux_lora("kohya", rank=2 + seed, seed=seed) | pair, folder / f"{name}.safetensors")
    with lora_folder(folder):
        yield folder


@pytest.fixture(scope="module")
def model(pack):
    return importlib.import_module("comfy.sd").load_diffusion_model_state_dict(flux_for_tiny_clip())


@pytest.fixture(scope="module")
def clip(pack):
    return tiny_clip(torch.float32)


def chosen(*names, prompts=PROMPTS, strengths=(1.0, 0.6)):
    inputs = {}
    for number, (name, strength, text) in enumerate(zip(names, strengths, prompts, strict=False), 1):
        inputs |= {f"lora_{number}": name, f"strength_{number}": strength, f"prompts_{number}": text}
    return inputs


def quick(model, clip, steps=3, **inputs):
    given = {"model": model, "clip": clip, "latent": empty_latent(), "steps": steps}
    return execute(node("quick_merge.SSRQuickMerge"), **given | inputs)[:4]


def chain(model, clip, **references):
    """(model, clip, lora, report) of the nodes one by one."""
    tasks = ()
    for name, strength, text in zip(("cat", "house"), (1.0, 0.6), PROMPTS, strict=True):
        prompts = execute(node("prompts.SSRPrompts"), clip=clip, text=text, **references)[0]
        given = {"lora_name": f"{name}.safetensors", "strength": strength, "calibration": prompts}
        tasks = execute(node("add_lora.SSRAddLoRA"), **given, tasks=tasks)[0]
    how = {"seed": 0, "steps": 3, "sampler_name": "euler", "scheduler": "simple", "clip": clip}
    stats = execute(node("collect_stats.SSRCollectStats"), model=model, tasks=tasks, latent=empty_latent(), **how)[0]
    settings = {"ridge": 0.01, "rank": 0, "routing": 1.0, "strengths": ""}
    lora, report = execute(node("solve.SSRSolve"), stats=stats, **settings)
    return *execute(node("apply.SSRApply"), model=model, clip=clip, lora=lora, strength=1.0), lora, report


def read(clip):
    with torch.inference_mode():
        return clip.encode_from_tokens(clip.tokenize("a cat in the rain"))


def wide_sample(model, clip):
    nodes = importlib.import_module("nodes")
    with torch.inference_mode():
        cond = clip.encode_from_tokens_scheduled(clip.tokenize("a cat"))
        return nodes.common_ksampler(model, 0, 3, 1.0, "euler", "simple", cond, cond, empty_latent())[0]["samples"]


def test_it_gives_exactly_what_the_nodes_one_by_one_give(model, clip, files):
    one, other = quick(model, clip, **chosen("cat.safetensors", "house.safetensors")), chain(model, clip)
    assert one[3] == other[3]
    assert one[2].keys() == other[2].keys() and all(torch.equal(one[2][key], other[2][key]) for key in other[2])
    assert one[2].metadata == other[2].metadata
    assert torch.equal(wide_sample(*one[:2]), wide_sample(*other[:2]))
    assert torch.equal(read(one[1]), read(other[1])) and relative(read(one[1]), read(clip)) > 1e-3


def test_an_edit_models_pictures_go_to_the_prompts_as_ssr_prompts_gives_them(model, clip, files):
    pictures = {"references": {"samples": torch.randn(3, 16, 8, 8, generator=torch.Generator().manual_seed(5))}}
    names = chosen("cat.safetensors", "house.safetensors")
    one, other = quick(model, clip, **names, **pictures), chain(model, clip, **pictures)
    assert one[3] == other[3] and all(torch.equal(one[2][key], other[2][key]) for key in other[2])
    blind = quick(model, clip, **names)
    assert any(not torch.equal(one[2][key], blind[2][key]) for key in blind[2])


def test_places_without_a_lora_are_passed_over_with_their_prompts(model, clip, files):
    inputs = chosen("cat.safetensors", "None", "house.safetensors", prompts=(*PROMPTS, "x"), strengths=(1, 1, 1))
    report = quick(model, clip, steps=1, **inputs | {"lora_4": None})[3]
    assert "2 LoRAs" in report and "house" in report


def test_numbers_of_combinations_are_those_of_the_inputs_be_some_left_out(model, clip, files):
    inputs = chosen("cat.safetensors", "None", "house.safetensors", prompts=(*PROMPTS, "x"), strengths=(1, 1, 1))
    inputs["prompts_3"] = PROMPTS[1]
    report = quick(model, clip, steps=1, **inputs, combinations="1+3: a cat, a house")[3]
    assert "\ncat + house" in report
    core = importlib.import_module("ssr_pack.ssr_core")
    where = r"SSR Quick Merge: combinations: there is no LoRA 2 to combine; there are 1 cat, 3 house"
    with pytest.raises(core.SSRError, match=where):
        quick(model, clip, steps=1, **inputs, combinations="1+2: a cat, a house")


def test_its_loras_go_on_to_ssr_compare_with_their_prompts(model, clip, files):
    given = {"model": model, "clip": clip, "latent": empty_latent(), "steps": 1, "combinations": "1，2：a cat, a house"}
    inputs = chosen("cat.safetensors", "house.safetensors")
    *_, tasks = execute(node("quick_merge.SSRQuickMerge"), **given, **inputs)
    scenes = importlib.import_module("ssr_pack.nodes.pictures.rendering").scenes_of("", tasks)
    assert [(scene.label, scene.speakers) for scene in scenes] == [
        ("a cat", (0,)),
        ("a house", (1,)),
        ("a cat, a house", (0, 1)),
    ]


def test_few_prompts_are_warned_of_below_what_they_seem_to_say(model, clip, files):
    summary = quick(model, clip, steps=1, **chosen("cat.safetensors", "house.safetensors"))[3].partition("\n\n")[0]
    assert summary.splitlines()[-1].startswith("Few prompts: cat, house.")
    many = "\n".join(f"a cat {n}" for n in range(4)), "\n".join(f"a house {n}" for n in range(4))
    report = quick(model, clip, steps=1, **chosen("cat.safetensors", "house.safetensors", prompts=many))[3]
    assert "Few prompts" not in report


def test_a_stack_of_another_pack_takes_the_place_of_the_pickers(model, clip, files):
    stack = [("cat.safetensors", 1.0, 1.0), ("None", 1.0, 1.0), ("house.safetensors", 0.6, 0.6)]
    prompts = {"prompts_1": PROMPTS[0], "prompts_2": PROMPTS[1], "lora_1": "None", "lora_2": "None"}
    one = quick(model, clip, lora_stack=stack, **prompts)
    other = quick(model, clip, **chosen("cat.safetensors", "house.safetensors"))
    assert all(torch.equal(one[2][key], other[2][key]) for key in other[2])


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        (lambda: {}, "no LoRA to merge"),
        (
            lambda: chosen("cat.safetensors", "house.safetensors", prompts=("a cat", " ")),
            "prompts_2, for house: there is no prompt, and the file does not tell",
        ),
        (lambda: chosen("cat.safetensors"), "only cat is chosen; choose a second"),
        (lambda: chosen("cat.safetensors", "cat.safetensors"), r"lora_1 and lora_2 are the same file, cat\.safe"),
        (
            lambda: chosen("cat.safetensors", "house.safetensors") | {"steps": 0, "polish": 5},
            "polish learns on what was sampled, and with 0 steps",
        ),
        (
            lambda: (
                chosen("cat.safetensors", "house.safetensors", prompts=("a cat", ""))
                | {"references": {"samples": torch.zeros(1, 16, 8, 8)}}
            ),
            "prompts_2, for house: write what shall be done to the pictures",
        ),
        (lambda: chosen("gone.safetensors"), r"no LoRA file 'gone\.safetensors'"),
        (
            lambda: chosen("cat.safetensors") | {"lora_stack": [("house.safetensors", 1, 1)]},
            "here and in lora_stack",
        ),
        (
            lambda: {"lora_stack": [("cat.safetensors", 1, 1)] * 5},
            "holds 5 LoRAs, and there is room",
        ),
    ],
)
def test_what_is_missing_is_told_with_the_place_where_it_goes(model, clip, files, inputs, said):
    core = importlib.import_module("ssr_pack.ssr_core")
    with pytest.raises(core.SSRError, match=said):
        quick(model, clip, **inputs())


def test_an_error_or_a_stop_takes_the_place_of_what_the_node_last_said(model, clip, files, monkeypatch):
    management, told = importlib.import_module("comfy.model_management"), []
    for module in ("quick_merge", "schema.sockets"):
        monkeypatch.setattr(f"ssr_pack.nodes.{module}.say", lambda cls, text: told.append(text))
    given = chosen("cat.safetensors", "house.safetensors")
    with pytest.raises(importlib.import_module("ssr_pack.ssr_core").SSRError) as raised:
        quick(model, clip, **given, combinations="1+3: both")
    assert told[-1] == str(raised.value)

    def stopped():
        raise management.InterruptProcessingException

    monkeypatch.setattr(management, "throw_exception_if_processing_interrupted", stopped)
    with pytest.raises(management.InterruptProcessingException):
        quick(model, clip, **given)
    assert told[-1] == "Stopped; nothing of this run is kept."


def test_a_rank_makes_the_result_smaller(model, clip, files):
    inputs = chosen("cat.safetensors", "house.safetensors")
    sizes = [
        sum(v.numel() for v in quick(model, clip, steps=1, rank=rank, **inputs)[2].values()) for rank in (0, 2, -1)
    ]
    assert sizes[1] < 0.6 * sizes[0] and sizes[2] <= sizes[0]


def test_a_file_replaced_under_the_same_name_is_merged_anew(files):
    cls = node("quick_merge.SSRQuickMerge")
    before = cls.fingerprint_inputs(lora_1="cat.safetensors", lora_2="None")
    assert before == cls.fingerprint_inputs(lora_1="cat.safetensors", lora_2="None")
    path = Path(files) / "cat.safetensors"
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content)
    assert cls.fingerprint_inputs(lora_1="cat.safetensors", lora_2="None") != before


def test_lines_of_combinations_are_sampled_with_their_loras_together(model, clip, files):
    lines = "1+2: a cat, a house\nnone: a crowd"
    *_, report = quick(model, clip, **chosen("cat.safetensors", "house.safetensors"), combinations=lines)
    assert "\ncat + house" in report and "\nsilence" in report and "Never heard together" not in report


def test_without_lines_pairs_are_made_and_can_be_turned_off(model, clip, files):
    *_, made = quick(model, clip, steps=1, **chosen("cat.safetensors", "house.safetensors"))
    *_, none = quick(model, clip, steps=1, **chosen("cat.safetensors", "house.safetensors"), pairs=0)
    assert "\ncat + house" in made and "made of the LoRAs' own" in made
    assert "\ncat + house" not in none and "Never heard together: cat and house." in none


def test_a_combination_of_a_lora_that_is_not_there_is_refused_by_name(model, clip, files):
    core = importlib.import_module("ssr_pack.ssr_core")
    with pytest.raises(core.SSRError, match="no LoRA 3 to combine; there are 1 cat, 2 house"):
        quick(model, clip, **chosen("cat.safetensors", "house.safetensors"), combinations="1+3: both")


def test_lines_of_combinations_go_along_with_a_stack(clip, files):
    stack = [("cat.safetensors", 1.0, 1.0), ("house.safetensors", 1.0, 1.0)]
    (tasks,) = execute(
        node("add_lora_stack.SSRAddLoRAStack"),
        **{"lora_stack": stack, "clip": clip, "prompts": "a cat\n\na house", "combinations": "all: a cat, a house"},
    )
    assert [getattr(one, "which", "") for one in tasks] == ["", "", "all"]


def test_a_stack_and_its_combinations_get_pictures_for_an_edit_model(clip, files):
    stack, pictures = [("cat.safetensors", 1.0, 1.0), ("house.safetensors", 1.0, 1.0)], torch.zeros(2, 16, 4, 4)
    lines = {"prompts": "a cat\n\na house\na hut\na shed", "combinations": "all: a cat, a house"}
    given = {"lora_stack": stack, "clip": clip, **lines, "references": {"samples": pictures}}
    (tasks,) = execute(node("add_lora_stack.SSRAddLoRAStack"), **given)
    assert [len(one.conditioning) for one in tasks] == [2, 3, 2]
    assert all(len(options["reference_latents"]) == 1 for one in tasks for _, options in one.conditioning)


def test_what_was_measured_is_kept_where_the_merge_cannot_be_made(model, clip, files, pack_module):
    """Both replace a norm: SSR Solve can drop it, and needs no new calibration for that."""
    from safetensors.torch import load_file, save_file

    norm = "diffusion_model.single_blocks.0.norm.key_norm"
    for number, name in enumerate(("cat", "house")):
        setting = {f"{norm}.set_weight": torch.full((128,), 1.0 + number)}
        save_file(load_file(files / f"{name}.safetensors") | setting, files / f"set_{name}.safetensors")
    inputs = chosen("set_cat.safetensors", "set_house.safetensors")
    lost = pytest.raises(pack_module("ssr_core").SSRError, match=r"replace .* SSR Load Stats lists it as kept_\d+_")
    with lost as raised:
        quick(model, clip, **inputs)
    (name,) = [name for name in pack_module("nodes.writing.stats_folder").listed() if name in str(raised.value)]
    tasks = ()
    for lora, strength in (("set_cat", 1.0), ("set_house", 0.6)):
        given = {"lora_name": f"{lora}.safetensors", "strength": strength}
        tasks = execute(node("add_lora.SSRAddLoRA"), **given, tasks=tasks)[0]
    stats = execute(node("load_stats.SSRLoadStats"), file=name, model=model, tasks=tasks, clip=clip)[0]
    settings = {"ridge": 0.01, "rank": 0, "routing": 1.0, "strengths": "", "layers": "drop key_norm"}
    lora, _ = execute(node("solve.SSRSolve"), stats=stats, **settings)
    wanted = quick(model, clip, **chosen("cat.safetensors", "house.safetensors"))[2]
    assert lora.keys() == wanted.keys()


def test_it_can_polish_the_merge(model, clip, files):
    """As SSR Polish does, and nothing is trained unless asked for."""
    plain = quick(model, clip, **chosen("cat.safetensors", "house.safetensors"))
    polished = quick(model, clip, polish=2, **chosen("cat.safetensors", "house.safetensors"))
    assert "ssr.polish" not in plain[2].metadata and "Polished" not in plain[3]
    assert "ssr.polish" in polished[2].metadata and "Polished: Error on held-out points" in polished[3]
    key = next(key for key in plain[2] if key.startswith("diffusion_model") and "lora_A" in key)
    assert plain[2][key].shape == polished[2][key].shape and not torch.equal(plain[2][key], polished[2][key])


def test_it_saves_the_merge_where_load_lora_lists_it_if_a_name_is_given(model, clip, files, tmp_path, monkeypatch):
    from safetensors.torch import load_file

    monkeypatch.setattr(importlib.import_module("folder_paths"), "output_directory", str(tmp_path))
    given = chosen("cat.safetensors", "house.safetensors")
    *_, lora, report = quick(model, clip, steps=1, save_as="both/cat house", **given)
    (path,) = (tmp_path / "loras").rglob("*.safetensors")
    assert path.relative_to(tmp_path / "loras").as_posix() == "both/cat house_00001_.safetensors"
    assert "Saved output/loras/both/cat house_00001_.safetensors" in report and load_file(path).keys() == lora.keys()
    assert "Saved" not in quick(model, clip, steps=1, save_as=" ", **given)[-1]
    assert len(list((tmp_path / "loras").rglob("*.safetensors"))) == 1
    with pytest.raises(importlib.import_module("ssr_pack.ssr_core").SSRError, match="leads out of output/loras"):
        execute(node("quick_merge.SSRQuickMerge"), model=None, clip=None, latent=None, save_as="../x", **given)


# --- prompts that nobody wrote ---


@pytest.fixture
def told(files):
    """A LoRA whose file tells of its training, and one that has the same trigger words."""
    from safetensors.torch import load_file, save_file

    for name, of in (("anna", "house"), ("berta", "third")):
        metadata = {"modelspec.trigger_phrase": "anna1 woman"}
        save_file(load_file(files / f"{of}.safetensors"), files / f"{name}.safetensors", metadata=metadata)
    importlib.import_module("folder_paths").filename_list_cache.pop("loras", None)


def test_empty_prompts_are_proposed_from_the_file_and_shown(model, clip, told):
    given = chosen("cat.safetensors", "anna.safetensors", prompts=(PROMPTS[0], " \n"))
    *_, report = quick(model, clip, steps=1, **given)
    assert "Prompts proposed from the files" in report and "anna: anna1 woman in a park in autumn" in report
    assert "  cat: " not in report  # written
    assert "1+2: anna1 woman" in report or "1+2: a cat" in report
    proposed = report.partition("Prompts proposed")[2].splitlines()
    assert sum(line.startswith("  anna: ") for line in proposed) == 6
    (cat,) = execute(node("propose_prompts.SSRProposePrompts"), lora_1="anna.safetensors", count=6, pairs=0)[:1]
    assert [line.removeprefix("  anna: ") for line in proposed if line.startswith("  anna: ")] == cat.splitlines()


def test_prompts_without_the_trigger_words_get_a_warning_on_top(model, clip, told):
    *_, report = quick(model, clip, steps=1, **chosen("cat.safetensors", "anna.safetensors"))
    assert report.startswith('No prompt of anna has its trigger words, which its file says are "anna1 woman"')
    given = chosen("cat.safetensors", "anna.safetensors", prompts=(PROMPTS[0], "anna1 woman in the rain"))
    assert "trigger words" not in quick(model, clip, steps=1, **given)[-1]


def test_a_lora_that_is_off_is_named(model, clip, files):
    given = chosen("cat.safetensors", "house.safetensors", "third.safetensors", strengths=(1.0, 0.0, 1.0))
    given["prompts_3"] = PROMPTS[0]
    assert quick(model, clip, steps=1, **given)[-1].startswith("house is off: its strength is 0.")


def test_two_loras_with_the_same_trigger_words_get_a_warning(model, clip, told):
    *_, report = quick(model, clip, steps=1, **chosen("anna.safetensors", "berta.safetensors", prompts=("", "")))
    assert 'anna and berta are both called by "anna1 woman"' in report
    *_, report = quick(model, clip, steps=1, **chosen("cat.safetensors", "house.safetensors"))
    assert "called by" not in report


def test_proposals_come_apart_by_lora_with_those_of_pairs_and_say_what_is_not_known(told, monkeypatch):
    cls, said = node("propose_prompts.SSRProposePrompts"), []
    monkeypatch.setattr(
        importlib.import_module("ssr_pack.nodes.propose_prompts"), "say", lambda _, text: said.append(text)
    )
    names = {"lora_1": "anna.safetensors", "lora_2": "None", "lora_3": "berta.safetensors", "lora_4": "cat.safetensors"}
    one, two, three, four, together = execute(cls, count=4, pairs=2, **names)
    assert len(one.splitlines()) == len(three.splitlines()) == 4 and two == four == together == ""
    assert "cat: its file does not tell" in said[0] and "both called by" in said[0]
    *_, together = execute(cls, count=4, pairs=2, **names | {"lora_4": "None"})
    assert len(together.splitlines()) == 2 and together.startswith("1+2: anna1 woman")  # as the chain counts
    core = importlib.import_module("ssr_pack.ssr_core")
    with pytest.raises(core.LoraError, match="choose a LoRA"):
        execute(cls, count=4, pairs=2)


def test_with_no_steps_nothing_runs_and_no_prompt_is_read(model, clip, files, monkeypatch):
    ran = []
    monkeypatch.setattr(model.model.diffusion_model, "forward", lambda *_, **__: ran.append(1))
    inputs = chosen("cat.safetensors", "house.safetensors", prompts=("", ""))
    patched, _, lora, report = quick(model, clip, steps=0, **inputs, combinations="not even a combination")
    assert not ran and "from the weights alone" in report
    assert {key.partition(".")[0] for key in lora} == {"diffusion_model", "text_encoders"}
    assert patched.patches and model.patches == {}


def test_with_no_steps_a_stack_may_hold_any_number_of_loras(model, clip, files):
    stack = [("cat.safetensors", 0.5, 0.5), ("house.safetensors", 1.0, 1.0), ("third.safetensors", 1.0, 1.0)] * 2
    assert "\n6 LoRAs" in quick(model, clip, steps=0, lora_stack=stack)[3]
