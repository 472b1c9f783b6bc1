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

from .prompt import texts

if TYPE_CHECKING:
    from ..reading.task import Task
    from .runs import Sampling

Prompts = tuple[tuple[str, ...], ...]


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

    @classmethod
    def of(
        cls, model: Any, tasks: Sequence[Task], sampling: Sampling, context: int, refine: int, expand_rank: int
    ) -> Circumstances:
        """A run that happens now."""
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
        )

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Circumstances:
        """What `as_json` gave. TypeError or KeyError if it is something else."""
        lists = {name: tuple(values[name]) for name in ("strengths", "counts", "negative")}
        return cls(**{**values, **lists, "prompts": tuple(map(tuple, values["prompts"]))})

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def without_prompts(self) -> Circumstances:
        return replace(self, prompts=(), negative=())

    def reordered(self, order: Sequence[int]) -> Circumstances:
        """With the LoRAs in another order: the new k-th is the old order[k]."""
        return replace(
            self,
            strengths=tuple(self.strengths[task] for task in order),
            counts=tuple(self.counts[task] for task in order),
            prompts=tuple(self.prompts[task] for task in order) if self.prompts else (),
        )


def _version() -> str:
    """Of this pack."""
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    found = re.search(r'^version = "(.+)"', project, re.MULTILINE)
    return found[1] if found else "unknown"
