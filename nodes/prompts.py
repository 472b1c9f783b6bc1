"""SSR Prompts: several calibration prompts from one text box."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from .calibrating.prompt import encode_lines
from .schema import inputs
from .schema.sockets import schema


class SSRPrompts(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SSRPrompts",
            display_name="SSR Prompts",
            description="Encodes calibration prompts, one per line. A few that differ merge much better than one.",
            search_aliases=["calibration prompts", "prompt list", "ssr merge"],
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoder of the model."),
                io.String.Input(
                    "text",
                    multiline=True,
                    dynamic_prompts=False,
                    tooltip="One prompt per line, with the LoRA's trigger words, in the settings you will use it in.",
                ),
                inputs.references(),
            ],
            outputs=[io.Conditioning.Output(display_name="calibration", tooltip="For SSR Add LoRA.")],
        )

    @classmethod
    def execute(cls, clip: Any, text: str, references: Any = None) -> io.NodeOutput:
        return io.NodeOutput(encode_lines(clip, text.splitlines(), "SSR Prompts", references))
