# SPDX-License-Identifier: Apache-2.0
"""What fits on which card: memory and passes of a calibration, by model, LoRAs and rank, as `Requirement` tells it.

    COMFYUI_PATH=... python benchmarks/speed/cards.py [--dtype bfloat16]

Parts: in how many groups the layers are refined one after the other, each with passes of its own, so that model,
activations and this fit; "-": not even in GROUPS, so ComfyUI moves some of the model off the card.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping

import torch
from real_models import empty, models, shapes

import machine
from ssr_core import Requirement, Site, Subspace

SIZES = ((2, 16), (4, 32), (8, 32))  # LoRAs, rank of each
MORE = {"Flux": ((16, 32), (8, 128))}
WEIGHTS = {"fp8": 1.0, "4 bits": 0.57}  # bytes a weight
CARDS = {"fp8": (8, 12, 16, 24), "4 bits": (8, 12, 16)}  # GB
ACTIVATIONS = 2.0  # GB, and what ComfyUI keeps free
CONTEXT, GROUPS = 128, 8
GB = 10**9


def main() -> None:
    machine.start_comfyui()
    print("\n".join(table(getattr(torch, arguments().dtype))))


def table(dtype: torch.dtype = torch.bfloat16) -> list[str]:
    """Lines of Markdown."""
    columns = ["model", "LoRAs x rank", "measuring", "refining at once", f"in {GROUPS} parts", "in memory"]
    head = [*columns, *(f"{name}, {card} GB" for name, card in _places())]
    lines = [head, ["---"] * len(head)]
    for model, named in models().items():
        network = named.built()
        layers = shapes(network)
        weights = sum(one.numel() for one in network.parameters())
        lines += [[model, *row(layers, weights, *size, dtype)] for size in (*SIZES, *MORE.get(model, ()))]
    return [f"| {' | '.join(line)} |" for line in lines]


def row(layers: Mapping[str, torch.Size], weights: int, count: int, rank: int, dtype: torch.dtype) -> list[str]:
    """GB on the device and in memory, and parts on each card."""
    spaces = {
        Site.whole(name, shape[0]): Subspace(
            empty(count * rank, *shape[1:], dtype=dtype), empty(shape[0], count * rank, dtype=dtype), (rank,) * count
        )
        for name, shape in layers.items()
    }
    need = {n: Requirement.of(spaces, CONTEXT, n > 0, dtype, groups=max(n, 1), folded=True) for n in range(GROUPS + 1)}
    told = [f"{need[n].device / GB:.1f}" for n in (0, 1, GROUPS)]
    rooms = [card * GB - ACTIVATIONS * GB - WEIGHTS[name] * weights for name, card in _places()]
    parts = [next((n for n in range(1, GROUPS + 1) if need[n].device <= room), "-") for room in rooms]
    return [f"{count} x {rank}", *told, f"{need[1].host / GB:.1f}", *map(str, parts)]


def _places() -> Iterator[tuple[str, int]]:
    return ((name, card) for name, cards in CARDS.items() for card in cards)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dtype", default="bfloat16")
    return parser.parse_args()


if __name__ == "__main__":
    main()
