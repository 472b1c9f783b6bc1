"""Stats: what a calibration leaves behind. The value of SSR_STATS."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...ssr_core import Calibration
from ..reading.loaded_lora import LoadedLora
from .circumstances import Circumstances
from .prompt import without_text
from .runs import Kind, Run

FEW = 4  # prompts of a LoRA: of fewer, what is learnt is these more than the LoRA


@dataclass(frozen=True, eq=False)
class Sampled:
    """What was sampled to measure, so that more can be sampled of the same to polish a merge."""

    runs: tuple[Run, ...]  # one of each case
    latent: Mapping[str, Any]  # ComfyUI's LATENT, empty

    @classmethod
    def of(cls, runs: Sequence[Run], latent: Mapping[str, Any]) -> Sampled:
        """Without the texts of the prompts, which would keep the text encoder in memory."""
        kept = [replace(run, prompts=without_text(run.prompts)) for run in runs if run.kind is Kind.MEASURE]
        return cls(tuple(replace(run, case=replace(run.case, conditioning=run.prompts)) for run in kept), latent)

    def reordered(self, order: Sequence[int]) -> Sampled:
        """With the LoRAs in another order: the new k-th is the old order[k]."""
        return replace(self, runs=tuple(run.reordered(order) for run in self.runs))


@dataclass(frozen=True, eq=False)
class Stats:
    """All that SSR Solve needs: the LoRAs, what was measured, and where it all comes from."""

    loras: tuple[LoadedLora, ...]  # (K,)
    calibration: Calibration
    text: Calibration | None  # of the text encoder; None: nothing was measured there, and its parts are summed
    with_clip: bool  # whether the text encoder was there, so that the names in `loras` are its own
    silent: tuple[str, ...]  # modules that a LoRA changes and that never ran
    provenance: Mapping[str, str]  # metadata for the file that is saved in the end
    collections: tuple[Circumstances, ...]  # how it was measured: once, unless statistics were added
    sampled: tuple[Sampled, ...] = ()  # and on what; empty if loaded from a file
    notes: tuple[str, ...] = ()  # lines for the report: what could not be refined, and why

    def without(self, task: int) -> Stats:
        """As if LoRA `task` had never been there; where it comes from and what was sampled is still told of all."""
        return replace(
            self,
            loras=self.loras[:task] + self.loras[task + 1 :],
            calibration=self.calibration.without(task),
            text=None if self.text is None else self.text.without(task),
            collections=tuple(one.without(task) for one in self.collections),
        )

    @property
    def with_few_prompts(self) -> list[str]:
        """Names of LoRAs that were heard on fewer prompts than tell what they are for."""
        runs = [one for one in self.collections if one.sampling["steps"]]
        counts = [sum(one.counts[task] for one in runs) for task in range(len(self.loras))]
        return [name for name, count in zip(self.calibration.names, counts, strict=True) if 0 < count < FEW]

    @property
    def model(self) -> str:
        """ComfyUI's class of the model it was measured on."""
        return self.collections[0].model
