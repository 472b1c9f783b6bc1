"""SSR Prompts in a real ComfyUI."""

import importlib

import pytest
import torch

from run_nodes import execute, node
from tiny_clip import tiny_clip

pytestmark = [pytest.mark.comfy, pytest.mark.usefixtures("pack")]


def prompts(text):
    return execute(node("prompts.SSRPrompts"), clip=tiny_clip(), text=text)[0]


def test_each_line_is_a_prompt_and_blank_lines_are_none():
    entries = prompts("a cat\n\n  a dog on grass  \n")
    clip = tiny_clip()
    assert len(entries) == 2
    for entry, text in zip(entries, ("a cat", "a dog on grass"), strict=True):
        assert torch.equal(entry[0], clip.encode_from_tokens(clip.tokenize(text)))


def test_no_prompt_at_all_is_refused():
    core = importlib.import_module("ssr_pack.ssr_core")
    with pytest.raises(core.SSRError, match="write one per line"):
        prompts(" \n ")


# --- prompts of two LoRAs, made of their own ---


@pytest.mark.parametrize(
    ("lines", "common"),
    [
        (["a village at dawn, inkwash style", "a fox in a forest, inkwash style."], "inkwash style"),
        (["Anna1 woman, portrait", "photo of anna1 woman in a park"], "Anna1 woman"),
        (["a man in a krndress coat", "a krndress hat", "a couple of krndress hats"], "krndress"),
        (["one prompt only, inkwash style"], "one prompt only, inkwash style"),
        (["nothing", "in common"], "nothing"),
    ],
)
def test_trigger_words_are_the_longest_run_of_words_that_all_prompts_share(lines, common):
    prompt = importlib.import_module("ssr_pack.nodes.calibrating.prompt")
    assert prompt.common_words(lines) == common


def test_each_of_a_pair_lends_its_prompts_in_turn_and_the_other_its_trigger_words():
    made = importlib.import_module("ssr_pack.nodes.calibrating.case_prompts")
    task = importlib.import_module("ssr_pack.nodes.reading.task").Task
    cat = task("cat", "", 1.0, prompts("mochi the cat on grass\nmochi the cat at night"))
    style = task("style", "", 1.0, prompts("a house, sepia style\na red car in the snow, sepia style"))
    *_, pair = made.cases_of([cat, style], [], pairs=2)
    told = [options["ssr_prompt"].text for _, options in pair.conditioning]
    assert told == ["mochi the cat on grass, sepia style", "a red car in the snow, sepia style, mochi the cat"]
