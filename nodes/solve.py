"""SSR Solve: turns statistics into one LoRA. Quick, so that settings can be tried without collecting again."""

from __future__ import annotations

import re

from comfy_api.latest import io

from ..ssr_core import MergeSettings, Ridge, SSRError, parse_rules
from .calibrating.stats import Stats
from .schema import inputs
from .schema.sockets import ADVANCED, LoraModelSocket, SSRStats, schema
from .writing.merging import AUTO, solve


class SSRSolve(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SSRSolve",
            display_name="SSR Solve",
            description="Merges the LoRAs into one that gives each of them its own signals. "
            "Change a setting and only this node runs again.",
            search_aliases=["merge lora", "lora merge", "ssr merge", "route"],
            inputs=[
                SSRStats.Input("stats", tooltip="From SSR Collect Stats."),
                inputs.ridge(
                    "How far the calibration is distrusted. More pulls the merge towards the LoRAs' mean; "
                    "raise it after short calibrations. 0.001 to 0.1 are usual.",
                ),
                io.Int.Input(
                    "rank",
                    default=0,
                    min=-1,
                    max=4096,
                    tooltip="Size of the merged LoRA, as that of a LoRA of this rank; layers that need more take from "
                    "those that need less. 0 keeps all, which is the sum of the LoRAs' ranks. -1 finds, layer by "
                    "layer, the smallest rank that loses less than 1 % of the effect.",
                ),
                io.Float.Input(
                    "routing",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="0 = the LoRAs simply stacked, 1 = fully routed.",
                ),
                io.String.Input(
                    "strengths",
                    default="",
                    tooltip="Strength of each LoRA in the merge, in their order, such as 1, 0.8, 1. "
                    "Empty: as given in SSR Add LoRA.",
                ),
                io.String.Input(
                    "layers",
                    default="",
                    multiline=True,
                    dynamic_prompts=False,
                    optional=True,
                    tooltip="Rules for layers, one per line; later ones overrule earlier ones. keep: routed, as all "
                    "are without a rule. stack: summed, not routed. drop: left out. Then what: all, attention, mlp, "
                    "modulation, text, image, text_encoder, or part of a name, such as drop single_blocks.0-9.",
                    **ADVANCED,
                ),
            ],
            outputs=[
                LoraModelSocket.Output(display_name="lora", tooltip="The merged LoRA."),
                io.String.Output(display_name="report", tooltip="What the merge keeps of each LoRA."),
            ],
        )

    @classmethod
    def execute(
        cls, stats: Stats, ridge: float, rank: int, routing: float, strengths: str, layers: str = ""
    ) -> io.NodeOutput:
        settings = MergeSettings(
            ridge=Ridge(relative=ridge),
            rank=AUTO if rank < 0 else rank,
            routing=routing,
            strengths=_numbers(strengths) or None,
            rules=parse_rules(layers),
        )
        return io.NodeOutput(*solve(stats, settings))


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in re.split(r"[\s,;]+", text.strip()) if part)
    except ValueError as error:
        raise SSRError(f"SSR Solve: strengths are {text!r}; give one number per LoRA, such as 1, 0.8, 1.") from error
