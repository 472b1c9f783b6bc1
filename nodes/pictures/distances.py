"""Distances: how far each latent of a comparison is from what its prompt asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, cat

from .rendering import Scene
from .sheet import Place

SAID = (
    "Distance of the finished latent from that with the LoRAs that a prompt asks for, loaded one after the other. "
    "0 = the same, 1 = as far as the base model."
)


def distances(latents: Mapping[Place, Tensor], wanted: Mapping[int, Tensor]) -> dict[Place, float]:
    """|z - z_wanted|^2 / |z_base - z_wanted|^2 of every picture whose row it is known for; column 0 is the base.

    Args:
        wanted: by row.
    """
    found = {}
    for (row, column), latent in latents.items():
        if row in wanted and (whole := _squared(latents[row, 0], wanted[row])) > 0:
            found[row, column] = _squared(latent, wanted[row]) / whole
    return found


def table(found: Mapping[Place, float], scenes: Sequence[Scene], columns: Sequence[str]) -> str:
    """The distances as a text, with their means; empty if there are none."""
    if not found:
        return ""
    known = [row for row in range(len(scenes)) if (row, 0) in found]
    kinds = {
        "mean, one at a time": [row for row in known if len(scenes[row].speakers or ()) == 1],
        "mean, several at once": [row for row in known if len(scenes[row].speakers or ()) > 1],
    }
    lines = [(_short(scenes[row].label), [found[row, column] for column in range(len(columns))]) for row in known]
    lines += [
        (kind, [sum(found[row, column] for row in rows) / len(rows) for column in range(len(columns))])
        for kind, rows in kinds.items()
        if len(rows) > 1
    ]
    width, wide = max(len(label) for label, _ in lines), [max(6, len(name)) for name in columns]
    head = " " * width + "".join(f"  {name:>{size}}" for name, size in zip(columns, wide, strict=True))
    body = [
        f"{label:<{width}}" + "".join(f"  {value:>{size}.3f}" for value, size in zip(values, wide, strict=True))
        for label, values in lines
    ]
    return "\n".join([SAID, head, *body])


def _squared(one: Any, other: Any) -> float:
    return float((_flat(one) - _flat(other)).square().sum())


def _flat(latent: Any) -> Tensor:
    """Of audio and video together, too, which are a latent of several tensors."""
    return cat([part.float().flatten().cpu() for part in getattr(latent, "tensors", [latent])])


def _short(text: str, most: int = 48) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"
