"""Combinations in a real ComfyUI: prompts that ask for several LoRAs at once, or for none."""

import importlib
from dataclasses import replace

import pytest
import torch

from run_nodes import apply, collect, execute, load_lora, node, relative, sample, solve, task
from tiny_clip import tiny_clip
from tiny_flux import conditioning, flux_lora

pytestmark = [pytest.mark.comfy, pytest.mark.usefixtures("pack")]

LORAS = (
    lambda: flux_lora("kohya", rank=4, alpha=2.0, seed=1),
    lambda: flux_lora("diffusers", rank=3, seed=2),
    lambda: flux_lora("generic", rank=2, seed=3),
)
JOINT = 7  # the seed of a prompt that asks for two


@pytest.fixture
def model(tiny_flux):
    return tiny_flux()


def module(name):
    return importlib.import_module(f"ssr_pack.{name}")


def together(which: str, *seeds: int):
    return module("nodes.reading.combination").Combination(which, [e for s in seeds for e in conditioning(s)])


def tasks(count: int = 3, strengths=(1.0, 0.7, 1.2)):
    named = zip(("cat", "dog", "sepia"), LORAS[:count], strengths, strict=False)
    return [task(lora(), name, strength, (10 + i, 20 + i)) for i, (name, lora, strength) in enumerate(named)]


def speakers(stats):
    return [case.speakers for case in stats.calibration.cases]


# --- the node, and who is meant ---


def test_the_node_adds_to_the_chain_wherever_it_stands(model):
    first, second, third = tasks()
    (chain,) = execute(node("add_combination.SSRAddCombination"), loras="1, 3", calibration=conditioning(JOINT))
    (chain,) = execute(
        node("add_combination.SSRAddCombination"), loras="none", calibration=conditioning(8), tasks=(first, *chain)
    )
    stats = collect(model, *chain, second, third, steps=1)
    assert speakers(stats) == [(0,), (1,), (2,), (), (0, 2)] or speakers(stats) == [(0,), (1,), (2,), (0, 2), ()]


@pytest.mark.parametrize(
    ("which", "found"),
    [
        *(("1, 3", (0, 2)), ("3+1", (0, 2)), ("2;3", (1, 2)), ("all", (0, 1, 2)), (" None ", ())),
        *(("mochi_cat, sepia", (0, 2)), ("MOCHI, 2", (0, 1)), ("robo + sepia_style", (1, 2))),
    ],
)
def test_loras_are_named_by_number_name_or_part_of_it(which, found):
    assert together(which, JOINT).case(["mochi_cat", "robo_robot", "sepia_style"]).speakers == found


@pytest.mark.parametrize(
    ("which", "said"),
    [
        ("1, 4", "no LoRA 4 to combine; there are 1 mochi_cat, 2 mochi_dog, 3 sepia"),
        ("0, 1", "no LoRA 0"),
        ("1, 1", "'1, 1' names mochi_cat twice"),
        ("1, mochi_cat", "names mochi_cat twice"),
        ("2", "is of one LoRA, mochi_dog"),
        ("mochi, sepia", "'mochi' may be any of 1, 2 of the LoRAs"),
        ("horse, sepia", "'horse' stands for none of the LoRAs"),
        (" , ", "does not say which LoRAs"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name(which, said):
    core = module("ssr_core")
    with pytest.raises(core.SSRError, match=said):
        together(which, JOINT).case(["mochi_cat", "mochi_dog", "sepia"])


@pytest.mark.parametrize(
    ("chain", "said"),
    [
        (lambda: [*tasks(), together("1, 5", JOINT)], "no LoRA 5"),
        (lambda: [*tasks(), together("1, 2")], "'1, 2' has no prompt"),
        (lambda: [tasks()[0], together("none", JOINT)], "only LoRA"),
        (lambda: [together("none", JOINT)], "no LoRA to merge"),
    ],
)
def test_bad_combinations_are_refused_before_anything_is_sampled(chain, said, model, monkeypatch):
    core = module("ssr_core")
    ran = []
    monkeypatch.setattr(type(model.model), "apply_model", lambda *a, **k: ran.append(1))
    with pytest.raises(core.SSRError, match=said):
        collect(model, *chain(), steps=1)
    assert ran == []


# --- sampling and merging ---


@pytest.mark.parametrize("which", [(0, 2), (0, 1, 2), ()])
def test_a_combination_runs_as_its_loras_loaded_one_after_the_other(which, model):
    """The latent that the run ends with, the LoRAs in hooks and no weight touched."""
    calibrate, runs, case_prompts = (
        module(f"nodes.calibrating.{name}") for name in ("diffusion_model", "runs", "case_prompts")
    )
    patches = module("nodes.reading.patches")
    loras = tasks()
    named = ", ".join(str(number + 1) for number in which) or "none"
    cases = case_prompts.cases_of(loras, [together(named, 1)])
    how, seen = runs.Sampling(0, 4, "euler", "simple"), []
    plan = [run for run in runs.plan(cases, how, 0, 0) if run.case.case.speakers == which]
    with torch.inference_mode():
        read = [patches.read_task(one, model) for one in loras]
        calibrate.calibrate(
            *(model, read, plan, {"samples": torch.zeros(1, 16, 8, 8)}, 0),
            on_step=seen.append,
            on_run=lambda number: None,
        )
    stacked = model
    for number in which:
        stacked = load_lora(stacked, LORAS[number](), loras[number].strength)
    assert relative(model.model.process_latent_out(seen[-1]), sample(stacked)) < 1e-5


def test_a_merge_that_heard_both_together_does_both_better_than_one_that_did_not(model):
    loras = tasks(2, (1.0, 1.0))
    wanted = sample(load_lora(load_lora(model, LORAS[0]()), LORAS[1]()), prompt=JOINT)
    errors = []
    for chain in (loras, [*loras, together("all", JOINT)]):
        merged, _ = solve(collect(model, *chain, context=64, refine=1, pairs=0))
        errors.append(relative(sample(apply(model, merged), prompt=JOINT), wanted))
    assert errors[1] < 0.6 * errors[0]


def test_the_report_has_a_row_for_the_combination_and_warns_of_pairs_that_were_not_heard(model):
    _, report = solve(collect(model, *tasks(), together("1, 3", JOINT), steps=1))
    assert "\ncat + sepia " in report
    assert "Never heard together: cat and dog, dog and sepia." in report


def test_combinations_are_refined_and_their_runs_are_as_many(model):
    stats = collect(model, *tasks(2), together("1, 2", JOINT), refine=1)
    targets = next(iter(stats.calibration.corrections.values())).targets
    assert len(targets) == 3 and all(target.numel() for target in targets)


def test_where_memory_is_short_all_cases_are_summed_while_refining_and_merge_to_the_same(
    model, pack_module, monkeypatch
):
    chain = [*tasks(2), together("1, 2", JOINT)]
    apart, memory = collect(model, *chain, refine=1), pack_module("nodes.calibrating.diffusion_model")
    monkeypatch.setattr(memory, "free_host", lambda: 0)
    monkeypatch.setattr(memory, "check_host", lambda need: None)
    folded = collect(model, *chain, refine=1)
    assert all(correction.is_folded for correction in folded.calibration.corrections.values())
    one, other = (solve(stats)[0] for stats in (apart, folded))
    assert relative(sample(apply(model, one)), sample(apply(model, other))) < 1e-4


def test_statistics_with_combinations_come_back_from_their_file_in_any_order(model):
    stats = collect(model, *tasks(), together("1, 3", JOINT), together("none", 8), refine=1)
    file = execute(node("save_stats.SSRSaveStats"), stats=stats, filename_prefix="both", keep_prompts=True)[0]
    load = node("load_stats.SSRLoadStats")
    loaded = execute(load, file=file, model=model, tasks=(*tasks(), together("1, 2", 3)))[0]
    assert speakers(loaded) == speakers(stats) and loaded.collections == stats.collections
    assert all(torch.equal(a, b) for a, b in zip(solve(loaded)[0].values(), solve(stats)[0].values(), strict=True))
    turned = execute(load, file=file, model=model, tasks=tuple(tasks()[::-1]))[0]
    assert speakers(turned) == [(0,), (1,), (2,), (0, 2), ()]
    assert [heard.speakers for heard in turned.collections[0].combinations] == [(0, 2), ()]


def test_the_merged_file_tells_which_combinations_were_heard(model):
    import json

    lora, _ = solve(collect(model, *tasks(), together("1, 3", JOINT, 8), steps=1))
    told = json.loads(lora.metadata["ssr.calibration"])["combinations"]
    assert told == [{"loras": [0, 2], "prompts": 2}]


def test_combinations_merged_in_another_proportion_than_they_were_heard_in_are_told(model):
    stats = collect(model, *tasks(), together("1, 3", JOINT), steps=1)
    assert "at other strengths" not in solve(stats)[1]
    assert "at other strengths" not in solve(stats, strengths="0.5, 0.7, 0.6")[1]
    assert "merged at: cat + sepia." in solve(stats, strengths="1, 0.7, 0.3")[1]


# --- pairs made of the LoRAs' own prompts ---


def with_texts(count: int = 3, clip=None, width: int = 32):
    """Tasks whose prompts remember their text; the tiny Flux reads 32 channels of each token."""
    clip = clip or Narrow(tiny_clip(torch.float32), width)
    encode = module("nodes.calibrating.prompt").encode_lines
    lines = (
        *(("a cat", "a cat at night"), ("a dog", "a dog in the snow")),
        ("a red house on grass, sepia", "a car in the desert, sepia"),
    )
    return [
        replace(one, conditioning=encode(clip, texts, "test")) for one, texts in zip(tasks(count), lines, strict=False)
    ]


class Narrow:
    """A text encoder whose output is cut to the few channels that the tiny Flux reads."""

    def __init__(self, clip, width):
        self.clip, self.width = clip, width

    def tokenize(self, text):
        return self.clip.tokenize(text)

    def encode_from_tokens_scheduled(self, tokens):
        entries = self.clip.encode_from_tokens_scheduled(tokens)
        return [
            [c[..., : self.width].clone(), {**o, "pooled_output": o["pooled_output"][..., :16].clone()}]
            for c, o in entries
        ]


def texts_of(cases):
    return {one.name: module("nodes.calibrating.prompt").texts(one.conditioning) for one in cases}


def test_pairs_are_made_of_the_loras_own_texts_where_nothing_is_asked_for():
    cases_of, loras = module("nodes.calibrating.case_prompts").cases_of, with_texts()
    assert list(texts_of(cases_of(loras, ()))) == ["cat", "dog", "sepia", "cat + dog", "cat + sepia", "dog + sepia"]
    two_of_a_kind, in_a_style = (texts_of(cases_of([loras[0], other], ())) for other in loras[1:])
    assert two_of_a_kind["cat + dog"] == ("a cat, dog", "a dog in the snow, cat")  # they take turns
    assert in_a_style["cat + sepia"] == ("a cat, sepia", "a cat at night, sepia")


def test_a_styles_words_follow_the_characters_scenes_wherever_they_stand_in_the_chain():
    loras = with_texts()
    found = texts_of(module("nodes.calibrating.case_prompts").cases_of([loras[2], loras[0]], (), 2))
    assert found["sepia + cat"] == ("a cat, sepia", "a cat at night, sepia")


def test_whole_prompts_are_glued_where_a_lora_has_no_words_of_its_own():
    loras = with_texts(2)
    loras = [replace(one, conditioning=one.conditioning[:1]) for one in loras]
    found = texts_of(module("nodes.calibrating.case_prompts").cases_of(loras, (), 2))
    assert found["cat + dog"] == ("a cat, a dog", "a dog, a cat")


def test_all_pairs_together_have_no_more_prompts_than_the_loras_themselves_but_one_each_at_least():
    cases_of, loras = module("nodes.calibrating.case_prompts").cases_of, with_texts()
    twice = [replace(one, conditioning=[*one.conditioning, *one.conditioning]) for one in loras]
    four = [replace(one, conditioning=one.conditioning * 4) for one in loras]
    bare = [replace(one, conditioning=one.conditioning[: 2 - i]) for i, one in enumerate(loras[:2])]
    assert [len(one.conditioning) for one in cases_of([*bare, bare[1]], (), 64)[3:]] == [1] * 3  # of 4 // 3
    for given, count in ((loras, 2), (twice, 4), (four, 8)):
        assert [len(one.conditioning) for one in cases_of(given, (), 64)[3:]] == [count] * 3
    assert [len(one.conditioning) for one in cases_of(four, (), 3)[3:]] == [3] * 3


@pytest.mark.parametrize("length", range(1, 20))
def test_prompts_are_taken_from_all_over_the_list_and_none_twice_before_all_had_their_turn(length):
    spread = module("nodes.wording.couplings").spread
    assert sorted(spread(length, length)) == list(range(length))
    assert spread(length, 2 * length, 1)[length:] == spread(length, length, 1)
    if length == 8:
        assert spread(8, 4) == [0, 5, 2, 7]  # four places, then the same four in other words: all four


def test_no_pairs_are_made_where_they_are_turned_off_asked_for_or_texts_are_not_known():
    cases_of, loras = module("nodes.calibrating.case_prompts").cases_of, with_texts()
    assert len(cases_of(loras, (), 0)) == 3
    assert [one.name for one in cases_of(loras, [together("1, 2", JOINT)], 2)] == ["cat", "dog", "sepia", "cat + dog"]
    assert len(cases_of([*loras[:2], replace(loras[2], conditioning=conditioning(3))], (), 2)) == 3
    pictures = replace(loras[2], latent={"samples": torch.zeros(1, 16, 8, 8)})
    assert len(cases_of([*loras[:2], pictures], (), 2)) == 3


def test_a_prompt_that_another_node_gave_another_tensor_is_not_glued_and_its_options_are_kept():
    cases_of, loras = module("nodes.calibrating.case_prompts").cases_of, with_texts(2)
    guided = [[cond, {**options, "guidance": 3.5}] for cond, options in loras[0].conditioning]
    glued = cases_of([replace(loras[0], conditioning=guided), loras[1]], (), 2)[2]
    assert [options.get("guidance") for _, options in glued.conditioning] == [3.5, 3.5]
    changed = [[cond + 1, options] for cond, options in loras[0].conditioning]
    assert len(cases_of([replace(loras[0], conditioning=changed), loras[1]], (), 2)) == 2


def test_collecting_makes_pairs_by_default_says_so_and_remembers_it(model):
    said = []
    stats = collect_telling(model, with_texts(2), said.append)
    assert speakers(stats) == [(0,), (1,), (0, 1)]
    assert "3 of them for several LoRAs at once (made of the LoRAs' own)" in said[-1]
    assert stats.collections[0].combinations[0].is_glued
    assert "made of the LoRAs' own" in solve(stats)[1]
    assert speakers(collect_telling(model, with_texts(2), said.append, pairs=0)) == [(0,), (1,)]


def test_pairs_that_nobody_asked_for_are_measured_and_not_refined(model):
    runs, case_prompts = (module(f"nodes.calibrating.{name}") for name in ("runs", "case_prompts"))
    sampling = runs.Sampling(0, 4, "euler", "simple")
    for asked, refined in (((), {0, 1}), ([together("all", JOINT)], {0, 1, 2})):
        plan = runs.plan(case_prompts.cases_of(with_texts(2), asked), sampling, 16, 1)
        assert {run.index for run in plan if run.kind is runs.Kind.MEASURE} == {0, 1, 2}
        assert {run.index for run in plan if run.kind is runs.Kind.REFINE} == refined


@pytest.mark.parametrize(("steps", "refined"), [(3, 3), (4, 3), (8, 4), (20, 10)])
def test_refinements_take_half_of_the_steps_but_three_and_all_of_a_range(model, steps, refined):
    runs, case_prompts = (module(f"nodes.calibrating.{name}") for name in ("runs", "case_prompts"))
    cases = case_prompts.cases_of(with_texts(2), ())
    for sampling, wanted in (
        (runs.Sampling(0, steps, "euler", "simple"), refined),
        (runs.Sampling(0, steps + 2, "euler", "simple", start=2), steps + 2),
    ):
        plan = runs.plan(cases, sampling, 0, 1)
        assert {run.sampling.steps for run in plan if run.kind is runs.Kind.REFINE} == {wanted}
        assert {run.sampling.steps for run in plan if run.kind is runs.Kind.MEASURE} == {sampling.steps}


def test_statistics_hold_no_text_encoder(model):
    import gc
    import weakref

    clip = Narrow(tiny_clip(torch.float32), 32)
    seen, loras = weakref.ref(clip), with_texts(2, clip)
    stats = collect_telling(model, loras, lambda text: None)
    del clip, loras
    gc.collect()
    assert seen() is None and stats.loras[0].task.name == "cat"


def collect_telling(model, loras, tell, **more):
    runs = module("nodes.calibrating.runs")
    with torch.inference_mode():
        return module("nodes.calibrating.collect").collect(
            *(model, loras, {"samples": torch.zeros(1, 16, 8, 8)}, runs.Sampling(0, 1, "euler", "simple"), tell),
            **{"context": 16, "refine": 0, **more},
        )


# --- lines in SSR Quick Merge and SSR Add LoRA Stack ---


def test_lines_are_parted_into_loras_and_prompts_and_those_of_one_kind_come_together():
    lines = module("nodes.reading.combination").read_lines
    text = "1+3: mochi the cat, sepia style\n\n none: a crowd\n1+3: mochi: the film, sepia style"
    assert list(lines(text, "here")) == [
        ("1+3", ["mochi the cat, sepia style", "mochi: the film, sepia style"]),
        ("none", ["a crowd"]),
    ]


@pytest.mark.parametrize("line", ["mochi the cat, sepia style", "1+3:", ": a cat"])
def test_a_line_that_is_no_combination_is_refused_by_name(line):
    core = module("ssr_core")
    with pytest.raises(core.SSRError, match=r"here: .*is no combination"):
        list(module("nodes.reading.combination").read_lines(line, "here"))


def test_a_text_encoder_reads_a_combination_with_all_its_loras_on_it():
    key = "lora_te1_text_model_encoder_layers_0_mlp_fc1"
    generator = torch.Generator().manual_seed(4)
    texts = [
        {
            f"{key}.lora_up.weight": torch.randn(128, 2, generator=generator),
            f"{key}.lora_down.weight": torch.randn(2, 64, generator=generator),
        }
        for _ in range(2)
    ]
    clip, sd = tiny_clip(torch.float32), importlib.import_module("comfy.sd")
    flux = sd.load_diffusion_model_state_dict(importlib.import_module("tiny_flux").flux_state_dict())
    loras = [replace(one, lora={**lora(), **text}) for one, lora, text in zip(tasks(2), LORAS, texts, strict=False)]
    encode = module("nodes.calibrating.prompt").encode_lines
    loras = [replace(one, conditioning=encode(clip, ["a cat"], "test")) for one in loras]
    asked = module("nodes.reading.combination").Combination("all", encode(clip, ["a cat, sepia"], "test"))
    cases = module("nodes.calibrating.case_prompts").cases_of(loras, [asked])
    with torch.inference_mode():
        read = [module("nodes.reading.patches").read_task(one, flux, clip) for one in loras]
        encoded, calibration = module("nodes.calibrating.text_encoder").calibrate_text(clip, read, cases)
        both = clip
        for one in loras:
            _, both = sd.load_lora_for_models(None, both, dict(one.lora), one.strength, one.strength)
        ((wanted, _),) = both.encode_from_tokens_scheduled(both.tokenize("a cat, sepia"))
    assert relative(encoded[2].conditioning[0][0], wanted) < 1e-5
    assert [case.speakers for case in calibration.cases] == [(0,), (1,), (0, 1)]
