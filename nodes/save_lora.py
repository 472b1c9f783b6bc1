"""SSR Save LoRA: writes a merged LoRA to where Load LoRA finds it, with word of where it comes from."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from .schema import inputs
from .schema.sockets import LoraModelSocket, say, schema
from .writing.lora_file import save_one


class SSRSaveLoRA(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SSRSaveLoRA",
            display_name="SSR Save LoRA",
            description="Saves a merged LoRA under output/loras, where Load LoRA lists it, with word of its sources.",
            search_aliases=["save lora", "export lora", "ssr merge"],
            is_output_node=True,
            inputs=[
                LoraModelSocket.Input("lora", tooltip="The merged LoRA, from SSR Solve."),
                io.String.Input(
                    "filename_prefix", default="merged", tooltip="Name of the file; a number is added to it."
                ),
                inputs.dtype(),
            ],
            outputs=[
                io.String.Output(display_name="lora_name", tooltip="The name under which Load LoRA lists the file.")
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, lora: Any, filename_prefix: str, dtype: str) -> io.NodeOutput:
        listed, text = save_one(lora, filename_prefix, dtype, "SSR Save LoRA")
        say(cls, text)
        return io.NodeOutput(listed, ui=ui.PreviewText(text))
