"""Prompt: the text behind an entry of CONDITIONING, remembered with it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...ssr_core import SSRError

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


def encode_lines(clip: Any, lines: Iterable[str], where: str, references: Mapping[str, Any] | None = None) -> list[Any]:
    """CONDITIONING of one entry or more for each line that is not empty.

    An edit often has one prompt and many pictures, or one picture and many prompts: of which there are fewer, those
    come again in turn.

    Args:
        references: LATENT of pictures for an edit model; each prompt gets one.

    Raises:
        SSRError: no text encoder, or no line; names `where`.
    """
    if clip is None:
        raise SSRError(f"{where}: this checkpoint brings no text encoder; load one with Load CLIP.")
    if not (prompts := [line.strip() for line in lines if line.strip()]):
        raise SSRError(f"{where}: there is no prompt; write one per line.")
    encoded = [encode(clip, prompt) for prompt in prompts]
    if references is None:
        return [entry for entries in encoded for entry in entries]
    pictures = references["samples"].split(1)
    turns = range(max(len(encoded), len(pictures)))
    return [
        entry
        for turn in turns
        for entry in with_reference(encoded[turn % len(encoded)], pictures[turn % len(pictures)])
    ]


def with_reference(conditioning: Sequence[Any], picture: Tensor) -> list[Any]:
    """CONDITIONING with a picture for an edit model, behind those it has."""
    return [
        [cond, {**options, "reference_latents": [*options.get("reference_latents", ()), picture]}]
        for cond, options in conditioning
    ]


def texts(conditioning: Sequence[Any]) -> tuple[str, ...]:
    """The texts that are known, each once; a schedule has several entries of one text."""
    return tuple(dict.fromkeys(options[PROMPT].text for _, options in conditioning if PROMPT in options))


def unchanged(conditioning: Sequence[Any]) -> list[Any]:
    """Entries whose tensor is still what their text gave, the first of each text and its pictures."""
    found: dict[Any, Any] = {}
    for cond, options in conditioning:
        if PROMPT in options and cond is options[PROMPT].encoded:
            pictures = tuple(map(id, options.get("reference_latents", ())))
            found.setdefault((options[PROMPT].text, pictures), [cond, options])
    return list(found.values())


def followed(entry: Sequence[Any], other: Sequence[Any], words: str) -> list[Any]:
    """CONDITIONING of an entry's text with words of another behind it.

    What other nodes added to either (guidance, say) is kept.
    """
    prompt, kept = entry[1][PROMPT], {**other[1], **entry[1]}
    return [[cond, {**kept, **options}] for cond, options in encode(prompt.clip, f"{prompt.text}, {words}")]


def without_text(conditioning: Sequence[Any]) -> list[Any]:
    """The same CONDITIONING, which no longer holds the text encoder that read it."""
    return [[cond, {key: value for key, value in options.items() if key != PROMPT}] for cond, options in conditioning]
