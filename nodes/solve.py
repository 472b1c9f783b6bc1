"""SSR Solve: turns statistics into one LoRA. Quick, so that settings can be tried without collecting again."""

from __future__ import annotations

from comfy_api.latest import io

from ..ssr_core import MergeSettings, Ridge, parse_rules
from .calibrating.stats import Stats
from .schema import inputs
from .schema.sockets import LoraModelSocket, SSRStats, schema
from .writing.merging import AUTO, solve

NAME = "SSR Solve"


class SSRSolve(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SSRSolve",
            display_name=NAME,
            description="Merges the LoRAs into one that gives each of them its own signals. "
            "Change a setting and only this node runs again.",
            search_aliases=["ssr merge", "route", "router", "solve merge"],
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
                inputs.strengths(),
                inputs.layers(),
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
            strengths=inputs.numbers(strengths, NAME) or None,
            rules=parse_rules(layers),
        )
        return io.NodeOutput(*solve(stats, settings))
