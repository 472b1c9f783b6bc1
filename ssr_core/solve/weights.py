"""Weights: how much each case's sums count at a site."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..lora.site import Site
from ..statistics.calibration import Calibration
from ..statistics.case import Case
from .diagnostics import effects, spoken
from .settings import MergeSettings


def task_weights(calibration: Calibration, settings: MergeSettings) -> dict[Site, list[float]]:
    """(C,) for each site: what each case's sums are multiplied with."""
    loras = settings.weights or [1.0] * len(calibration.loras)
    given = torch.tensor(case_weights(calibration.cases, loras, settings.balanced), dtype=torch.float64)
    shares = _effects(calibration) if settings.balanced else {}
    weights = {}
    for site, space in calibration.subspaces.items():
        there = 1 if settings.count_absent else torch.tensor([bool(len(spoken(space, c))) for c in calibration.cases])
        weights[site] = (given * there / shares.get(site.module, 1)).tolist()
    return weights


def case_weights(cases: Sequence[Case], given: Sequence[float], balanced: bool = True) -> list[float]:
    """(C,) from the LoRAs' weights: a combination counts as its LoRAs do on average, silence as all of them.

    Balanced, all combinations together count no more than the LoRAs by themselves: of many LoRAs there are many pairs.
    """
    loras, together = torch.tensor(given, dtype=torch.float64), sum(case.is_combination for case in cases)
    share = min(1.0, len(loras) / max(1, together)) if balanced else 1.0
    means = [float(loras[list(case.speakers)].mean() if case.speakers else loras.mean()) for case in cases]
    return [share * mean if case.is_combination else mean for case, mean in zip(cases, means, strict=True)]


def _effects(calibration: Calibration) -> dict[str, Tensor]:
    """(C,) for each module: the sum over a case's tokens of |up z_S|^2, at strength 1.

    Least squares over all tokens as they are would serve the strongest LoRA and let its cross-talk drown the others: a
    style often writes ten times what a subject does. Divided by their effects, all have the same share in the error.
    Silence has none: a token of it counts as a token of the others does on average, so that what a merge adds to it is
    as bad as the same error where somebody speaks.
    """
    sums: dict[str, Tensor] = {}
    tokens: dict[str, Tensor] = {}
    for site, statistics in calibration.statistics.items():
        found = sums.setdefault(site.module, torch.zeros(len(statistics.tokens), dtype=torch.float64))
        found += torch.tensor(effects(statistics, calibration.subspaces[site], calibration.cases), dtype=torch.float64)
        tokens[site.module] = torch.tensor(statistics.tokens, dtype=torch.float64)
    return {module: _filled(found, tokens[module]) for module, found in sums.items()}


def _filled(effects: Tensor, tokens: Tensor) -> Tensor:
    """Where a case has no effect, what the others have on average on as many tokens."""
    there = (effects > 0) & (tokens > 0)
    mean = (effects[there] / tokens[there]).mean() if there.any() else torch.ones((), dtype=torch.float64)
    return torch.where(there, effects, mean * tokens.clamp_min(1))
