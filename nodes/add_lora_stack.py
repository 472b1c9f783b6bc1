"""SSR Add LoRA Stack: a whole LORA_STACK of another pack at once, with prompts for each of its LoRAs."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from comfy_api.latest import io

from ..ssr_core import LoraError
from .calibrating.case_prompts import combinations_of
from .calibrating.prompt import encode_lines
from .reading.combination import Combination
from .reading.lora_stack import read_stack
from .reading.task import Task
from .schema import inputs
from .schema.sockets import LoraStackSocket, SSRTasks, schema


class SSRAddLoRAStack(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SSRAddLoRAStack",
            display_name="SSR Add LoRA Stack",
            description="Adds all LoRAs of a LORA_STACK, as LoRA stackers of other packs make it, to those merged.",
            search_aliases=["lora stack", "merge lora stack", "ssr merge"],
            inputs=[
                LoraStackSocket.Input("lora_stack", tooltip="LoRAs with their strengths, from any LoRA stacker."),
                io.Clip.Input("clip", tooltip="The text encoder of the model, to encode the prompts with."),
                io.String.Input(
                    "prompts",
                    multiline=True,
                    dynamic_prompts=False,
                    tooltip="Calibration prompts, one per line, with an empty line between those of one LoRA and those "
                    "of the next, in the order of the stack.",
                ),
                inputs.combinations(
                    "Prompts that ask for several LoRAs at once, one per line, after the numbers of these in "
                    "the chain: 1+3: mochi the cat, sepia style. none: before prompts where no LoRA should speak.",
                    optional=True,
                ),
                SSRTasks.Input("tasks", optional=True, tooltip="The LoRAs added before these."),
                inputs.references(),
            ],
            outputs=[SSRTasks.Output(display_name="tasks", tooltip="All LoRAs added so far.")],
        )

    @classmethod
    def execute(
        cls,
        lora_stack: Any,
        clip: Any,
        prompts: str,
        combinations: str = "",
        tasks: tuple[Task | Combination, ...] = (),
        references: dict[str, Any] | None = None,
    ) -> io.NodeOutput:
        entries = read_stack(lora_stack, "SSR Add LoRA Stack")
        added = [Task(one.name, one.path, one.strength, [], clip_strength=one.clip_strength) for one in entries]
        blocks = [block.splitlines() for block in re.split(r"\n\s*\n", prompts.strip()) if block.strip()]
        asked = [number for number, task in enumerate(added) if len(blocks) == len(added) or not task.is_off]
        if not added or len(blocks) != len(asked):
            raise LoraError(
                f"SSR Add LoRA Stack: there are {len(asked)} LoRAs in the stack "
                f"({', '.join(added[number].name for number in asked)}) and prompts for {len(blocks)}; write the "
                "prompts of each LoRA one per line, with an empty line before those of the next."
            )
        for number, lines in zip(asked, blocks, strict=True):
            conditioning = encode_lines(clip, lines, "SSR Add LoRA Stack", references)
            added[number] = replace(added[number], conditioning=conditioning)
        together = combinations_of(clip, combinations, "SSR Add LoRA Stack", references)
        return io.NodeOutput((*(tasks or ()), *added, *together))
