"""Rendering: a prompt to a picture, by ComfyUI's own sampling and decoding."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import comfy.model_management
import comfy.sample
from PIL import Image
from torch import Tensor

from ...ssr_core import SSRError
from ..calibrating.prompt import PROMPT, encode, with_reference
from ..calibrating.sampling import fitting
from ..calibrating.text_encoder import encode_anew
from ..reading.combination import Combination
from ..reading.task import Task
from .candidates import Candidate
from .picture import picture_of


@dataclass(frozen=True)
class Rendering:
    """How pictures are sampled, as in KSampler."""

    seed: int
    steps: int
    cfg: float
    sampler: str
    scheduler: str


@dataclass(frozen=True, eq=False)
class Scene:
    """What a row of a comparison shows."""

    label: str
    conditioning: list[Any] | None = None  # None: the label is the prompt
    speakers: tuple[int, ...] | None = None  # the LoRAs that it asks for, by number; None: not known
    picture: Tensor | None = None  # for an edit model, where the label is the prompt

    def encoded(self, clip: Any) -> list[Any]:
        """CONDITIONING as this text encoder reads the prompt, with all that other nodes did to it."""
        if self.conditioning is None:
            written = encode(clip, self.label)
            return written if self.picture is None else with_reference(written, self.picture)
        return [encode_anew(clip, entry) for entry in self.conditioning]


def scenes_of(
    text: str, tasks: Sequence[Task | Combination], references: Mapping[str, Any] | None = None
) -> list[Scene]:
    """One per line; without any, the first calibration prompt of each LoRA and combination.

    A line may begin with the numbers of the LoRAs that it asks for, as in "1+3: the cat on a beach, sepia style".

    Args:
        references: LATENT of pictures for an edit model, one for each line in turn.

    Raises:
        SSRError: there is none either, or a line is of a LoRA that is not there.
    """
    names = [task.name for task in tasks if isinstance(task, Task)]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    scenes = [_written(line, names) for line in lines]
    if references is not None:
        pictures = references["samples"].split(1)
        scenes = [replace(scene, picture=pictures[row % len(pictures)]) for row, scene in enumerate(scenes)]
    scenes = scenes or [_first(number, task, names) for number, task in enumerate(tasks) if task.conditioning]
    if not scenes:
        raise SSRError("There is no prompt to compare with; write one per line.")
    return scenes


def _written(line: str, names: Sequence[str]) -> Scene:
    found = re.fullmatch(r"(\d+(?:\s*\+\s*\d+)*)\s*:\s*(.+)", line)
    if found is None:
        return Scene(line)
    speakers = sorted({int(number) - 1 for number in found[1].split("+")})
    if not 0 <= speakers[0] <= speakers[-1] < len(names):
        raise SSRError(f"{line!r} asks for a LoRA that is not there; there are {len(names)}: {', '.join(names)}.")
    return Scene(found[2], speakers=tuple(speakers))


def _first(number: int, task: Task | Combination, names: Sequence[str]) -> Scene:
    """All entries of the first prompt: a schedule has several."""
    first = task.conditioning[0]
    speakers = (number,) if isinstance(task, Task) else task.case(names).speakers
    if PROMPT not in first[1]:
        name = task.name if isinstance(task, Task) else task.which
        return Scene(f"{name}: its first prompt", [first], speakers)
    text = first[1][PROMPT].text
    entries = [e for e in task.conditioning if PROMPT in e[1] and e[1][PROMPT].text == text]
    return Scene(text, entries, speakers)


def render(
    candidate: Candidate,
    scenes: Sequence[Scene],
    negative: Sequence[Any] | None,
    latent: dict[str, Any],
    vae: Any,
    how: Rendering,
    on_step: Callable[[Tensor], None],
) -> Iterator[tuple[Tensor, Image.Image]]:
    """The latent and the picture of each scene; of a video its middle frame. All start from the same noise.

    Args:
        negative: CONDITIONING, or None: the empty prompt.
        latent: LATENT, empty; of a batch the first.
    """
    with_text = [scene.encoded(candidate.clip) for scene in scenes]
    if negative is None:
        against = encode(candidate.clip, "")
    else:
        against = [encode_anew(candidate.clip, entry) for entry in negative]
    for positive in with_text:
        comfy.model_management.throw_exception_if_processing_interrupted()
        samples = fitting(candidate.model, latent)[:1]
        sampled = comfy.sample.sample(
            *(candidate.model, comfy.sample.prepare_noise(samples, how.seed), how.steps, how.cfg),
            *(how.sampler, how.scheduler, positive, against, samples),
            callback=lambda step, x0, x, total: on_step(x0),
            disable_pbar=True,
            seed=how.seed,
        )
        yield sampled, picture_of(vae.decode(sampled))
