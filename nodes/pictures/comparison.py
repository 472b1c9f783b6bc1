"""Comparison: every prompt drawn by every candidate, and by what the prompt asks for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import Tensor

from ..calibrating.progress import show_steps
from ..reading.task import Task
from .candidates import Candidate, candidates, names, together
from .rendering import Rendering, Scene, render
from .sheet import Place


@dataclass(frozen=True, eq=False)
class Comparison:
    """Rows are prompts, columns the candidates."""

    columns: tuple[str, ...]
    latents: Mapping[Place, Tensor]
    pictures: Mapping[Place, Image.Image]
    wanted: Mapping[int, Tensor]  # by row, the latent with the LoRAs that the prompt asks for, where that is known


def compare(
    model: Any,
    clip: Any,
    vae: Any,
    tasks: Sequence[Task],
    merged: Mapping[str, Tensor],
    scenes: Sequence[Scene],
    negative: Sequence[Any] | None,
    latent: dict[str, Any],
    how: Rendering,
    tell: Callable[[str], None],
) -> Comparison:
    """Draw all of it from the same noise, a candidate at a time.

    Raises:
        ModelMismatchError: the merge does not fit the model.
        LoraError: a LoRA file cannot be read.
    """
    columns, several = names(tasks), _several(scenes)
    on_step = show_steps(model, (len(columns) * len(scenes) + sum(map(len, several.values()))) * how.steps)

    def drawn(candidate: Candidate, rows: Sequence[int]) -> Iterator[tuple[int, tuple[Tensor, Image.Image]]]:
        chosen = [scenes[row] for row in rows]
        return zip(rows, render(candidate, chosen, negative, latent, vae, how, on_step), strict=True)

    latents: dict[Place, Tensor] = {}
    pictures: dict[Place, Image.Image] = {}
    for column, candidate in enumerate(candidates(model, clip, tasks, merged)):
        tell(f"{column + 1} of {len(columns)}: {candidate.name}")
        for row, both in drawn(candidate, range(len(scenes))):
            latents[row, column], pictures[row, column] = both
    known = [(row, scene.speakers) for row, scene in enumerate(scenes) if scene.speakers]
    wanted = {row: latents[row, 1 + speakers[0]] for row, speakers in known if len(speakers) == 1}
    for speakers, candidate in together(model, clip, tasks, several):
        tell(f"What is asked for: {candidate.name}")
        wanted |= {row: found for row, (found, _) in drawn(candidate, several[speakers])}
    return Comparison(tuple(columns), latents, pictures, wanted)


def _several(scenes: Sequence[Scene]) -> dict[tuple[int, ...], list[int]]:
    """By the LoRAs that they ask for at once, the rows that ask for two or more."""
    found: dict[tuple[int, ...], list[int]] = {}
    for row, scene in enumerate(scenes):
        if scene.speakers and len(scene.speakers) > 1:
            found.setdefault(scene.speakers, []).append(row)
    return found
