"""Common words: the trigger phrase of a LoRA, from its prompts alone."""

import importlib

import pytest

pytestmark = [pytest.mark.comfy, pytest.mark.usefixtures("pack")]


def module(name):
    return importlib.import_module(f"ssr_pack.nodes.wording.{name}")


@pytest.mark.parametrize(
    ("texts", "found"),
    [
        (("mochi the cat on grass", "Mochi the cat at night", "mochi the cat in the desert"), "mochi the cat"),
        (("a green house in the snow, sepia style", "a red car on grass, sepia style"), "sepia style"),
        (("photo of ohwx man", "ohwx man, in a suit", "portrait of OHWX man"), "ohwx man"),
        (("a cat in the snow", "a dog on the moon"), ""),  # fillers are no phrase
        (("one prompt only",), ""),
        (("in the style of inkpunk, a house", "a car in the style of inkpunk"), "style of inkpunk"),
        (("Anna1 woman, portrait", "photo of anna1 woman in a park"), "Anna1 woman"),
        (("a man in a krndress coat", "a krndress hat", "a couple of krndress hats"), "krndress"),
        (("turn sepia", "turn the ball sepia", "turn it sepia"), "sepia"),  # the order says nothing by itself
        (("add a hat", "add a hat"), "add a hat"),
        ((), ""),
    ],
)
def test_the_words_that_all_prompts_share_are_found(texts, found):
    assert module("common_words").common_words(texts) == found


def test_a_phrase_is_the_larger_part_of_a_characters_prompts():
    words = module("common_words")
    assert words.share("mochi the cat", ["mochi the cat on grass"]) == pytest.approx(0.6)
    assert words.share("", ["a house"]) == 0
