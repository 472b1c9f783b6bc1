"""Training notes: what a LoRA file tells of what it was trained on, in the metadata that trainers write."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...ssr_core import LoraError
from ...ssr_core.files.storage import read_metadata

TRIGGER = "modelspec.trigger_phrase"
TRIGGERS = (TRIGGER, "trigger_phrase", "trigger_words", "trigger_word", "instance_prompt")
CAPTION = 5  # words from which on an entry of the tag frequencies is a caption, and not a tag
ALWAYS = 0.9  # share of the images from which on a tag is a trigger word
MOST = 3  # of these
LONGEST = 300  # letters of a phrase or caption that is taken


@dataclass(frozen=True)
class TrainingNotes:
    """What a file says; all empty if it says nothing."""

    phrase: str = ""  # trigger words
    captions: tuple[str, ...] = ()  # whole sentences, as the trainer met them
    tags: tuple[str, ...] = ()  # the most frequent first, without those of the phrase

    @classmethod
    def read(cls, file: Path) -> TrainingNotes:
        """Of a file on disk; nothing is known of one that is no safetensors file.

        Raises:
            LoraError: it is not there, or damaged.
        """
        if file.suffix.lower() not in (".safetensors", ".sft"):
            return cls()
        return cls.of(read_metadata(file, LoraError))

    @classmethod
    def of(cls, metadata: Mapping[str, str]) -> TrainingNotes:
        """From metadata: `modelspec.*`, and kohya's `ss_tag_frequency`, `ss_datasets` and `ss_dataset_dirs`."""
        counts = _counts(metadata)
        captions = tuple(text for text in counts if len(text.split()) >= CAPTION)
        tags = {text: count for text, count in counts.items() if len(text.split()) < CAPTION}
        images = max(_images(metadata), *tags.values(), 1) if tags else 1
        always = [tag for tag, count in tags.items() if count >= ALWAYS * images][:MOST]  # in the order of captions
        told = next((text for key in TRIGGERS if (text := _text(metadata.get(key)))), "")
        phrase = told or ", ".join(always) or _only(_folder_words(metadata))
        rest = sorted((tag for tag in tags if tag not in always and tag not in phrase), key=lambda tag: -tags[tag])
        return cls(phrase, captions, tuple(rest))


def _counts(metadata: Mapping[str, str]) -> Counter[str]:
    """In how many images each tag or caption was, in the order in which the trainer met them."""
    folders: list[Any] = [_json(metadata.get("ss_tag_frequency"))]
    folders += [dataset.get("tag_frequency") for dataset in _dicts(_json(metadata.get("ss_datasets")))]
    counts: Counter[str] = Counter()
    for tags in (tags for found in folders if isinstance(found, dict) for tags in _dicts(found.values())):
        for tag, count in tags.items():
            if isinstance(count, int) and count > 0 and (text := _text(tag)):
                counts[text] += count
    return counts


def _images(metadata: Mapping[str, str]) -> int:
    folders = _json(metadata.get("ss_dataset_dirs"))
    counts = [one.get("img_count") for one in _dicts(folders.values())] if isinstance(folders, dict) else []
    return sum(count for count in counts if isinstance(count, int))


def _folder_words(metadata: Mapping[str, str]) -> Iterator[str]:
    """What kohya's folders are called, such as 10_anna1 woman, and its class tokens."""
    folders = _json(metadata.get("ss_dataset_dirs"))
    for name in folders if isinstance(folders, dict) else ():
        if found := re.fullmatch(r"\d+_(.+)", name):
            yield _text(found[1])
    for dataset in _dicts(_json(metadata.get("ss_datasets"))):
        for subset in _dicts(dataset.get("subsets")):
            yield _text(subset.get("class_tokens"))


def _only(words: Iterable[str]) -> str:
    """Of several folders it is not known which words are meant."""
    found = {word for word in words if word}
    return found.pop() if len(found) == 1 else ""


def _json(text: Any) -> Any:
    """None where it is no JSON: files are written by many, and what one of them says is only a help."""
    try:
        return json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError):
        return None


def _dicts(values: Any) -> Iterator[dict[str, Any]]:
    iterable = values if isinstance(values, Iterable) and not isinstance(values, str | dict) else ()
    return (value for value in iterable if isinstance(value, dict))


def _text(value: Any) -> str:
    """On one line, without weights such as (word:1.2); empty if it is no text, or as long as no prompt."""
    text = re.sub(r"\(([^()]*):[\d.]+\)", r"\1", " ".join(value.split())) if isinstance(value, str) else ""
    text = text.strip(" ,")
    return text if len(text) <= LONGEST and text.isprintable() else ""
