# SPDX-License-Identifier: Apache-2.0
"""Rounds of collect, solve, apply and sample in one ComfyUI server: what memory and time a round do over hundreds.

    COMFYUI_PATH=... python benchmarks/trust/soak.py [--rounds 200] [--warm-up 20]

Every round has another seed, so that nothing is taken from ComfyUI's cache. As many rounds of stock nodes alone follow:
what these leave is ComfyUI's own. The slopes are of a straight line through
the rounds after the warm-up (Theil and Sen: the median over pairs of rounds), with the 95 % range of that estimate.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scipy.stats import theilslopes

ROOT = Path(__file__).resolve().parents[2]
sys.path = [str(ROOT), str(ROOT / "tests" / "support"), *sys.path[1:]]

import comfy_runtime  # noqa: E402
from faults import Trial, merge_graph, plain_graph, tiny_server  # noqa: E402


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
        print(f"{arguments.rounds} rounds each, after {arguments.warm_up} to warm up")
        print(f"{'':<34}{'first 10':>10}{'last 10':>10}{'slope a round':>15}{'95 % range':>24}")
        for name, graph in (("merges", merge_graph), ("stock nodes alone", plain_graph)):
            for seed in range(arguments.warm_up):
                one(trial, graph(1_000_000 + seed))
            tell(name, [one(trial, graph(2_000_000 + seed)) for seed in range(arguments.rounds)])
        problems = trial.differences()
    print("after it all: " + ("as in the beginning" if not problems else "; ".join(problems)))


def one(trial: Trial, graph: dict[str, Any]) -> tuple[float, float, float]:
    """Resident MiB, seconds and tensors alive after a round."""
    started = time.perf_counter()
    trial.server.run(graph)
    seconds = time.perf_counter() - started
    state = trial.look()
    trial.server.clear_history()  # of which ComfyUI keeps 10,000 entries, whatever they are of
    return state["resident"] / 2**20, seconds, state["tensors"]


def tell(name: str, rounds: Sequence[tuple[float, ...]]) -> None:
    for what, values in zip(("resident, MiB", "seconds", "tensors alive"), zip(*rounds, strict=True), strict=True):
        slope, _, low, high = theilslopes(values)
        first, last = (sum(part) / len(part) for part in (values[:10], values[-10:]))
        print(f"{name + ': ' + what:<34}{first:>10.3f}{last:>10.3f}{slope:>15.6f}{f'{low:.6f} to {high:.6f}':>24}")


if __name__ == "__main__":
    main()
