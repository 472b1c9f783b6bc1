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
CARDS = (8, 12, 16, 24, 32)  # GB
MODELS = {"bfloat16": 23.8, "fp8": 11.9, "4 bits": 6.8}  # GB of Flux's weights
ACTIVATIONS = 2.0  # GB, and what ComfyUI keeps free
CONTEXT, GROUPS = 128, 8
GB = 10**9


def main() -> None:
    dtype = getattr(torch, arguments().dtype)
    cards = [f"{model} on {card}" for model in MODELS for card in CARDS if card > MODELS[model]]
    head = ["LoRAs x rank", "measuring", "refining, 1 part", f"{GROUPS} parts", "in memory", *cards]
    print(*(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head))), sep="\n")
    for count, rank in SIZES:
        print(f"| {' | '.join(row(count, rank, dtype, len(cards)))} |", flush=True)


def row(count: int, rank: int, dtype: torch.dtype, cards: int) -> list[str]:
    """Of the table: GB, and parts by model and card."""
    need = {n: Requirement.of(flux(count, rank), CONTEXT, n > 0, dtype, groups=max(n, 1)) for n in range(GROUPS + 1)}
    told = [f"{need[n].device / GB:.1f}" for n in (0, 1, GROUPS)]
    rooms = [card - size - ACTIVATIONS for size in MODELS.values() for card in CARDS if card > size]
    fitting = [next((n for n in range(1, GROUPS + 1) if need[n].device <= room * GB), None) for room in rooms]
    return [f"{count} x {rank}", *told, f"{need[1].host / GB:.1f}", *(str(n or "-") for n in fitting)]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dtype", default="bfloat16")
    return parser.parse_args()


if __name__ == "__main__":
    main()
