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


def with_references(conditioning: Sequence[Any], latent: Mapping[str, Any]) -> list[Any]:
    """CONDITIONING with a picture for an edit model at each entry, those of a batch in turn, one for each text.

    Args:
        latent: LATENT of one picture or more.
    """
    pictures, order = latent["samples"], {text: number for number, text in enumerate(texts(conditioning))}
    found = []
    for cond, options in conditioning:
        number = order[options[PROMPT].text] % len(pictures)
        seen = [*options.get("reference_latents", []), pictures[number : number + 1]]
        found.append([cond, {**options, "reference_latents": seen}])
    return found


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


def followed(entry: Sequence[Any], other: Sequence[Any], words: str) -> list[Any]:
    """CONDITIONING of an entry's text with words of another behind it.

    What other nodes added to either (guidance, say) is kept.
    """
    prompt, kept = entry[1][PROMPT], {**other[1], **entry[1]}
    return [[cond, {**kept, **options}] for cond, options in encode(prompt.clip, f"{prompt.text}, {words}")]


def without_text(conditioning: Sequence[Any]) -> list[Any]:
    """The same CONDITIONING, which no longer holds the text encoder that read it."""
    return [[cond, {key: value for key, value in options.items() if key != PROMPT}] for cond, options in conditioning]
