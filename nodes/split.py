"""SSR Split: the merge as one LoRA file for each LoRA, that no longer disturb each other and keep their own sliders."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from ..ssr_core import MergeSettings, Ridge, parse_rules
from .calibrating.stats import Stats
from .schema import inputs
from .schema.sockets import LoraModelSocket, SSRStats, schema
from .writing.lora_file import save
from .writing.merging import AUTO, split

NAME = "SSR Split"


class SSRSplit(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SSRSplit",
            display_name=NAME,
            description="Saves the merge as one cleaned LoRA for each that it is made of. Loaded together they are the "
            "merge; each still has its own strength, mask and schedule, in any tool.",
            search_aliases=["split lora", "keep sliders", "separate loras", "clean lora", "ssr merge"],
            is_output_node=True,
            inputs=[
                SSRStats.Input("stats", tooltip="From SSR Collect Stats."),
                io.String.Input(
                    "filename_prefix",
                    default="split",
                    tooltip="Before the names of the LoRAs in those of the files, under output/loras; a number is "
                    "added. Ending in / it is a folder for them.",
                ),
                inputs.dtype(),
                inputs.ridge("As in SSR Solve: how far the calibration is distrusted."),
                io.Int.Input(
                    "rank",
                    default=0,
                    min=-1,
                    max=4096,
                    tooltip="Size of each file, as that of a LoRA of this rank. 0: as large as its LoRA. -1 finds, "
                    "layer by layer, the smallest rank that loses less than 1 % of the effect.",
                ),
                inputs.strengths(),
                inputs.layers(),
            ],
            outputs=[
                io.String.Output(
                    display_name="lora_names",
                    is_output_list=True,
                    tooltip="The names under which Load LoRA lists the files, in the order of the LoRAs.",
                ),
                LoraModelSocket.Output(display_name="loras", is_output_list=True, tooltip="The same as LORA_MODELs."),
                io.String.Output(display_name="report", tooltip="What each does by itself, and adds to the others."),
            ],
        )

    @classmethod
    def execute(
        cls,
        stats: Stats,
        filename_prefix: str,
        dtype: str,
        ridge: float,
        rank: int,
        strengths: str,
        layers: str = "",
    ) -> io.NodeOutput:
        settings = MergeSettings(
            ridge=Ridge(relative=ridge),
            rank=AUTO if rank < 0 else rank,
            strengths=inputs.numbers(strengths, NAME) or None,
            rules=parse_rules(layers),
        )
        loras, report = split(stats, settings)
        listed, size = save(_named(loras, stats, filename_prefix), dtype, NAME)
        told = f"Saved {', '.join(listed)} ({size / 2**20:.1f} MiB)"
        return io.NodeOutput(listed, loras, report, ui=ui.PreviewText(told))


def _named(loras: list[Any], stats: Stats, prefix: str) -> list[tuple[Any, str]]:
    """Each with the name of its file, in the folder `prefix` if that ends like one."""
    between = "" if not prefix.strip() or prefix.endswith("/") else "_"
    names = [lora.task.name.replace("/", "_").replace("\\", "_") for lora in stats.loras]
    return [(lora, f"{prefix}{between}{name}") for lora, name in zip(loras, names, strict=True)]
