"""Proposals: calibration prompts made of what LoRA files tell of their training, for a person to look at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path

from ...ssr_core import SSRError
from ..reading.training_notes import TrainingNotes
from .common_words import common_words, holds_all, words_of
from .couplings import couplings, prompts_of_pair, spread

PROMPTS = 6  # for each LoRA
TAGS = 4  # in a prompt, beside the trigger words
SUBJECTS = (
    "{}, close-up, soft window light",
    "{} in a park in autumn",
    "{} on a street at night in the rain",
    "{} in a kitchen in the morning",
    "{} on a beach at sunset",
    "{} in front of snowy mountains",
)
STYLES = (
    "a fishing village at dawn, {}",
    "portrait of an old man, {}",
    "a fox in a forest, {}",
    "a steam train on a bridge, {}",
    "a bowl of fruit on a table, {}",
    "a city street in the rain, {}",
)


def propose(notes: TrainingNotes, count: int = PROMPTS) -> list[str]:
    """Prompts that show what a LoRA is for: its captions, its tags, or its trigger words in places of all kinds.

    None if the file says nothing. Each has the trigger words, as far as they are known.
    """
    phrase = notes.phrase or common_words(notes.captions)
    if len(notes.captions) >= min(count, 4):
        return [_with(phrase, text) for text in _chosen(notes.captions, phrase, count)]
    if len(notes.tags) >= 2 * count:
        several = notes.tags[: TAGS * count]
        return [
            ", ".join([phrase, *several[number::count]] if phrase else several[number::count])
            for number in range(count)
        ]
    scenes = STYLES if "style" in words_of(phrase.casefold()) else SUBJECTS
    return [scene.format(phrase) for scene in scenes[:count]] if phrase else []


def propose_pairs(prompts: Sequence[Sequence[str]], most: int) -> list[str]:
    """Lines such as "1+2: anna1 woman in a park, inkwash style" for every pair of LoRAs, made of their own prompts."""
    couples = list(combinations(range(len(prompts)), 2))
    if not most or not couples or not all(prompts):
        return []
    count = prompts_of_pair(most, sum(map(len, prompts)), len(couples))
    return [
        f"{one + 1}+{other + 1}: {made.text((prompts[one], prompts[other]))}"
        for one, other in couples
        for made in couplings(prompts[one], prompts[other], count)
    ]


def _with(phrase: str, text: str) -> str:
    """With the trigger words in front, if they are not all there."""
    return text if not phrase or holds_all(text, phrase) else f"{phrase}, {text}"


def _chosen(captions: Sequence[str], phrase: str, count: int) -> list[str]:
    """From all over the list; those with the trigger words first."""
    own = [text for text in captions if phrase and holds_all(text, phrase)]
    listed = own if len(own) >= count else captions
    return [listed[number] for number in spread(len(listed), min(count, len(listed)))]


def written_or_proposed(lines: Sequence[str], file: Path, where: str) -> tuple[list[str], list[str]]:
    """(prompts, those of them that were proposed): what a person wrote, or else what the file gives.

    Raises:
        SSRError: nothing was written, and the file says nothing or is damaged; names `where`.
    """
    written = [line.strip() for line in lines if line.strip()]
    proposed = [] if written else propose(TrainingNotes.read(file))
    if not written and not proposed:
        raise SSRError(
            f"{where}: there is no prompt, and the file does not tell what it was trained on; write one per line, with "
            "its trigger words."
        )
    return written or proposed, proposed


def listed(proposed: Mapping[str, Sequence[str]]) -> list[str]:
    """What a person is shown of prompts that nobody wrote, by the names of their LoRAs; nothing if there are none."""
    lines = [f"  {name}: {prompt}" for name, prompts in proposed.items() for prompt in prompts]
    said = "Prompts proposed from the files, as none were written. Better ones of your own make a better merge:"
    return [said, *lines] if lines else []
