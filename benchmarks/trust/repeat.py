# SPDX-License-Identifier: Apache-2.0
"""The same merge again and again in real ComfyUI servers, saved each time: how many different files that makes.

    COMFYUI_PATH=... python benchmarks/trust/repeat.py [--repeats 5]

Before each, other merges run and all global random states are set to something else; the last is in a new server.
Each file gets the same name, which is in its metadata, and the date must not change meanwhile.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path = [str(ROOT), str(ROOT / "tests" / "support"), *sys.path[1:]]

import comfy_runtime  # noqa: E402
from faults import Trial, merge_graph, node, tiny_server  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    comfyui = comfy_runtime.find_comfyui()
    if comfyui is None:
        sys.exit("Set COMFYUI_PATH to a ComfyUI folder.")
    with tempfile.TemporaryDirectory() as folder, tiny_server(Path(folder), comfyui) as server:
        trial = Trial(server)
        hashes = []
        for number in range(repeats):
            if number == repeats - 1:
                server.stop()
                server.start()
            hashes.append(saved(trial, number))
            print(f"repeat {number + 1}: sha256 {hashes[-1]}", flush=True)
    print(f"{len(set(hashes))} value over {repeats} repeats")


def saved(trial: Trial, number: int) -> str:
    """The hash of the merged file after other things were run."""
    for seed in range(number):
        trial.server.run(merge_graph(100 * number + seed + 1))
    graph = merge_graph(0, "disturbed", save="repeat")
    trial.server.run(graph | {"disturbed": node("TestDisturb", model=["model", 0], salt=number)})
    (path,) = (trial.server.base_directory / "output" / "loras").glob("repeat_*.safetensors")
    content = path.read_bytes()
    path.unlink()
    return hashlib.sha256(content).hexdigest()


if __name__ == "__main__":
    main()
