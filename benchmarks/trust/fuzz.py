# SPDX-License-Identifier: Apache-2.0
"""Damaged, lying and hostile files by the thousand: each is an error that names the file, or a sane result.

    COMFYUI_PATH=... python benchmarks/trust/fuzz.py [--files 1000] [--only NAME]

LoRA files are read by ssr_core and by the nodes' reader in a real ComfyUI, statistics files by ssr_core. The table
counts what became of them; anything in the last column is a bug, and its seed repeats it.
"""

from __future__ import annotations

import argparse
import resource
import signal
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path = [str(ROOT / "tests" / "support"), *(path for path in sys.path if Path(path or ".").resolve() != ROOT)]

import comfy_runtime  # noqa: E402
from fuzzing import Reader, core_readers, fuzz, node_readers  # noqa: E402
from tiny_flux import flux_state_dict  # noqa: E402

SECONDS = 20  # that reading one file may take


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=1000, help="of each reader")
    parser.add_argument("--only", help="one reader")
    parser.add_argument("--seed", type=int, default=0, help="the first")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(f"{'reader':<28}{'files':>7}{'error':>8}{'sane':>7}{'bugs':>7}")
        for name, reader in readers(Path(folder)).items():
            if arguments.only not in (None, name):
                continue
            seeds = range(arguments.seed, arguments.seed + arguments.files)
            found, bugs = fuzz(replace(reader, read=limited(reader.read)), seeds, Path(folder))
            print(f"{name:<28}{len(seeds):>7}{found['error']:>8}{found['sane']:>7}{len(bugs):>7}", flush=True)
            for bug in bugs:
                print(bug)
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB")


def readers(folder: Path) -> dict[str, Reader]:
    comfyui = comfy_runtime.find_comfyui()
    if comfyui is None:
        sys.exit("Set COMFYUI_PATH to a ComfyUI folder.")
    comfy_runtime.start(comfyui, folder / "comfyui")
    pack = comfy_runtime.load_pack()
    import comfy.sd

    model = comfy.sd.load_diffusion_model_state_dict(flux_state_dict())
    return core_readers(pack.ssr_core, folder) | node_readers(pack, model)


def limited(read: Callable[[Path], None]) -> Callable[[Path], None]:
    """`read`, failing where it takes too long."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"more than {SECONDS} s")

    def in_time(path: Path) -> None:
        signal.signal(signal.SIGALRM, stop)
        signal.alarm(SECONDS)
        try:
            read(path)
        finally:
            signal.alarm(0)

    return in_time


if __name__ == "__main__":
    main()
