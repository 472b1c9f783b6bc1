"""SSR Save LoRA: writes a merged LoRA to where Load LoRA finds it, with word of where it comes from."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import folder_paths
import torch
from comfy.cli_args import args
from comfy_api.latest import io, ui

from ..ssr_core import LoraError
from ..ssr_core.files.storage import write_safetensors
from .schema.sockets import LoraModelSocket, schema
from .writing.save_path import next_path

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


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
                io.Combo.Input(
                    "dtype",
                    options=list(_DTYPES),
                    default="bfloat16",
                    tooltip="bfloat16 and float16 make files of the usual size; float32 is exact.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="lora_name", tooltip="The name under which Load LoRA lists the file.")
            ],
        )

    @classmethod
    def execute(cls, lora: Any, filename_prefix: str, dtype: str) -> io.NodeOutput:
        path = next_path("loras", filename_prefix, "merged")
        metadata = {} if args.disable_metadata else _metadata(lora, path)
        write_safetensors(_converted(lora, _DTYPES[dtype]), path, metadata)
        listed = path.relative_to(Path(folder_paths.get_output_directory()) / "loras").as_posix()
        return io.NodeOutput(listed, ui=ui.PreviewText(f"Saved {listed} ({path.stat().st_size / 2**20:.1f} MiB)"))


def _converted(lora: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Weights in `dtype`; alphas stay as they are. Nothing shares storage, as safetensors wants it."""
    tensors = {}
    for key, value in lora.items():
        narrow = value.ndim > 0 and value.is_floating_point()
        tensors[key] = (value.to(dtype) if narrow else value).detach().cpu().contiguous().clone()
        if not torch.isfinite(tensors[key]).all():
            raise LoraError(f"SSR Save LoRA: {key} has values that {dtype} cannot hold; choose bfloat16 or float32.")
    return tensors


def _metadata(lora: Any, path: Path) -> dict[str, str]:
    known = dict(getattr(lora, "metadata", {}))
    return {**known, "modelspec.title": path.stem, "modelspec.date": datetime.date.today().isoformat()}
