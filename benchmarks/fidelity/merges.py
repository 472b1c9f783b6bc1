# SPDX-License-Identifier: Apache-2.0
"""The ways of merging that are compared, each as dense differences of the model's weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import host
import torch
from peft.utils.merge_utils import dare_ties, ties
from testbed import Deltas, Testbed, dense
from torch import Tensor

DENSITY = 0.5  # of TIES and DARE-TIES: the share of values that is kept


def without_calibration(bed: Testbed, names: Sequence[str]) -> dict[str, Deltas]:
    """What needs no run of the model: plain stacks, TIES, DARE-TIES and an SVD of the mean."""
    rank = bed.rank(names)
    count = len(names)
    return {
        "stack 1.0": _combined(bed, names, lambda deltas: deltas.sum(0)),
        "stack 0.7": _combined(bed, names, lambda deltas: 0.7 * deltas.sum(0)),
        "stack 1/K": _combined(bed, names, lambda deltas: deltas.mean(0)),
        "TIES": _combined(bed, names, lambda deltas: ties(list(deltas), torch.ones(count), DENSITY)),
        "DARE-TIES": _combined(bed, names, lambda deltas: _dare(deltas, count)),
        "SVD": _combined(bed, names, lambda deltas: _nearest_of_rank(deltas.mean(0), rank)),
    }


def calibrated(bed: Testbed, names: Sequence[str], steps: int, prompts: int) -> Any:
    """The statistics that SSR Collect Stats gathers with its own code and defaults."""
    tasks = [bed.task(name, prompts) for name in names]
    loaded = [bed.loaded(task) for task in tasks]
    return host.collect(bed.patcher, tasks, loaded, steps)


def routed(calibration: Any, names: Sequence[str], bed: Testbed) -> dict[str, Deltas]:
    """The paper's settings, and ours at full rank and at the size of the largest LoRA, from the same points."""
    core = host.ssr_core
    rank = bed.rank(names)
    paper = core.merge(without_context(calibration), core.MergeSettings.PAPER)
    ours, small = (core.merge(calibration, core.MergeSettings(rank=r)) for r in (0, rank))
    return {
        "paper": dense(paper.updates),
        "ours": dense(ours.updates),
        "ours, size of one": dense(small.updates),
    }


def without_context(calibration: Any) -> Any:
    """What would have been measured without context rows: the paper knows none."""
    core = host.ssr_core
    spaces = {
        site: core.Subspace(space.down[: space.rank], space.up, space.ranks)
        for site, space in calibration.subspaces.items()
    }
    statistics = {
        site: core.SufficientStatistics(
            seen.gram[:, : spaces[site].rank, : spaces[site].rank],
            seen.tokens,
            spaces[site].fingerprint,
            seen.samples,
            seen.levels,
        )
        for site, seen in calibration.statistics.items()
    }
    return core.Calibration(calibration.loras, spaces, statistics)


def _combined(bed: Testbed, names: Sequence[str], combine: Callable[[Tensor], Tensor]) -> Deltas:
    """`combine` of the LoRAs' differences (K, out, in), layer by layer; zero where a LoRA has none."""
    every = [bed.alone(name) for name in names]
    shapes = {module: delta for deltas in every for module, delta in deltas.items()}
    return {
        module: combine(torch.stack([deltas.get(module, torch.zeros_like(shape)) for deltas in every]))
        for module, shape in shapes.items()
    }


def _dare(deltas: Tensor, count: int) -> Tensor:
    torch.manual_seed(0)  # it drops values at random
    return dare_ties(list(deltas), torch.ones(count), DENSITY)


def _nearest_of_rank(matrix: Tensor, rank: int) -> Tensor:
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return (left[:, :rank] * values[:rank]) @ right[:rank]
