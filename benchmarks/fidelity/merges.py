# SPDX-License-Identifier: Apache-2.0
"""The ways of merging that are compared, each as dense differences of the model's weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import host
import rivals
import torch
from peft.utils.merge_utils import dare_ties, ties
from testbed import Deltas, Testbed, dense
from torch import Tensor

DENSITY = 0.5  # of TIES and DARE-TIES: the share of values that is kept


def without_calibration(bed: Testbed, names: Sequence[str]) -> dict[str, Deltas]:
    """What needs no run of the model: plain stacks, TIES, DARE-TIES, an SVD of the mean, and three more rivals."""
    rank = bed.rank(names)
    count = len(names)
    styles = [bed.subjects[name].is_style for name in names]
    return {
        "stack 1.0": _combined(bed, names, lambda deltas: deltas.sum(0)),
        "stack 0.7": _combined(bed, names, lambda deltas: 0.7 * deltas.sum(0)),
        "stack 1/K": _combined(bed, names, lambda deltas: deltas.mean(0)),
        "TIES": _combined(bed, names, lambda deltas: ties(list(deltas), torch.ones(count), DENSITY)),
        "DARE-TIES": _combined(bed, names, lambda deltas: _dare(deltas, count)),
        "SVD": _combined(bed, names, lambda deltas: _nearest_of_rank(deltas.mean(0), rank)),
        "KnOTS": _combined(bed, names, lambda deltas: rivals.knots(deltas, DENSITY)),
        "WUDI": _combined(bed, names, rivals.wudi),
        "NP-LoRA": _combined(bed, names, lambda deltas: rivals.null_space(deltas, styles)),
        "ours, no calibration": merged(host.ssr_core.weight_calibration([bed.lora(name) for name in names])),
    }


def calibrated(
    bed: Testbed, names: Sequence[str], steps: int, prompts: int, polish: Sequence[int] = ()
) -> dict[str, Deltas]:
    """RegMean and IterIS, the paper's settings, and ours, all from the same number of points of each LoRA.

    Args:
        polish: for how many steps ours are polished.
    """
    alone = statistics(bed, names, steps, prompts, pairs=0)
    ours = statistics(bed, names, steps, prompts)
    own = statistics(bed, names, steps, prompts, own=4) if bed.combinations(names) else ours
    size = host.ssr_core.MergeSettings(rank=bed.rank(names))
    return {
        **rivals.fitted(bed, names, steps, prompts),
        "paper": merged(without_context(alone), host.ssr_core.MergeSettings.PAPER),
        "ours, no pairs": merged(alone),
        "ours": merged(ours),
        "ours, own lines": merged(own),
        "ours, size of one": merged(ours, size),
        **(polished(bed, names, steps, prompts, ours, size, polish) if polish else {}),
    }


def polished(
    bed: Testbed, names: Sequence[str], steps: int, prompts: int, ours: Any, size: Any, amounts: Sequence[int]
) -> dict[str, Deltas]:
    """The defaults after SSR Polish, at the size of one LoRA, and whole at the middle one of the amounts."""
    middle = sorted(amounts)[len(amounts) // 2]
    starts = {"size of one": (ours, size, amounts), "ours": (ours, None, (middle,))}
    return taught(bed, names, steps, prompts, starts)


def taught(
    bed: Testbed,
    names: Sequence[str],
    steps: int,
    prompts: int,
    starts: Mapping[str, tuple[Any, Any, Sequence[int]]],
    asked: Sequence[Any] = (),
) -> dict[str, Deltas]:
    """Merges after SSR Polish, by "<name>, polished <steps>".

    Args:
        starts: of each name the statistics, the settings of the merge, and for how many steps it is polished.
        asked: combinations, with prompts of their own.
    """
    tasks = [bed.task(name, prompts) for name in names]
    loaded = [bed.loaded(task) for task in tasks]
    ways = [f"{name}, polished {amount}" for name, (_, _, amounts) in starts.items() for amount in amounts]
    merges = [(host.ssr_core.merge(seen, how).updates, amounts) for seen, how, amounts in starts.values()]
    found = host.polish(bed.patcher, tasks, loaded, steps, merges, asked)
    return {way: dense(updates) for way, updates in zip(ways, found, strict=True)}


def statistics(
    bed: Testbed, names: Sequence[str], steps: int, prompts: int, own: int = 0, pairs: int = host.PAIRS
) -> Any:
    """What SSR Collect Stats gathers with its own code and defaults.

    Args:
        own: so many prompts that ask for a character in a style, for all of them, written by a person.
        pairs: where there are none, how many of each pair of LoRAs are made of their own.
    """
    tasks = [bed.task(name, prompts) for name in names]
    loaded = [bed.loaded(task) for task in tasks]
    return host.collect(bed.patcher, tasks, loaded, steps, bed.combinations(names, own) if own else (), pairs)


def merged(calibration: Any, settings: Any = None) -> Deltas:
    return dense(host.ssr_core.merge(calibration, settings).updates)


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
