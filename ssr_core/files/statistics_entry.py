"""Entry: what the header of a statistics file tells of one site, believed only once it is checked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..lora.site import Site

LARGEST = 1e120  # activations are float32 at most: no sum of their squares comes near it
MOST = 2**53  # tokens, which are multiplied in float64


@dataclass(frozen=True)
class Entry:
    """The facts about one site that are no tensors."""

    site: Site
    fingerprint: str
    tokens: tuple[int, ...]  # (C,)
    samples: tuple[int, ...]  # (C,)
    levels: tuple[frozenset[float], ...]  # (C,)
    strengths: tuple[float, ...] | None  # (K,) of the correction; None: there is none
    is_folded: bool  # of the correction

    @classmethod
    def parse(cls, facts: Mapping[str, Any], tasks: int, cases: int) -> Entry:
        """Raises ValueError, TypeError or KeyError for what no statistics of so many LoRAs and cases have."""
        module, start, stop, out = facts["site"]
        if not isinstance(module, str):
            raise ValueError(f"{module!r} is not the name of a layer")
        site = Site(module, *(_whole(number) for number in (start, stop, out)))
        if not site.start < site.stop <= site.out_features:
            raise ValueError(f"{site!r} has no rows")
        strengths = tuple(map(_finite, facts["strengths"])) if "strengths" in facts else None
        tokens, samples = (tuple(map(_whole, facts[name])) for name in ("tokens", "samples"))
        levels = tuple(frozenset(map(_finite, seen)) for seen in facts["levels"])
        counted = {len(tokens), len(samples), len(levels)}
        if counted != {cases}:
            raise ValueError(f"{site} has numbers for {counted} cases, not for {cases}")
        if strengths is not None and len(strengths) != tasks:
            raise ValueError(f"{site} has strengths of {len(strengths)} LoRAs, not of {tasks}")
        return cls(site, str(facts["fingerprint"]), tokens, samples, levels, strengths, facts.get("folded") is True)


def check_sums(gram: Tensor, site: object) -> None:
    """Raise ValueError if `gram`, (R, R), cannot be a sum of z z^T, however it may have been rounded."""
    diagonal = gram.diagonal()
    scale = diagonal.clamp_min(0).sqrt()
    # Cauchy-Schwarz; products are made in float32 on some devices, so that small rows come with the noise of large ones
    bound = 1.01 * scale[:, None] * scale + 1e-4 * diagonal.abs().max()
    finite = torch.isfinite(gram).all()  # said by others
    if finite and ((diagonal < 0).any() or (gram.abs() > bound).any() or (gram.abs() > LARGEST).any()):
        raise ValueError(f"{site}: its sums of squares are none")


def _whole(number: object) -> int:
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number <= MOST:
        raise ValueError(f"{str(number)[:30]} is no count")
    return number


def _finite(number: object) -> float:
    if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
        raise ValueError(f"{str(number)[:30]} is no number")
    return float(number)
