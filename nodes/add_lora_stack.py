"""SSR Add LoRA Stack: a whole LORA_STACK of another pack at once, with prompts for each of its LoRAs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import io

from ..ssr_core import LoraError
from .sockets import CATEGORY, LoraStackSocket, SSRTasks, Task, schema
from .text_encoder import encode


class SSRAddLoRAStack(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SSRAddLoRAStack",
            display_name="SSR Add LoRA Stack",
            category=CATEGORY,
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
                SSRTasks.Input("tasks", optional=True, tooltip="The LoRAs added before these."),
            ],
            outputs=[SSRTasks.Output(display_name="tasks", tooltip="All LoRAs added so far.")],
        )

    @classmethod
    def execute(cls, lora_stack: Any, clip: Any, prompts: str, tasks: tuple[Task, ...] = ()) -> io.NodeOutput:
        if clip is None:
            raise LoraError("SSR Add LoRA Stack: there is no text encoder; connect Load CLIP.")
        entries = [_entry(entry) for entry in lora_stack or () if entry and entry[0] not in (None, "", "None")]
        blocks = [block.splitlines() for block in re.split(r"\n\s*\n", prompts.strip()) if block.strip()]
        if not entries or len(blocks) != len(entries):
            raise LoraError(
                f"SSR Add LoRA Stack: there are {len(entries)} LoRAs in the stack "
                f"({', '.join(path.stem for path, _, _ in entries)}) and prompts for {len(blocks)}; write the prompts "
                "of each LoRA one per line, with an empty line before those of the next."
            )
        added = [
            Task(path.stem, path, strength, _conditioning(clip, lines), clip_strength=clip_strength)
            for (path, strength, clip_strength), lines in zip(entries, blocks, strict=True)
        ]
        return io.NodeOutput((*(tasks or ()), *added))


def _entry(entry: Sequence[Any]) -> tuple[Path, float, float]:
    """(file, model strength, text encoder strength) of an entry, which may lack the last."""
    name, strength = str(entry[0]), float(entry[1])
    # a workflow made on Windows names files in folders with backslashes
    found = folder_paths.get_full_path("loras", name) or folder_paths.get_full_path("loras", name.replace("\\", "/"))
    if found is None:
        raise LoraError(f"SSR Add LoRA Stack: there is no LoRA file {name!r} in any of ComfyUI's loras folders.")
    return Path(found), strength, float(entry[2]) if len(entry) > 2 else strength


def _conditioning(clip: Any, lines: Sequence[str]) -> list[Any]:
    return [entry for line in lines if line.strip() for entry in encode(clip, line.strip())]
