"""SSR Add Combination: prompts that ask for several of the LoRAs at once, or for none of them."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..ssr_core import SSRError
from .reading.combination import ALL, Combination
from .reading.task import Task
from .schema.sockets import SSRTasks, schema


class SSRAddCombination(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SSRAddCombination",
            display_name="SSR Add Combination",
            description="Adds prompts that ask for several of the LoRAs at once, such as a character in a style, so "
            "that the merge can do both in one picture; or prompts where no LoRA should speak. It stands anywhere in "
            "the chain of SSR Add LoRA.",
            search_aliases=["style and character", "several loras at once", "joint prompt", "ssr merge"],
            inputs=[
                io.String.Input(
                    "loras",
                    default=ALL,
                    tooltip="Which LoRAs the prompts ask for: their numbers in the chain or their names, such as 1, 3, "
                    "or all. none: prompts where no LoRA should speak, such as crowds and empty places.",
                ),
                io.Conditioning.Input(
                    "calibration",
                    tooltip="Prompts that ask for all of these at once, with the trigger words of each: from SSR "
                    "Prompts. Four that differ are enough.",
                ),
                SSRTasks.Input("tasks", optional=True, tooltip="The LoRAs and combinations added before this one."),
            ],
            outputs=[SSRTasks.Output(display_name="tasks", tooltip="All that was added so far.")],
        )

    @classmethod
    def execute(cls, loras: str, calibration: list[Any], tasks: tuple[Task | Combination, ...] = ()) -> io.NodeOutput:
        if not loras.strip():
            raise SSRError("SSR Add Combination: say which LoRAs the prompts ask for, such as 1, 3.")
        return io.NodeOutput((*(tasks or ()), Combination(loras, list(calibration or ()))))
