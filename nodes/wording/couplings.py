"""Couplings: prompts that ask for two LoRAs at once, made of the prompts of each."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .common_words import common_words, share

ALIKE = 1.5  # shares of their own words in two LoRAs' prompts that differ by less are of two of a kind


@dataclass(frozen=True)
class Coupling:
    """A prompt of one LoRA, and the words of the other behind it."""

    first: int  # whose prompt it is: 0 or 1
    prompt: int  # its number
    behind: int  # the number of the prompt of the other
    words: str  # of that one: those that stand behind

    def text(self, texts: tuple[Sequence[str], Sequence[str]]) -> str:
        return f"{texts[self.first][self.prompt]}, {self.words}"


def couplings(one: Sequence[str], other: Sequence[str], count: int) -> Iterator[Coupling]:
    """`count` prompts that ask for both.

    Of the LoRA that stands behind only the words that all its prompts share, if they share any. A character's own words
    are most of its prompts, and a style's are few, so the character's scenes come in the style and not the other way;
    two of a kind take turns.
    """
    texts = one, other
    phrases = [common_words(lines) for lines in texts]
    shares = [share(phrase, lines) for phrase, lines in zip(phrases, texts, strict=True)]
    for number in range(count):
        first = int(shares[1] > shares[0]) if max(shares) > ALIKE * min(shares) else number % 2
        prompt = spread(len(texts[first]), count)[number]
        behind = spread(len(texts[1 - first]), count, 1)[number]
        yield Coupling(first, prompt, behind, phrases[1 - first] or texts[1 - first][behind])


def prompts_of_pair(most: int, prompts: int, couples: int) -> int:
    """How many are made of each of so many couples, whose LoRAs have so many prompts by themselves.

    All pairs together have no more prompts than the LoRAs by themselves, as they take their time, too; but each pair
    has one at least.
    """
    return max(1, min(most, prompts // couples))


def spread(length: int, count: int, shift: int = 0) -> list[int]:
    """`count` numbers from all over a list, none twice before all had their turn; `shift`: where to begin.

    People write lists with a period (four places, then the same four at night), so the steps have none in common: they
    are near the golden section of the list.
    """
    stride = next(step for step in range(round(0.62 * length), 0, -1) if math.gcd(step, length) == 1)
    return [(number * stride + shift) % length for number in range(count)]
