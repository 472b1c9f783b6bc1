"""Trigger words: what LoRAs are called by, and a warning where two are called by the same."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations

from ..reading.training_notes import TRIGGER
from .common_words import FILLERS, common_words, holds_all, words_of

MEDIA = frozenset(["drawing", "image", "illustration", "painting", "photo", "photograph", "picture", "portrait"])


def phrases(source: Mapping[str, object], prompts: Sequence[str]) -> list[str]:
    """Of one LoRA: what its file says, and what all of its prompts say."""
    found = str(source.get(TRIGGER) or ""), common_words(prompts)
    return [phrase for phrase in found if _own(phrase)]


def namesakes(names: Sequence[str], called: Sequence[Sequence[str]]) -> Iterator[str]:
    """A warning for every two LoRAs of which one answers to the trigger words of the other.

    Args:
        called: the phrases of each.
    """
    for one, other in combinations(range(len(names)), 2):
        pairs = ((a, b) for a in called[one] for b in called[other])
        if shared := next((found for pair in pairs if (found := _shared(*pair))), ""):
            yield (
                f'{names[one]} and {names[other]} are both called by "{shared}". What no prompt tells apart, no merge '
                "can: let their prompts differ in other words, too (what they wear, what they are), and expect "
                "something of their mean."
            )


def unspoken(name: str, phrase: str, prompts: Sequence[str]) -> str:
    """A warning where no prompt of a LoRA has a word of its trigger words; empty if one has, or if none are known.

    Args:
        phrase: the trigger words, as its file tells them.
        prompts: empty if nobody knows their texts.
    """
    own = _own(phrase)
    if not own or not prompts or any(holds_all(text, word) for text in prompts for word in own):
        return ""
    return (
        f'No prompt of {name} has its trigger words, which its file says are "{phrase}": what is measured may not be '
        "what it is for. Write them into its prompts, and run again."
    )


def _shared(one: str, other: str) -> str:
    """What is its own of the shorter of two phrases, if all of it is in the other one, too; else empty."""
    short, long = sorted((" ".join(_own(phrase)) for phrase in (one, other)), key=lambda words: len(words.split()))
    return short if holds_all(long, short) else ""


def _own(phrase: str) -> list[str]:
    """Its words that could call anybody."""
    return [word for word in words_of(phrase) if word.casefold() not in FILLERS | MEDIA]
