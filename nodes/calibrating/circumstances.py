"""Circumstances: how statistics were collected, for whoever reads of it later. Plain values that fit into JSON."""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import comfyui_version
import torch

from ...ssr_core import Case
from .case_prompts import CasePrompts
from .prompt import texts

if TYPE_CHECKING:
    from ..reading.task import Task
    from .runs import Sampling

Prompts = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Heard:
    """Prompts of several LoRAs at once, or of none."""

    speakers: tuple[int, ...]
    count: int  # prompts
    prompts: tuple[str, ...]  # those of known text; empty if they are not told
    is_glued: bool  # made of the LoRAs' own prompts

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Heard:
        lists = {name: tuple(values[name]) for name in ("speakers", "prompts")}
        return cls(**{**values, **lists})

    def reordered(self, order: Sequence[int]) -> Heard:
        return replace(self, speakers=Case(self.speakers).reordered(order).speakers)


@dataclass(frozen=True)
class Circumstances:
    """One run of SSR Collect Stats."""

    model: str  # ComfyUI's class of the model
    sampling: Mapping[str, Any]
    context: int
    refine: int
    expand_rank: int
    strengths: tuple[float, ...]  # (K,) of the LoRAs while collecting
    counts: tuple[int, ...]  # (K,) prompts
    prompts: Prompts  # (K,) those of known text; empty if they are not told
    negative: tuple[str, ...]
    date: str
    versions: Mapping[str, str]  # of this pack, ComfyUI and torch
    combinations: tuple[Heard, ...] = ()
    layers: str = ""  # rules: what they drop was neither read nor measured

    @classmethod
    def of(
        cls,
        model: Any,
        tasks: Sequence[Task],
        cases: Sequence[CasePrompts],
        sampling: Sampling,
        context: int,
        refine: int,
        expand_rank: int,
        layers: str = "",
    ) -> Circumstances:
        """A run that happens now; of `cases` those of one LoRA are its task."""
        return cls(
            type(model.model).__name__,
            {name: value for name, value in vars(sampling).items() if name != "negative"},
            *(context, refine, expand_rank),
            tuple(task.strength for task in tasks),
            tuple(len(task.conditioning) for task in tasks),
            tuple(texts(task.conditioning) for task in tasks),
            texts(sampling.negative),
            datetime.date.today().isoformat(),
            {"pack": _version(), "comfyui": comfyui_version.__version__, "torch": torch.__version__},
            tuple(
                Heard(one.case.speakers, len(one.conditioning), texts(one.conditioning), one.is_glued)
                for one in cases[len(tasks) :]
            ),
            layers,
        )

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Circumstances:
        """What `as_json` gave. TypeError or KeyError if it is something else."""
        lists = {name: tuple(values[name]) for name in ("strengths", "counts", "negative")}
        heard = tuple(map(Heard.from_json, values.get("combinations", ())))
        return cls(**{**values, **lists, "prompts": tuple(map(tuple, values["prompts"])), "combinations": heard})

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def without_prompts(self) -> Circumstances:
        heard = tuple(replace(one, prompts=()) for one in self.combinations)
        return replace(self, prompts=(), negative=(), combinations=heard)

    def without(self, task: int) -> Circumstances:
        """Of a LoRA, and of the combinations in which it spoke."""
        kept = [number for number in range(len(self.strengths)) if number != task]
        quiet = (one for one in self.combinations if task not in one.speakers)
        heard = tuple(replace(one, speakers=tuple(map(kept.index, one.speakers))) for one in quiet)
        return replace(replace(self, combinations=()).reordered(kept), combinations=heard)

    def reordered(self, order: Sequence[int]) -> Circumstances:
        """With the LoRAs in another order: the new k-th is the old order[k]."""
        return replace(
            self,
            strengths=tuple(self.strengths[task] for task in order),
            counts=tuple(self.counts[task] for task in order),
            prompts=tuple(self.prompts[task] for task in order) if self.prompts else (),
            combinations=tuple(one.reordered(order) for one in self.combinations),
        )


def listed_pairs(collections: Sequence[Circumstances], most: int = 6) -> list[str]:
    """What a person is shown of prompts of pairs that were made of the LoRAs' own; nothing if there are none."""
    heard = [one for collection in collections for one in collection.combinations if one.is_glued]
    lines = [f"  {'+'.join(str(s + 1) for s in one.speakers)}: {text}" for one in heard for text in one.prompts]
    left = [f"  ... and {len(lines) - most} more"] if len(lines) > most else []
    said = (
        "Prompts that ask for two LoRAs at once were made of the LoRAs' own. Prompts of yours that ask for both "
        "are better: add them with SSR Add Combination."
    )
    return [said, *lines[:most], *left] if heard else []


def _version() -> str:
    """Of this pack."""
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    found = re.search(r'^version = "(.+)"', project, re.MULTILINE)
    return found[1] if found else "unknown"
