# SPDX-License-Identifier: Apache-2.0
"""Interrupts and faults in a real ComfyUI server, and whether model, memory and folders are as before after each.

    COMFYUI_PATH=... python benchmarks/trust/faults.py [--share 1.0] [--only KIND]

After every fault the untouched model makes its image again, which has to be the same to the bit; no hook, patch or
injection may be on it, and no tensor and no file more may be there than before.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path = [str(ROOT), str(ROOT / "tests" / "support"), *sys.path[1:]]

import comfy_runtime  # noqa: E402
from faults import Trial, kill_while_saving, tiny_server  # noqa: E402

KILLED = "server killed while saving"
COUNTS = {
    "stopped by the button": 60,
    "stopped in a layer": 40,
    "an error in a layer": 40,
    "out of memory in a layer": 30,
    "NaN in a layer": 20,
    "stopped in a layer while polishing": 20,
    "an error in a layer while polishing": 20,
    "out of memory while polishing": 10,
    "NaN in a layer while polishing": 10,
    "cancelled, next in the queue": 15,
    "unloaded meanwhile": 15,
    "LoRA file written over": 10,
    "LoRA file gone": 5,
    "nowhere to save to": 10,
    KILLED: 5,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--share", type=float, default=1.0, help="of the 310 faults")
    parser.add_argument("--only", choices=COUNTS, help="one kind")
    arguments = parser.parse_args()
    counts = {kind: max(1, round(count * arguments.share)) for kind, count in COUNTS.items()}
    if arguments.only:
        counts = {arguments.only: counts[arguments.only]}
    comfyui = comfy_runtime.find_comfyui()
    if comfyui is None:
        sys.exit("Set COMFYUI_PATH to a ComfyUI folder.")
    with tempfile.TemporaryDirectory() as folder, tiny_server(Path(folder), comfyui) as server:
        trial = Trial(server)
        trial.begin()
        survived = sum(of_kind(trial, kind, count) for kind, count in counts.items())
    print(f"survived {survived} / {sum(counts.values())}")


def of_kind(trial: Trial, kind: str, count: int) -> int:
    started, survived = time.perf_counter(), 0
    for seed in range(count):
        problems = killed(trial) if kind == KILLED else trial.strike(kind, seed)
        survived += not problems
        for problem in problems:
            print(f"  {kind}, seed {seed}: {problem}")
    seconds = (time.perf_counter() - started) / count
    print(f"{kind:<38}{survived:>4} / {count:<4}{seconds:8.1f} s each", flush=True)
    return survived


def killed(trial: Trial) -> list[str]:
    problems = kill_while_saving(trial)
    image, merged = trial.image, trial.merged
    trial.begin()  # a new process has a memory of its own
    if (trial.image, trial.merged) != (image, merged):
        problems.append("the model makes another image after the restart")
    return problems


if __name__ == "__main__":
    main()
