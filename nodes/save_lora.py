"""SSR Save LoRA: writes a merged LoRA to where Load LoRA finds it, with word of where it comes from."""

from __future__ import annotations

import datetime
import re
from pathlib import Path
from typing import Any

import folder_paths
import torch
from comfy.cli_args import args
from comfy_api.latest import io, ui

from ..ssr_core import LoraError, SSRError
from ..ssr_core.storage import write_safetensors
from .sockets import CATEGORY, LoraModelSocket, schema

LONGEST = 180  # bytes of a name, which leaves room for the number, the ending and those of a temporary file

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class SSRSaveLoRA(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SSRSaveLoRA",
            display_name="SSR Save LoRA",
            category=CATEGORY,
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
        folder, name, counter, _, _ = folder_paths.get_save_image_path(
            f"loras/{_below(filename_prefix)}", folder_paths.get_output_directory()
        )
        path = Path(folder) / f"{name}_{counter:05}_.safetensors"
        metadata = {} if args.disable_metadata else _metadata(lora, path)
        write_safetensors(_converted(lora, _DTYPES[dtype]), path, metadata)
        listed = path.relative_to(Path(folder_paths.get_output_directory()) / "loras").as_posix()
        return io.NodeOutput(listed, ui=ui.PreviewText(f"Saved {listed} ({path.stat().st_size / 2**20:.1f} MiB)"))


def _below(prefix: str) -> str:
    """A name, maybe in folders, that is below the one for LoRAs on every system that a shared workflow may reach.

    Raises:
        SSRError: it leads out of that folder, or is longer than file systems take.
    """
    parts = [part.strip(" ") for part in re.sub(r'[<>:"|?*\x00-\x1f\x7f\ud800-\udfff]', "_", prefix).split("/")]
    for part in parts:
        if {*part.replace("\\", "/").split("/")} & {".."}:
            raise SSRError(f"SSR Save LoRA: {prefix!r} leads out of output/loras; choose a name below it.")
        if (size := len(part.encode())) > LONGEST:
            raise SSRError(
                f"SSR Save LoRA: {part[:40]!r}... is {size} bytes long, more than the {LONGEST} that every file system "
                "takes together with a number; choose a shorter name."
            )
    return "/".join(part for part in parts if part not in ("", ".")) or "merged"


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
