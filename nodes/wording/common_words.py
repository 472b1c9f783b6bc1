"""Common words: what all prompts of a LoRA say, which is mostly its trigger phrase."""

from __future__ import annotations

import re
from collections.abc import Sequence

# of what stands at either end of a phrase, and is none by itself
FILLERS = frozenset(
    [
        *("a", "an", "the", "and", "or", "as", "is", "it", "its"),
        *("at", "by", "for", "from", "in", "into", "of", "on", "over", "to", "under", "with"),
    ]
)

# by which prompts for edit models begin: they say nothing without what comes behind
ORDERS = frozenset(["add", "apply", "change", "convert", "edit", "give", "let", "make", "put", "remove", "turn", "use"])


def common_words(texts: Sequence[str]) -> str:
    """The longest run of words that is in all of these texts, as the first of them writes it; empty if there is none.

    Of one text it is not known which words are the LoRA's own.
    """
    if len(texts) < 2:
        return ""
    first, *others = (words_of(text) for text in texts)
    runs = (
        first[start : start + length] for length in range(len(first), 0, -1) for start in range(len(first) - length + 1)
    )
    for run in runs:
        phrase = _trimmed(run)
        if _means_something(phrase) and all(_holds(words, run) for words in others):
            return " ".join(phrase)
    return ""


def share(phrase: str, texts: Sequence[str]) -> float:
    """How much of these texts a phrase is, by words."""
    return len(phrase.split()) * len(texts) / max(1, sum(len(words_of(text)) for text in texts))


def holds_all(text: str, phrase: str) -> bool:
    """Whether all words of a phrase are in a text, in whatever order."""
    return {word.casefold() for word in words_of(phrase)} <= {word.casefold() for word in words_of(text)}


def words_of(text: str) -> list[str]:
    return re.findall(r"[\w'’-]+", text)


def _trimmed(run: Sequence[str]) -> list[str]:
    """Without fillers at the ends."""
    kept = [number for number, word in enumerate(run) if word.casefold() not in FILLERS]
    return list(run[kept[0] : kept[-1] + 1]) if kept else []


def _means_something(phrase: Sequence[str]) -> bool:
    return any(word.casefold() not in FILLERS | ORDERS for word in phrase)


def _holds(words: Sequence[str], run: Sequence[str]) -> bool:
    folded, wanted = [word.casefold() for word in words], [word.casefold() for word in run]
    return any(folded[at : at + len(wanted)] == wanted for at in range(len(folded) - len(wanted) + 1))
