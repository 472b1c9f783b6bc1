"""Edit models in a real ComfyUI: LoRAs that change an input picture, given as a reference latent, merged into one.

Tiny models of ComfyUI's classes with random weights: Flux is the class of Kontext, Qwen-Image that of Qwen-Image-Edit.
"""

import functools
import importlib

import pytest
import torch

from run_nodes import apply, execute, load_lora, node, solve
from tiny_clip import tiny_clip
from tiny_models import FAMILIES, SPELLINGS, loras

pytestmark = [pytest.mark.comfy, pytest.mark.usefixtures("pack")]

EDIT_MODELS = ("Flux", "Flux2", "Qwen-Image")
STEPS = 4
EDITS = ("sepia", "a hat")  # two LoRAs; each has prompts and pictures of its own


@functools.cache
def model_of(family):
    return FAMILIES[family].build()


@pytest.fixture(scope="module", autouse=True)
def models():
    yield
    model_of.cache_clear()


@functools.cache
def edits(family):
    model = model_of(family)
    return [loras(model, SPELLINGS[family]["generic"], 4, seed, strength=0.5)[0] for seed in (1, 2)]


def picture(family, seed):
    like = FAMILIES[family].latent()["samples"]
    return 0.5 * torch.randn(like.shape, generator=torch.Generator().manual_seed(seed))


def asking(family, edit, seen=None, number=0):
    """CONDITIONING of a prompt for an edit, of a picture: each edit's prompts resemble each other."""
    (cond, options), *_ = FAMILIES[family].conditioning(100 + edit)
    varied = FAMILIES[family].conditioning(1000 * (edit + 1) + number)[0][0]
    options = options if seen is None else {**options, "reference_latents": [seen]}
    return [[cond + 0.3 * varied, options]]


def edited(family, model, edit, seen, number):
    """The picture after one edit, by ComfyUI's own KSampler."""
    nodes = importlib.import_module("nodes")
    positive = asking(family, edit, seen, number)
    with torch.inference_mode():
        how = (0, STEPS, 1.0, "euler", "simple", positive, positive, FAMILIES[family].latent())
        return nodes.common_ksampler(model, *how)[0]["samples"]


def one_after_the_other(family, models, seen, number):
    """Both edits of a picture, each by its own model."""
    for edit, model in enumerate(models):
        seen = edited(family, model, edit, seen, number)
    return seen


@functools.cache
def merged(family):
    """(stats, LORA_MODEL) with eight pictures and prompts of each edit."""
    task = importlib.import_module("ssr_pack.nodes.reading.task").Task
    tasks = tuple(
        task(name, lora, 1.0, [asking(family, k, picture(family, 10 * k + n), n)[0] for n in range(8)])
        for k, (name, lora) in enumerate(zip(EDITS, edits(family), strict=True))
    )
    given = {"model": model_of(family), "tasks": tasks, "latent": FAMILIES[family].latent(), "seed": 3, "steps": STEPS}
    how = {"sampler_name": "euler", "scheduler": "simple", "context": 16, "refine": 1}
    stats = execute(node("collect_stats.SSRCollectStats"), **given, **how)[0]
    return stats, solve(stats)[0]


@pytest.mark.parametrize("family", EDIT_MODELS)
def test_the_picture_reaches_the_model_while_calibrating(family):
    """Its tokens are measured like all others."""
    task = importlib.import_module("ssr_pack.nodes.reading.task").Task
    lora = edits(family)
    seen = {}
    for name, reference in (("with", picture(family, 1)), ("without", None)):
        tasks = tuple(task(EDITS[k], lora[k], 1.0, asking(family, k, reference)) for k in (0, 1))
        given = {"model": model_of(family), "tasks": tasks, "latent": FAMILIES[family].latent(), "seed": 0, "steps": 1}
        how = {"sampler_name": "euler", "scheduler": "simple", "context": 0, "refine": 0}
        seen[name] = execute(node("collect_stats.SSRCollectStats"), **given, **how)[0].calibration.tokens[0]
    assert seen["with"] > seen["without"] > 0


@pytest.mark.parametrize("family", EDIT_MODELS)
def test_two_edits_by_one_file_are_nearer_to_each_by_its_own_than_by_both_stacked(family):
    """A new picture is edited by one LoRA after the other: each alone, both loaded at once, and the merge."""
    base, (first, second) = model_of(family), edits(family)
    alone = [load_lora(base, first), load_lora(base, second)]
    stack, merge = load_lora(alone[0], second), apply(base, merged(family)[1])
    off = {"stack": 0.0, "merge": 0.0}
    for number in range(20, 22):
        seen = picture(family, number)
        wanted = one_after_the_other(family, alone, seen, number)
        for name, model in (("stack", stack), ("merge", merge)):
            found = one_after_the_other(family, [model, model], seen, number)
            off[name] += float((found - wanted).square().sum())
    assert off["merge"] < 0.5 * off["stack"]


def pictures_and_texts(found):
    prompt = importlib.import_module("ssr_pack.nodes.calibrating.prompt").PROMPT
    return [([int(one.mean()) for one in options["reference_latents"]], options[prompt].text) for _, options in found]


def test_each_prompt_gets_its_own_picture_of_a_batch_in_turn():
    clip, batch = tiny_clip(torch.float32), torch.arange(2.0)[:, None, None, None].expand(2, 16, 4, 4)
    prompts = node("prompts.SSRPrompts")
    (found,) = execute(prompts, clip=clip, text="sepia\n\na hat\nboth", references={"samples": batch})
    assert pictures_and_texts(found) == [([0], "sepia"), ([1], "a hat"), ([0], "both")]
    assert all(one.shape[0] == 1 for _, options in found for one in options["reference_latents"])
    (plain,) = execute(prompts, clip=clip, text="sepia")
    assert "reference_latents" not in plain[0][1]


def test_one_prompt_is_said_of_every_picture_of_a_batch():
    """Most edit LoRAs are asked by the same words whatever the picture."""
    clip, batch = tiny_clip(torch.float32), torch.arange(3.0)[:, None, None, None].expand(3, 16, 4, 4)
    (found,) = execute(node("prompts.SSRPrompts"), clip=clip, text="sepia", references={"samples": batch})
    assert pictures_and_texts(found) == [([0], "sepia"), ([1], "sepia"), ([2], "sepia")]
    (found,) = execute(node("prompts.SSRPrompts"), clip=clip, text="sepia\nsepia", references={"samples": batch[:2]})
    assert pictures_and_texts(found) == [([0], "sepia"), ([1], "sepia")]


def test_prompts_without_a_picture_beside_others_with_one_are_warned_of():
    clip, batch = tiny_clip(torch.float32), torch.ones(1, 16, 4, 4)
    task = importlib.import_module("ssr_pack.nodes.reading.task").Task
    module = importlib.import_module("ssr_pack.nodes.calibrating.case_prompts")
    seeing, blind = (
        execute(node("prompts.SSRPrompts"), clip=clip, text="sepia", **given)[0]
        for given in ({"references": {"samples": batch}}, {})
    )
    said = module.without_pictures(module.cases_of([task("a", {}, 1.0, seeing), task("b", {}, 1.0, blind)], (), 0))
    assert said.startswith("No input picture at the prompts of b,") and "`references` of SSR Prompts" in said
    for same in (seeing, blind):
        cases = module.cases_of([task("a", {}, 1.0, same), task("b", {}, 1.0, same)], (), 0)
        assert not module.without_pictures(cases)


def test_a_picture_comes_behind_those_that_a_prompt_has():
    clip, first, second = tiny_clip(torch.float32), torch.zeros(1, 16, 4, 4), torch.ones(1, 16, 4, 4)
    (found,) = execute(node("prompts.SSRPrompts"), clip=clip, text="sepia", references={"samples": first})
    again = importlib.import_module("ssr_pack.nodes.calibrating.prompt").with_reference(found, second)
    assert pictures_and_texts(again) == [([0, 1], "sepia")]


def test_pairs_of_edits_with_one_prompt_each_are_made_with_several_pictures():
    clip, batch = tiny_clip(torch.float32), torch.arange(4.0)[:, None, None, None].expand(4, 16, 4, 4)
    task = importlib.import_module("ssr_pack.nodes.reading.task").Task
    tasks = []
    for name in ("turn it sepia", "add a hat"):
        (found,) = execute(node("prompts.SSRPrompts"), clip=clip, text=name, references={"samples": batch})
        tasks.append(task(name, {}, 1.0, found))
    *_, pair = importlib.import_module("ssr_pack.nodes.calibrating.case_prompts").cases_of(tasks, (), 3)
    found = pictures_and_texts(pair.conditioning)
    assert len({tuple(seen) for seen, _ in found}) == 3
    assert {text for _, text in found} == {"turn it sepia, add a hat", "add a hat, turn it sepia"}


def test_a_picture_stays_with_a_prompt_that_the_text_encoder_reads_again_and_with_pairs_made_of_it():
    clip, batch = tiny_clip(torch.float32), torch.ones(1, 16, 4, 4)
    (found,) = execute(node("prompts.SSRPrompts"), clip=clip, text="x1 one\nx1 two", references={"samples": batch})
    again = importlib.import_module("ssr_pack.nodes.calibrating.text_encoder").encode_anew(clip, found[0])
    assert again[1]["reference_latents"][0] is found[0][1]["reference_latents"][0]
    task = importlib.import_module("ssr_pack.nodes.reading.task").Task
    (other,) = execute(node("prompts.SSRPrompts"), clip=clip, text="y2 one\ny2 two")
    cases = importlib.import_module("ssr_pack.nodes.calibrating.case_prompts").cases_of(
        [task("a", {}, 1.0, found), task("b", {}, 1.0, other)], (), 2
    )
    assert all("reference_latents" in options for _, options in cases[2].conditioning)
