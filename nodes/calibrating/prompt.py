"""Prompt: the text behind an entry of CONDITIONING, remembered with it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...ssr_core import SSRError

EDGES = ",.;:()"  # of words
PROMPT = "ssr_prompt"  # where the text is kept, among the options of an entry of CONDITIONING


@dataclass(frozen=True, eq=False)
class Prompt:
    """The text that an entry of CONDITIONING was made of."""

    text: str
    encoded: Tensor  # the entry's own tensor: a node in between that makes another has changed the meaning
    clip: Any  # the text encoder that read it


def encode(clip: Any, text: str) -> list[Any]:
    """CONDITIONING that remembers its text."""
    entries = clip.encode_from_tokens_scheduled(clip.tokenize(text))
    return [[cond, {**options, PROMPT: Prompt(text, cond, clip)}] for cond, options in entries]


def encode_lines(clip: Any, lines: Iterable[str], where: str) -> list[Any]:
    """CONDITIONING of one entry or more for each line that is not empty.

    Raises:
        SSRError: no text encoder, or no line; names `where`.
    """
    if clip is None:
        raise SSRError(f"{where}: this checkpoint brings no text encoder; load one with Load CLIP.")
    if not (prompts := [line.strip() for line in lines if line.strip()]):
        raise SSRError(f"{where}: there is no prompt; write one per line.")
    return [entry for prompt in prompts for entry in encode(clip, prompt)]


def texts(conditioning: Sequence[Any]) -> tuple[str, ...]:
    """The texts that are known, each once; a schedule has several entries of one text."""
    return tuple(dict.fromkeys(options[PROMPT].text for _, options in conditioning if PROMPT in options))


def unchanged(conditioning: Sequence[Any]) -> list[Any]:
    """Entries whose tensor is still what their text gave, the first of each text."""
    found: dict[str, Any] = {}
    for cond, options in conditioning:
        if PROMPT in options and cond is options[PROMPT].encoded:
            found.setdefault(options[PROMPT].text, [cond, options])
    return list(found.values())


def glued(entry: Sequence[Any], other: Sequence[Any], words: str) -> list[Any]:
    """CONDITIONING of an entry's text, a comma and words; what other nodes added to either (guidance, say) is kept."""
    known = entry[1][PROMPT]
    kept = {**other[1], **entry[1]}
    return [[cond, {**kept, **options}] for cond, options in encode(known.clip, f"{known.text}, {words}")]


def common_words(lines: Sequence[str]) -> str:
    """The longest run of words in all of them, which is where trigger words are; the first line if they share none."""
    first, *others = [line.split() for line in lines]
    plain = [f" {_bare(words)} " for words in others]
    runs = [first[start:stop] for stop in range(1, len(first) + 1) for start in range(stop)]
    shared = [run for run in runs if all(f" {_bare(run)} " in line for line in plain)]
    found = max(shared, key=lambda run: (len(run), sum(map(len, run))), default=first)
    return " ".join(found).strip(EDGES)


def _bare(words: Sequence[str]) -> str:
    return " ".join(word.casefold().strip(EDGES) for word in words)
