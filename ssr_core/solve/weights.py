"""Weights: how much each case's sums count at a site."""

from __future__ import annotations

import torch
from torch import Tensor

from ..lora.site import Site
from ..statistics.calibration import Calibration
from .diagnostics import effects, spoken
from .settings import MergeSettings


def task_weights(calibration: Calibration, settings: MergeSettings) -> dict[Site, list[float]]:
    """(C,) for each site: what each case's sums are multiplied with."""
    given = _given(calibration, settings)
    shares = _effects(calibration) if settings.balanced else {}
    weights = {}
    for site, space in calibration.subspaces.items():
        there = 1 if settings.count_absent else torch.tensor([bool(len(spoken(space, c))) for c in calibration.cases])
        weights[site] = (given * there / shares.get(site.module, 1)).tolist()
    return weights


def _given(calibration: Calibration, settings: MergeSettings) -> Tensor:
    """(C,) a combination counts as its LoRAs do on average, silence as all of them.

    Balanced, all combinations together count no more than the LoRAs by themselves: of many LoRAs there are many pairs.
    """
    given = torch.tensor(settings.weights or [1.0] * len(calibration.loras), dtype=torch.float64)
    found = [given[list(case.speakers)].mean() if case.speakers else given.mean() for case in calibration.cases]
    together = torch.tensor([case.is_combination for case in calibration.cases])
    share = min(1.0, len(given) / max(1, int(together.sum()))) if settings.balanced else 1.0
    return torch.where(together, share * torch.stack(found), torch.stack(found))


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
