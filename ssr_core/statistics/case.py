"""Case: which LoRAs speak while some prompts are seen. The paper's tasks are the cases of one LoRA each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

from ..errors import StatisticsError


@dataclass(frozen=True)
class Case:
    """Several speakers are a combination: a picture that asks for all of them. None is silence."""

    speakers: tuple[int, ...]  # LoRAs by number, rising

    @classmethod
    def of(cls, which: int | Iterable[int], loras: int) -> Case:
        """Of one LoRA or of several.

        Raises:
            StatisticsError: there is no LoRA of that number, or one is named twice.
        """
        named = (which,) if isinstance(which, int) else tuple(which)
        for task in named:
            if not 0 <= task < loras:
                raise StatisticsError(f"There is no task {task}; tasks are numbered from 0 to {loras - 1}.")
        if len(set(named)) != len(named):
            raise StatisticsError(f"A case names a LoRA twice: {named}.")
        return cls(tuple(sorted(named)))

    @property
    def is_combination(self) -> bool:
        return len(self.speakers) > 1

    @property
    def is_silence(self) -> bool:
        return not self.speakers

    def label(self, names: Sequence[str]) -> str:
        """What people read of it."""
        return " + ".join(names[task] for task in self.speakers) or "silence"

    def reordered(self, order: Sequence[int]) -> Case:
        """With the LoRAs in another order: the new k-th is the old order[k]."""
        return Case(tuple(sorted(order.index(task) for task in self.speakers)))

    def without(self, task: int) -> Case | None:
        """With the LoRAs after `task` one number lower; None if it spoke."""
        if task in self.speakers:
            return None
        return Case(tuple(other - (other > task) for other in self.speakers))


def singles(loras: int) -> tuple[Case, ...]:
    """Each LoRA by itself: the cases that there always are, and that come first."""
    return tuple(Case((task,)) for task in range(loras))


def unheard(cases: Iterable[Case], loras: int) -> Iterator[tuple[int, int]]:
    """Pairs of LoRAs that speak together in none of the cases."""
    heard = {pair for case in cases for pair in combinations(case.speakers, 2)}
    return (pair for pair in combinations(range(loras), 2) if pair not in heard)
