# SPDX-License-Identifier: Apache-2.0
"""The machine that is measured: what a table says above itself, and a real ComfyUI for the device in question."""

from __future__ import annotations

import importlib
import platform
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path += [path for path in (str(ROOT), str(ROOT / "tests" / "support")) if path not in sys.path]

import comfy_runtime  # noqa: E402

COMFYUI = comfy_runtime.find_comfyui()


def start_comfyui(device: str = "cpu") -> None:
    """Make ComfyUI's modules importable, set to compute on `device`."""
    if COMFYUI is None:
        sys.exit("Set COMFYUI_PATH to a ComfyUI folder.")
    sys.path.insert(0, str(COMFYUI))  # before this repository, whose nodes/ would hide ComfyUI's
    args = importlib.import_module("comfy.cli_args").args
    args.cpu = not device.startswith("cuda")
    args.base_directory = tempfile.mkdtemp(prefix="ssr-speed-")


def describe(device: str = "cpu", dtype: str = "float32") -> str:
    """One line: the machine and the versions."""
    threads = f"{torch.get_num_threads()} CPU threads"
    chip = torch.cuda.get_device_name() if device.startswith("cuda") else f"{_processor()}, {threads}"
    return f"{platform.machine()}, {chip}, torch {torch.__version__}, ComfyUI {_comfyui()}, {dtype}"


def synchronize(device: str) -> None:
    """Wait for the GPU, if it is one that computes."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def memory_now(device: str = "cpu") -> int:
    """Bytes that this process has, on the GPU if that computes. `memory_peak` counts from here. Linux, for /proc."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def memory_peak(device: str = "cpu") -> int:
    """The most bytes that this process had since `memory_now`."""
    return torch.cuda.max_memory_allocated() if device.startswith("cuda") else _status("VmHWM")


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))


def _processor() -> str:
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text(encoding="utf-8").splitlines() if facts.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or "CPU")


def _comfyui() -> str:
    version = COMFYUI / "comfyui_version.py" if COMFYUI is not None else None
    if version is None or not version.is_file():
        return "absent"
    return version.read_text(encoding="utf-8").rpartition("=")[2].strip().strip("\"'")
