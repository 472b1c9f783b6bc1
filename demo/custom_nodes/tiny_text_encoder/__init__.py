# SPDX-License-Identifier: Apache-2.0
"""One node for the demo: loads its tiny text encoder, for which ComfyUI has no stock loader."""

from __future__ import annotations

import folder_paths
from comfy_api.latest import ComfyExtension, io

from . import tiny_clip


class LoadTinyClip(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SSRDemoLoadTinyCLIP",
            display_name="Load Tiny CLIP (demo)",
            category="SSR Merge/demo",
            description="Loads the tiny text encoder that belongs to the demo model.",
            inputs=[io.Combo.Input("clip_name", options=folder_paths.get_filename_list("text_encoders"))],
            outputs=[io.Clip.Output()],
        )

    @classmethod
    def execute(cls, clip_name: str) -> io.NodeOutput:
        return io.NodeOutput(tiny_clip.load(folder_paths.get_full_path_or_raise("text_encoders", clip_name)))


class DemoExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [LoadTinyClip]


async def comfy_entrypoint() -> DemoExtension:
    return DemoExtension()
