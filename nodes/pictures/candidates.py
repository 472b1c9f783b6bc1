"""Candidates: the models that a comparison shows, with their text encoders, as ComfyUI itself loads LoRAs onto them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.sd
from torch import Tensor

from ..reading.lora_file import read
from ..reading.task import Task
from ..writing.lora_model import load_into

WEAKER = 0.7  # of their strengths: what people try first when a stack looks wrong


@dataclass(frozen=True, eq=False)
class Candidate:
    """One column of a comparison."""

    name: str
    model: Any
    clip: Any


def names(tasks: Sequence[Task]) -> list[str]:
    """Of the columns, in their order."""
    return ["base", *(task.name for task in tasks), "plain stack", f"stack at {WEAKER:g}", "SSR merge"]


def candidates(model: Any, clip: Any, tasks: Sequence[Task], merged: Mapping[str, Tensor]) -> Iterator[Candidate]:
    """Base, each LoRA alone, all of them stacked, stacked at less strength, and merged; one at a time.

    Raises:
        ModelMismatchError: the merge does not fit the model.
        LoraError: a LoRA file cannot be read.
    """
    found = iter(names(tasks))
    yield Candidate(next(found), model, clip)
    files = [read(task)[0] for task in tasks]
    for task, tensors in zip(tasks, files, strict=True):
        yield Candidate(next(found), *_loaded(model, clip, [(task, tensors)], 1.0))
    for scale in (1.0, WEAKER):
        yield Candidate(next(found), *_loaded(model, clip, list(zip(tasks, files, strict=True)), scale))
    yield Candidate(next(found), *load_into(merged, model, clip, 1.0))


def together(
    model: Any, clip: Any, tasks: Sequence[Task], which: Iterable[tuple[int, ...]]
) -> Iterator[tuple[tuple[int, ...], Candidate]]:
    """Several of the LoRAs loaded one after the other: what prompts that ask for these should give."""
    for speakers in which:
        chosen = [(tasks[number], read(tasks[number])[0]) for number in speakers]
        name = " + ".join(task.name for task, _ in chosen)
        yield speakers, Candidate(name, *_loaded(model, clip, chosen, 1.0))


def _loaded(model: Any, clip: Any, loras: Sequence[tuple[Task, Mapping[str, Tensor]]], scale: float) -> tuple[Any, Any]:
    for task, tensors in loras:
        strengths = scale * task.strength, scale * task.text_strength
        model, clip = comfy.sd.load_lora_for_models(model, clip, dict(tensors), *strengths)
    return model, clip
