"""Combination: prompts that ask for several LoRAs at once, or for none; a part of SSR_TASKS beside the tasks."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...ssr_core import Case, LoraError, SSRError
from .task import Task

ALL, NONE = "all", "none"
SYNTAX = f"Write numbers or names, such as 1+2, or {ALL}, or {NONE} for prompts where no LoRA should speak"


@dataclass(frozen=True, eq=False)
class Combination:
    """Which LoRAs speak, as a person wrote it, and the prompts that ask for them."""

    which: str  # "1, 3", names, "all" or "none"
    conditioning: list[Any]  # ComfyUI's CONDITIONING; every entry is one calibration prompt
    where: str = "SSR Add Combination"  # how errors call the place where it was written
    numbers: tuple[int, ...] = ()  # that the LoRAs have there; empty: 1, 2, 3 and so on

    def case(self, names: Sequence[str]) -> Case:
        """Who speaks, by number.

        Raises:
            SSRError: a number or name that is no LoRA of the chain, one LoRA twice, or one LoRA only.
        """
        word = self.which.strip().lower()
        if word == NONE:
            return Case(())
        speakers = list(range(len(names))) if word == ALL else [self._task(part, names) for part in _parts(self.which)]
        if not speakers:
            raise SSRError(f"{self.where}: a combination does not say which LoRAs it is of. {SYNTAX}.")
        if twice := [names[task] for task in dict.fromkeys(speakers) if speakers.count(task) > 1]:
            raise SSRError(f"{self.where}: {self.which!r} names {twice[0]} twice; name each LoRA once.")
        if len(speakers) == 1:
            raise SSRError(
                f"{self.where}: {self.which!r} is of one LoRA, {names[speakers[0]]}, and a combination is of two or "
                "more. Prompts for one LoRA belong to where it is added."
            )
        return Case(tuple(sorted(speakers)))

    def _task(self, part: str, names: Sequence[str]) -> int:
        """Of the LoRA that a number, a name or an unmistakable part of one stands for."""
        numbers = self.numbers or tuple(range(1, len(names) + 1))
        listed = ", ".join(f"{number} {name}" for number, name in zip(numbers, names, strict=True))
        if part.isdigit():
            if int(part) in numbers:
                return numbers.index(int(part))
            raise SSRError(f"{self.where}: there is no LoRA {part} to combine; there are {listed}. {SYNTAX}.")
        wanted = part.casefold()
        exact = [task for task, name in enumerate(names) if name.casefold() == wanted]
        found = exact or [task for task, name in enumerate(names) if wanted in name.casefold()]
        if len(found) != 1:
            meant = ", ".join(str(numbers[task]) for task in found)
            said = f"may be any of {meant}" if found else "stands for none"
            raise SSRError(f"{self.where}: {part!r} {said} of the LoRAs to combine, {listed}. {SYNTAX}.")
        return found[0]


def parted(tasks: Iterable[Task | Combination]) -> tuple[tuple[Task, ...], tuple[Combination, ...]]:
    """The LoRAs and the combinations of an SSR_TASKS, wherever they stand in the chain."""
    tasks = tuple(tasks)
    return (
        tuple(one for one in tasks if isinstance(one, Task)),
        tuple(one for one in tasks if isinstance(one, Combination)),
    )


def without_off(
    tasks: Sequence[Task], asked: Sequence[Combination]
) -> tuple[tuple[Task, ...], tuple[Combination, ...], list[str]]:
    """The LoRAs that are not at strength 0 and the combinations of these, numbered anew; and who is left out, in words.

    Raises:
        LoraError: all are off.
        SSRError: a combination that cannot be meant.
    """
    names = [task.name for task in tasks]
    off = [number for number, task in enumerate(tasks) if task.is_off]
    if not off:
        return tuple(tasks), tuple(asked), []
    listed = ", ".join(names[number] for number in off)
    if len(off) == len(tasks):
        raise LoraError(f"Every LoRA is at strength 0 ({listed}), so there is nothing to merge. Give one a strength.")
    kept = [number for number in range(len(tasks)) if number not in off]
    speakers = [(one, one.case(names).speakers) for one in asked]
    again = tuple(
        replace(one, which=", ".join(str(kept.index(task) + 1) for task in who) or NONE, numbers=())
        for one, who in speakers
        if not {*who} & {*off}
    )
    notes = [f"Left out, as if not there, being at strength 0: {listed}."]
    if lost := [one.which for one, who in speakers if {*who} & {*off}]:
        notes.append(f"Nor were the combinations sampled that ask for them: {'; '.join(lost)}.")
    return tuple(tasks[number] for number in kept), again, notes


def read_lines(text: str, where: str) -> Iterator[tuple[str, list[str]]]:
    """Which LoRAs, and their prompts, from lines such as "1+3: mochi the cat, sepia style"; those of one kind together.

    Raises:
        SSRError: a line without a colon, or without a prompt; names `where`.
    """
    found: dict[str, list[str]] = {}
    for line in (line.strip() for line in text.splitlines()):
        if not line:
            continue
        which, prompt = (part.strip() for part in [*re.split("[:：]", line, maxsplit=1), ""][:2])
        if not (which and prompt):
            raise SSRError(
                f"{where}: {line!r} is no combination. Write which LoRAs, a colon and a prompt that asks for them, "
                f"as in 1+3: the cat on a beach, sepia style. {NONE}: stands before prompts where none should speak."
            )
        found.setdefault(which, []).append(prompt)
    yield from found.items()


def _parts(which: str) -> list[str]:
    return [part.strip() for part in re.split(r"[,;+\n，；＋、]", which) if part.strip()]
