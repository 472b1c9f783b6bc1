"""Nodes with exact, seeded input and exact output."""

from pathlib import Path

import folder_paths
import numpy
import torch
from comfy_api.latest import io


class TestConditioning(io.ComfyNode):
    """Random text tokens and a random pooled output, as if a text encoder had read a prompt."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TestConditioning",
            category="tests",
            inputs=[
                io.Int.Input("seed", default=0, min=0, max=2**31 - 1),
                io.Int.Input("tokens", default=8, min=1, max=512),
                io.Int.Input("context_width", default=32, min=1, max=8192),
                io.Int.Input("pooled_width", default=16, min=1, max=8192),
            ],
            outputs=[io.Conditioning.Output()],
        )

    @classmethod
    def execute(cls, seed: int, tokens: int, context_width: int, pooled_width: int) -> io.NodeOutput:
        generator = torch.Generator().manual_seed(seed)
        cross_attention = torch.randn(1, tokens, context_width, generator=generator)
        pooled = torch.randn(1, pooled_width, generator=generator)
        return io.NodeOutput([[cross_attention, {"pooled_output": pooled}]])


class TestSaveTensor(io.ComfyNode):
    """Writes a latent exactly: `output/<name>.npy`. The history names the file under "tensors"."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TestSaveTensor",
            category="tests",
            inputs=[io.Latent.Input("latent"), io.String.Input("name", default="latent")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, latent: dict, name: str) -> io.NodeOutput:
        file = Path(folder_paths.get_output_directory()) / f"{name}.npy"
        numpy.save(file, latent["samples"].float().cpu().numpy())
        return io.NodeOutput(ui={"tensors": [{"filename": file.name, "subfolder": "", "type": "output"}]})
