"""SSR Load Stats: statistics from a file, for the same LoRAs on the same model."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..ssr_core import LoraError
from .calibrating.stats import Stats
from .reading.combination import Combination, parted
from .reading.file_state import state_of
from .reading.task import Task
from .schema.sockets import SSRStats, SSRTasks, say, schema
from .writing.stats_file import load
from .writing.stats_folder import find, listed


class SSRLoadStats(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SSRLoadStats",
            display_name="SSR Load Stats",
            description="Loads what SSR Save Stats saved: nothing is sampled. It needs the same LoRAs, in any order; "
            "their strengths may be others, and their prompts are not used.",
            search_aliases=["load statistics", "load calibration", "ssr merge"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=list(listed()),
                    tooltip="A file in the folder ssr_stats of ComfyUI's output or input folder, newest first.",
                ),
                io.Model.Input("model", tooltip="The base model that the statistics were collected on."),
                SSRTasks.Input(
                    "tasks", tooltip="The LoRAs that the statistics were collected with, from SSR Add LoRA."
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="The text encoder, if the statistics were collected with it.",
                ),
            ],
            outputs=[SSRStats.Output(display_name="stats", tooltip="What was measured; for SSR Solve.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, file: str, **_: Any) -> str:
        return state_of(listed().get(file), file)

    @classmethod
    def execute(cls, file: str, model: Any, tasks: tuple[Task | Combination, ...], clip: Any = None) -> io.NodeOutput:
        tasks, _ = parted(tasks)
        if not tasks:
            raise LoraError("SSR Load Stats: there is no LoRA; add those that the statistics were collected with.")
        stats = load(find(file), model, tasks, clip)
        say(cls, _summary(stats, clip))
        return io.NodeOutput(stats)


def _summary(stats: Stats, clip: Any) -> str:
    prompts = sum(sum(one.counts) for one in stats.collections)
    ignored = " They were collected without clip, so the text encoder's parts are summed." if clip else ""
    return (
        f"{len(stats.loras)} LoRAs, {len(stats.calibration.subspaces)} sites. {prompts} prompts, last collected on "
        f"{stats.collections[-1].date}.{ignored if not stats.with_clip else ''}"
    )
