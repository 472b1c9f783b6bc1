"""CasePrompts: what is sampled of one case, a LoRA by itself or several at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from ...ssr_core import Case, SSRError
from ..reading.combination import Combination, read_lines
from ..reading.task import Task
from ..wording.couplings import couplings, prompts_of_pair
from .prompt import PROMPT, encode_lines, followed, unchanged

PAIRS = 3  # prompts of each pair of LoRAs that are made of their own where none are given, at most


@dataclass(frozen=True, eq=False)
class CasePrompts:
    """A case with its prompts."""

    case: Case
    name: str
    conditioning: list[Any]  # ComfyUI's CONDITIONING; every entry is one calibration prompt
    latent: Mapping[str, Any] | None = None  # ComfyUI's LATENT of images of its own, instead of sampled ones
    negative: list[Any] | None = None  # CONDITIONING as these LoRAs' text encoder reads it, instead of everyone's
    is_glued: bool = False  # made of the prompts of its LoRAs, as nobody gave any


def cases_of(tasks: Sequence[Task], asked: Sequence[Combination], pairs: int = PAIRS) -> list[CasePrompts]:
    """All that is sampled: each LoRA by itself, then what was asked for.

    Args:
        pairs: where nothing is asked for, so many prompts of each pair of LoRAs are made of their own texts.

    Raises:
        SSRError: a combination that cannot be meant, or one without prompts.
    """
    names = [task.name for task in tasks]
    singles = [
        CasePrompts(Case((number,)), task.name, task.conditioning, task.latent, task.negative)
        for number, task in enumerate(tasks)
    ]
    return singles + (_asked(names, asked) if asked else _glued(tasks, pairs))


def without_pictures(cases: Sequence[CasePrompts]) -> str:
    """A warning where prompts of some cases have input pictures, for an edit model, and others have none."""
    seeing = {one.name: any("reference_latents" in options for _, options in one.conditioning) for one in cases}
    blind = [name for name, sees in seeing.items() if not sees]
    if not blind or len(blind) == len(seeing):
        return ""
    return (
        f"No input picture at the prompts of {', '.join(blind)}, though others have one. If they are to edit pictures, "
        "connect `references` of SSR Prompts there, too."
    )


def combinations_of(clip: Any, text: str, where: str, references: Mapping[str, Any] | None = None) -> list[Combination]:
    """From lines such as "1+3: mochi the cat, sepia style", with pictures for an edit model.

    Raises:
        SSRError: a line that is none; names `where`.
    """
    return [
        Combination(which, encode_lines(clip, prompts, where, references), where)
        for which, prompts in read_lines(text, where)
    ]


def _asked(names: Sequence[str], asked: Sequence[Combination]) -> list[CasePrompts]:
    """Each case once, with the prompts of all combinations that mean it."""
    found: dict[Case, list[Any]] = {}
    for one in asked:
        case = one.case(names)
        if case.is_silence and len(names) == 1:
            raise SSRError(f"{names[0]} is the only LoRA; silence is measured where there are two or more to merge.")
        if not one.conditioning:
            raise SSRError(f"{one.where}: {one.which!r} has no prompt; connect SSR Prompts to it.")
        found.setdefault(case, []).extend(one.conditioning)
    return [CasePrompts(case, case.label(names), prompts) for case, prompts in found.items()]


def _glued(tasks: Sequence[Task], pairs: int) -> list[CasePrompts]:
    """Prompts for every pair of LoRAs, made of their own where the texts of all are known."""
    couples = list(combinations(range(len(tasks)), 2))
    known = [unchanged(task.conditioning) for task in tasks]
    if not pairs or not couples or any(task.latent is not None for task in tasks) or not all(known):
        return []
    count = prompts_of_pair(pairs, sum(len(task.conditioning) for task in tasks), len(couples))
    names = [task.name for task in tasks]
    found = []
    for one, other in couples:
        case = Case((one, other))
        prompts = [entry for made in _of_pair(known[one], known[other], count) for entry in made]
        found.append(CasePrompts(case, case.label(names), prompts, is_glued=True))
    return found


def _of_pair(one: Sequence[Any], other: Sequence[Any], count: int) -> Iterator[list[Any]]:
    """CONDITIONING of `count` prompts that ask for both: a prompt of one LoRA, and the words of the other behind it."""
    entries = one, other
    texts = [[entry[1][PROMPT].text for entry in half] for half in entries]
    for made in couplings(texts[0], texts[1], count):
        yield followed(entries[made.first][made.prompt], entries[1 - made.first][made.behind], made.words)
