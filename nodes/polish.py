"""SSR Polish: a merge learns from its LoRAs. No longer training-free, and about twice as good."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from .calibrating.stats import Stats
from .pictures.learning_curve import learning_curve
from .polishing.polish import DistillationSettings, polish
from .schema import inputs
from .schema.sockets import ADVANCED, LoraModelSocket, SSRStats, ending_said, say, schema


class SSRPolish(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SSRPolish",
            display_name="SSR Polish",
            description="Trains a merge for a few steps, with the LoRAs that it is made of as its teachers: what the "
            "model predicts with them, on the prompts that were calibrated on, it shall predict with the merge. It "
            "needs no images, and far more time and memory than SSR Solve.",
            search_aliases=["distill lora", "train merge", "finetune merge", "ssr merge"],
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="The base model that the statistics were collected on."),
                SSRStats.Input("stats", tooltip="From SSR Collect Stats: the LoRAs and their prompts."),
                LoraModelSocket.Input("lora", tooltip="Their merge, from SSR Solve, at the rank that you want."),
                inputs.steps("25 take off most of the error that can be taken off, 100 nearly all.", default=100),
                inputs.seed("Of the noise that it learns on, and the order."),
                io.Int.Input(
                    "batch",
                    default=8,
                    min=1,
                    max=256,
                    optional=True,
                    tooltip="Points of the calibration in each step, one after the other: more take time, not memory.",
                    **ADVANCED,
                ),
                io.Float.Input(
                    "learning_rate",
                    default=DistillationSettings.learning_rate,
                    min=0.0001,
                    max=1.0,
                    step=0.0001,
                    round=0.0001,
                    optional=True,
                    tooltip="How far a step goes, of each layer's own size. It falls to 0 towards the end.",
                    **ADVANCED,
                ),
                io.Boolean.Input(
                    "only_up",
                    default=False,
                    optional=True,
                    tooltip="Half of the merge learns: less memory, and a little worse.",
                    **ADVANCED,
                ),
                io.Model.Input(
                    "model_before",
                    optional=True,
                    tooltip="As in SSR Collect Stats: samples the steps before start_at_step.",
                ),
            ],
            outputs=[
                LoraModelSocket.Output(display_name="lora", tooltip="The polished merge, no larger than before."),
                io.String.Output(display_name="report", tooltip="The error of each LoRA before and after."),
                io.Image.Output(display_name="chart", tooltip="The error on held-out points, step by step."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    @ending_said
    def execute(
        cls,
        model: Any,
        stats: Stats,
        lora: Any,
        steps: int,
        seed: int,
        batch: int = 8,
        learning_rate: float = DistillationSettings.learning_rate,
        only_up: bool = False,
        model_before: Any = None,
    ) -> io.NodeOutput:
        settings = DistillationSettings(steps, batch, learning_rate, seed=seed, only_up=only_up)
        polished = polish(model, stats, lora, settings, lambda text: say(cls, text), model_before)
        picture = learning_curve(polished.history, polished.labels)
        return io.NodeOutput(polished.lora, polished.report, picture, ui=ui.PreviewImage(picture))
