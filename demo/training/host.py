# SPDX-License-Identifier: Apache-2.0
"""Makes a ComfyUI source tree (COMFYUI_PATH) and the demo's own node importable, on the CPU and without a server."""

import importlib
import os
import sys
from pathlib import Path

TEXT_ENCODER_NODE = Path(__file__).parents[1] / "custom_nodes" / "tiny_text_encoder"


def find() -> str:
    """The ComfyUI folder; SystemExit if COMFYUI_PATH does not name one."""
    path = os.environ.get("COMFYUI_PATH", "")
    if not os.path.isfile(os.path.join(path, "comfy", "sd.py")):
        raise SystemExit(f"COMFYUI_PATH={path!r} holds no comfy/sd.py: set it to your ComfyUI folder")
    return path


def prepare() -> None:
    """Has to come before the first import of anything from ComfyUI."""
    sys.path[:0] = [find(), str(TEXT_ENCODER_NODE)]
    args = importlib.import_module("comfy.cli_args").args
    args.cpu = True
    args.use_pytorch_cross_attention = True
    # outside of training ComfyUI rotates queries and keys with a kernel that autograd cannot follow
    importlib.import_module("comfy.model_management").in_training = True
