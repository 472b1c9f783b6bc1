# SPDX-License-Identifier: Apache-2.0
"""What fits on which card: memory and parts of a calibration for Flux, by LoRAs and rank, as `Requirement` tells it.

    python benchmarks/speed/cards.py [--dtype bfloat16]

Parts: in how many groups the layers are refined one after the other, each with passes of its own, so that model,
activations and this fit; "-": not even in GROUPS, so ComfyUI moves some of the model off the card.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[2] / "tests" / "support")]

import torch  # noqa: E402

from flux_sizes import flux  # noqa: E402
from ssr_core import Requirement  # noqa: E402

SIZES = ((2, 16), (4, 32), (8, 32), (16, 32), (8, 128))  # LoRAs, rank of each
WEIGHTS = {"bfloat16": 23.8, "fp8": 11.9, "4 bits": 6.8}  # GB, of Flux
CARDS = (("bfloat16", 32), ("fp8", 16), ("fp8", 24), ("4 bits", 12), ("4 bits", 16))  # GB
ACTIVATIONS = 2.0  # GB, and what ComfyUI keeps free
CONTEXT, GROUPS = 128, 8
GB = 10**9


def main() -> None:
    print("\n".join(table(getattr(torch, arguments().dtype))))


def table(dtype: torch.dtype = torch.bfloat16) -> list[str]:
    """Lines of Markdown."""
    columns = ["measuring", "refining at once", f"in {GROUPS} parts", "in memory"]
    head = ["LoRAs x rank", *columns, *(f"{weights}, {card} GB" for weights, card in CARDS)]
    lines = [head, ["---"] * len(head), *(row(count, rank, dtype) for count, rank in SIZES)]
    return [f"| {' | '.join(line)} |" for line in lines]


def row(count: int, rank: int, dtype: torch.dtype) -> list[str]:
    """GB on the device and in memory, and parts on each card."""
    spaces = flux(count, rank)
    need = {n: Requirement.of(spaces, CONTEXT, n > 0, dtype, groups=max(n, 1), folded=True) for n in range(GROUPS + 1)}
    told = [f"{need[n].device / GB:.1f}" for n in (0, 1, GROUPS)]
    rooms = [(card - WEIGHTS[weights] - ACTIVATIONS) * GB for weights, card in CARDS]
    parts = [next((n for n in range(1, GROUPS + 1) if need[n].device <= room), "-") for room in rooms]
    return [f"{count} x {rank}", *told, f"{need[1].host / GB:.1f}", *map(str, parts)]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dtype", default="bfloat16")
    return parser.parse_args()


if __name__ == "__main__":
    main()
