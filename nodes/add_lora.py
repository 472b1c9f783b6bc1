"""SSR Add LoRA: puts one LoRA and its calibration prompt on the list of LoRAs to merge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import io

from ..ssr_core import LoraError
from .reading.combination import Combination, parted
from .reading.file_state import state_of
from .reading.task import Task
from .schema.sockets import LoraModelSocket, SSRTasks, schema

NONE = "(use the lora input)"


class SSRAddLoRA(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SSRAddLoRA",
            display_name="SSR Add LoRA",
            description="Adds a LoRA and its calibration prompt to those that are merged. Chain one node per LoRA.",
            search_aliases=["combine loras", "ssr merge", "multiple loras"],
            inputs=[
                io.Combo.Input(
                    "lora_name",
                    options=[*folder_paths.get_filename_list("loras"), NONE],
                    tooltip="The LoRA file to add.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.01,
                    tooltip="How strong this LoRA is, alone and in the merge. 1 means what Load LoRA's 1 means.",
                ),
                io.Conditioning.Input(
                    "calibration",
                    optional=True,
                    tooltip="Prompts that show what this LoRA is for, with its trigger words: from SSR Prompts, or "
                    "joined with Conditioning (Combine). Each is sampled by itself, and a few merge better than one. "
                    "Only for statistics from SSR Load Stats are none needed.",
                ),
                SSRTasks.Input("tasks", optional=True, tooltip="The LoRAs added before this one."),
                LoraModelSocket.Input(
                    "lora", optional=True, tooltip="A LoRA from another node, used instead of the file."
                ),
                io.Latent.Input(
                    "images",
                    optional=True,
                    tooltip="Images that show what the LoRA is for, VAE-encoded. The model then looks at these with "
                    "noise added instead of sampling images of its own.",
                ),
            ],
            outputs=[SSRTasks.Output(display_name="tasks", tooltip="All LoRAs added so far.")],
        )

    @classmethod
    def fingerprint_inputs(cls, lora_name: str, **_: Any) -> str:
        return state_of(folder_paths.get_full_path("loras", lora_name), lora_name)

    @classmethod
    def execute(
        cls,
        lora_name: str,
        strength: float,
        calibration: list[Any] | None = None,
        tasks: tuple[Task | Combination, ...] = (),
        lora: Any = None,
        images: Any = None,
    ) -> io.NodeOutput:
        before = tuple(tasks or ())
        if lora is not None:
            name = getattr(lora, "metadata", {}).get("modelspec.title") or f"LoRA {len(parted(before)[0]) + 1}"
            return io.NodeOutput((*before, Task(name, lora, strength, list(calibration or ()), images)))
        if lora_name == NONE:
            raise LoraError("SSR Add LoRA: choose a LoRA file, or connect the lora input.")
        path = Path(folder_paths.get_full_path_or_raise("loras", lora_name))
        return io.NodeOutput((*before, Task(path.stem, path, strength, list(calibration or ()), images)))
