"""SSR Apply: puts a merged LoRA on a model, and says so if any part of it does not fit."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from .reading.keys import TEXT_ENCODER
from .schema.sockets import LoraModelSocket, say, schema
from .writing.lora_model import load_into


class SSRApply(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SSRApply",
            display_name="SSR Apply",
            description="Applies a merged LoRA to the model. Unlike a plain loader it fails when a key does not load, "
            "and says so when parts for the text encoder wait for a clip.",
            search_aliases=["apply lora", "load lora", "ssr merge"],
            inputs=[
                io.Model.Input("model", tooltip="The model the LoRAs were made for."),
                LoraModelSocket.Input("lora", tooltip="The merged LoRA, from SSR Solve."),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.01,
                    tooltip="Of the whole merge; 1 is what was calibrated.",
                ),
                io.Clip.Input("clip", optional=True, tooltip="Connect it when a LoRA also changes the text encoder."),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The model with the merged LoRA."),
                io.Clip.Output(display_name="clip", tooltip="The text encoder with the merged LoRA, if connected."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model: Any, lora: Any, strength: float, clip: Any = None) -> io.NodeOutput:
        result = io.NodeOutput(*load_into(lora, model, clip, strength))
        if clip is None and (left := sum(key.startswith(TEXT_ENCODER) for key in lora)):
            say(cls, f"{left} tensors are for the text encoder and are not applied: connect clip.")
        return result
