"""Prompts proposed from what LoRA files tell of their training."""

import importlib
import json

import pytest
import torch
from safetensors.torch import save_file

pytestmark = [pytest.mark.comfy, pytest.mark.usefixtures("pack")]

TAGS = {
    "anna1": 20, "1girl": 20, "smile": 12, "outdoors": 9, "upper body": 9, "park": 6, "night": 5, "cafe": 4, "rain": 3,
    "red dress": 3, "book": 2, "snow": 2, "beach": 2, "hat": 2,
}  # fmt: skip
CAPTIONS = (
    "anna1 woman sits in a cafe with a book",
    "anna1 woman walks through a park in autumn",
    "a close-up portrait of anna1 woman at a window",
    "anna1 woman laughs in the rain at night",
    "anna1 woman on a beach, full body, at sunset",
)


def module(name):
    return importlib.import_module(f"ssr_pack.nodes.{name}")


def notes(**metadata):
    return module("reading.training_notes").TrainingNotes.of(
        {
            key.replace("__", "."): value if isinstance(value, str) else json.dumps(value)
            for key, value in metadata.items()
        }
    )


def propose(found, count=6):
    return module("wording.proposals").propose(found, count)


def kohya(tags=TAGS, images=20, folder="10_anna1 woman"):
    return notes(ss_tag_frequency={folder: tags}, ss_dataset_dirs={folder: {"n_repeats": 10, "img_count": images}})


def test_tags_become_prompts_that_all_have_the_trigger_words_and_differ():
    found = kohya()
    assert found.phrase == "anna1, 1girl"
    lines = propose(found)
    assert len(lines) == len(set(lines)) == 6
    assert all(line.startswith("anna1, 1girl, ") for line in lines)
    assert {tag for line in lines for tag in line.split(", ")} == set(TAGS)
    assert lines[0] == "anna1, 1girl, smile, rain"


def test_captions_are_taken_as_they_are_from_all_over_the_list():
    found = notes(ss_tag_frequency={"1_anna": dict.fromkeys(CAPTIONS, 1)})
    lines = propose(found, 4)
    assert set(lines) < set(CAPTIONS) and len(set(lines)) == 4
    named = notes(
        ss_tag_frequency={"x": dict.fromkeys((*CAPTIONS, "an empty street in the rain"), 1)}, trigger_word="ohwx"
    )
    assert all(line.startswith("ohwx, ") for line in propose(named))


def test_captions_without_the_trigger_words_are_left_to_those_that_have_them():
    others = [f"a house number {number} in the snow" for number in range(20)]
    found = notes(
        ss_tag_frequency={"x": dict.fromkeys((*others, *CAPTIONS), 1)}, modelspec__trigger_phrase="anna1 woman"
    )
    assert set(propose(found, 4)) < set(CAPTIONS)


@pytest.mark.parametrize(
    ("metadata", "phrase"),
    [
        ({"modelspec__trigger_phrase": "anna1  woman\n"}, "anna1 woman"),
        ({"trigger_word": "(ohwx man:1.2)"}, "ohwx man"),
        ({"instance_prompt": "photo of sks dog"}, "photo of sks dog"),
        ({"ss_dataset_dirs": {"10_anna1 woman": {"n_repeats": 10, "img_count": 20}}}, "anna1 woman"),
        ({"ss_datasets": [{"subsets": [{"class_tokens": "zwx cat", "img_count": 4}]}]}, "zwx cat"),
        ({"ss_datasets": [{"tag_frequency": {"d": {"zwx": 4, "cat": 1}}}]}, "zwx"),
        ({"ss_dataset_dirs": {"10_anna": {}, "5_bert": {}}}, ""),
    ],
)
def test_trigger_words_stand_in_many_places(metadata, phrase):
    assert notes(**metadata).phrase == phrase


def test_of_trigger_words_alone_scenes_of_all_kinds_are_made_and_of_a_style_things_in_it():
    lines = propose(notes(modelspec__trigger_phrase="anna1 woman"))
    assert len(set(lines)) == 6 and all(line.startswith("anna1 woman") for line in lines)
    lines = propose(notes(modelspec__trigger_phrase="inkwash style"))
    assert len(set(lines)) == 6 and all(line.endswith(", inkwash style") for line in lines)
    assert module("wording.common_words").common_words(lines) == "inkwash style"


@pytest.mark.parametrize(
    "metadata",
    [
        {},
        {"ss_tag_frequency": "{"},
        {"ss_tag_frequency": "[" * 100_000},
        {"ss_tag_frequency": '{"a": [1, {"b": "c"}], "d": {"e": "f", "g": -1}, "h": null}'},
        {"ss_datasets": '{"tag_frequency": 3}', "ss_dataset_dirs": "[1]"},
        {"modelspec.trigger_phrase": "x" * 5000, "ss_tag_frequency": json.dumps({"d": {"\u202ey" * 400: 3}})},
    ],
)
def test_a_file_that_says_nothing_or_nonsense_proposes_nothing(metadata):
    found = module("reading.training_notes").TrainingNotes.of(metadata)
    assert propose(found) == []


def test_notes_are_read_from_the_header_of_a_file(tmp_path):
    core, read = importlib.import_module("ssr_pack.ssr_core"), module("reading.training_notes").TrainingNotes.read
    file = tmp_path / "anna.safetensors"
    save_file({"x": torch.zeros(1)}, file, metadata={"modelspec.trigger_phrase": "anna1 woman"})
    assert read(file).phrase == "anna1 woman"
    assert read(tmp_path / "anna.pt").phrase == ""
    (tmp_path / "half.safetensors").write_bytes(file.read_bytes()[:20])
    with pytest.raises(core.LoraError, match="half"):
        read(tmp_path / "half.safetensors")


def test_pairs_are_proposed_as_collecting_would_make_them():
    prompts = [
        ["anna1 woman in a park", "anna1 woman at night"],
        ["a fox, inkwash style", "a bridge, inkwash style"],
        ["x1 a", "x1 b"],
    ]
    lines = module("wording.proposals").propose_pairs(prompts, 3)
    assert [line.split(":")[0] for line in lines] == ["1+2", "1+2", "1+3", "1+3", "2+3", "2+3"]
    assert lines[0] == "1+2: anna1 woman in a park, inkwash style"
    assert module("wording.proposals").propose_pairs([["a"], []], 3) == []
    assert module("wording.proposals").propose_pairs(prompts, 0) == []


@pytest.mark.parametrize(
    ("one", "other", "shared"),
    [
        ("ohwx woman", "ohwx woman", "ohwx woman"),
        ("ohwx woman", "photo of OHWX woman in a suit", "ohwx woman"),
        ("photo of sks", "sks dog", "sks"),
        ("anna1 woman", "bert2 man", None),
        ("photo of anna1 woman", "photo of berta woman", None),
        ("a photo of", "a photo of anna1", None),
    ],
)
def test_two_loras_with_the_same_trigger_words_are_told(one, other, shared):
    words = module("wording.trigger_words")
    called = [words.phrases({"modelspec.trigger_phrase": phrase}, []) for phrase in (one, other)]
    found = list(words.namesakes(["anna", "bert"], called))
    assert len(found) == (shared is not None)
    assert not shared or f'anna and bert are both called by "{shared}"' in found[0]
