"""SSR Report: which LoRAs disturb each other, where and how much, before anything is merged."""

from __future__ import annotations

from dataclasses import replace

import comfy.model_management
import comfy.utils
from comfy_api.latest import io, ui

from ..ssr_core import MergeSettings, Ridge, advise, find_conflict
from ..ssr_core.report.advice import details
from .calibrating.stats import Stats
from .calibrating.text_encoder import text_settings
from .pictures.charts import chart
from .schema import inputs
from .schema.sockets import ADVANCED, SSRStats, schema


class SSRReport(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SSRReport",
            display_name="SSR Report",
            description="Tells from the statistics alone, before any merge, which LoRAs disturb each other, in which "
            "blocks of the model and how much, what routing leaves of it, and what a smaller rank costs.",
            search_aliases=["lora conflict", "lora interference", "analyze lora", "cross-talk", "ssr merge"],
            is_output_node=True,
            inputs=[
                SSRStats.Input("stats", tooltip="From SSR Collect Stats or SSR Load Stats."),
                inputs.ridge(
                    "Of the merge that the stack is compared with: the ridge of SSR Solve.", optional=True, **ADVANCED
                ),
            ],
            outputs=[
                io.String.Output(display_name="report", tooltip="What a person can act on."),
                io.Image.Output(display_name="chart", tooltip="The same as a picture."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, stats: Stats, ridge: float = 0.01) -> io.NodeOutput:
        bar = comfy.utils.ProgressBar(len(stats.calibration.statistics))

        def on_site(done: int, total: int) -> None:
            comfy.model_management.throw_exception_if_processing_interrupted()
            bar.update_absolute(done + 1, total)

        settings = MergeSettings(ridge=Ridge(relative=ridge))
        conflict = find_conflict(stats.calibration, settings, on_site)
        report = advise(conflict)
        if stats.text is not None and stats.text.statistics:
            scaled = tuple(lora.task.text_strength for lora in stats.loras)
            of_text = find_conflict(stats.text, text_settings(replace(settings, strengths=scaled)))
            report += f"\n\nText encoder: {details(of_text)}"
        picture = chart(conflict)
        return io.NodeOutput(report, picture, ui=ui.PreviewImage(picture))
