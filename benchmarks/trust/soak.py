# SPDX-License-Identifier: Apache-2.0
"""Rounds of collect, solve, apply and sample in one ComfyUI server: what memory and time a round do over hundreds.

    COMFYUI_PATH=... python benchmarks/trust/soak.py [--rounds 200] [--warm-up 20]

Every round has another seed, so that nothing is taken from ComfyUI's cache. The slopes are of a straight line through
the rounds after the warm-up (Theil and Sen: the median over pairs of rounds), with the 95 % range of that estimate.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from scipy.stats import theilslopes

ROOT = Path(__file__).resolve().parents[2]
sys.path = [str(ROOT), str(ROOT / "tests" / "support"), *sys.path[1:]]

import comfy_runtime  # noqa: E402
from faults import Trial, merge_graph, tiny_server  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--warm-up", type=int, default=20)
    arguments = parser.parse_args()
    comfyui = comfy_runtime.find_comfyui()
    if comfyui is None:
        sys.exit("Set COMFYUI_PATH to a ComfyUI folder.")
    with tempfile.TemporaryDirectory() as folder, tiny_server(Path(folder), comfyui) as server:
        trial = Trial(server)
        trial.begin()
        for seed in range(arguments.warm_up):
            trial.server.run(merge_graph(1000 + seed))
        rounds = [one(trial, seed) for seed in range(arguments.rounds)]
        problems = trial.differences()
    print(f"{arguments.rounds} rounds after {arguments.warm_up} to warm up")
    print(f"{'':<24}{'first 10':>12}{'last 10':>12}{'slope a round':>18}{'95 % range':>26}")
    for name, values in zip(
        ("resident, MiB", "seconds a round", "tensors alive"), zip(*rounds, strict=True), strict=True
    ):
        slope, _, low, high = theilslopes(values)
        first, last = (sum(part) / len(part) for part in (values[:10], values[-10:]))
        print(f"{name:<24}{first:>12.3f}{last:>12.3f}{slope:>18.6f}{f'{low:.6f} to {high:.6f}':>26}")
    print("after it all: " + ("as in the beginning" if not problems else "; ".join(problems)))


def one(trial: Trial, seed: int) -> tuple[float, float, float]:
    started = time.perf_counter()
    trial.server.run(merge_graph(2000 + seed))
    seconds = time.perf_counter() - started
    state = trial.look()
    trial.server.clear_history()  # of which ComfyUI keeps 10,000 entries, whatever they are of
    return state["resident"] / 2**20, seconds, state["tensors"]


if __name__ == "__main__":
    main()
