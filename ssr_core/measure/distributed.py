"""Distributed: several processes collect on prompts of their own, and all have the sum of it.

Statistics are sums, so nothing else is exchanged. Every process calls the same functions in the same order, with
`torch.distributed` initialized by its own script (gloo, or nccl with a CUDA device per process). The package does not
import this module by itself, and no node does.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import reduce
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import StatisticsError
from ..statistics.calibration import Calibration
from ..statistics.correction import Correction
from ..statistics.grams import Grams
from ..statistics.sufficient_statistics import SufficientStatistics
from .collector import StatisticsCollector

Value = TypeVar("Value")


def sum_surveys(collector: StatisticsCollector, group: Any = None) -> None:
    """Make the surveys of all processes one, so that all see the same context rows. Call it before `see`.

    Raises:
        StatisticsError: the processes surveyed other layers.
    """
    survey = collector.survey
    modules = sorted(survey.sketches)
    _check_equal((modules, sorted(map(str, collector.subspaces))), "surveyed other layers or LoRAs", group)
    survey.sketches = {module: _summed(survey.sketches[module], group) for module in modules}
    shared = _gathered(survey.shared, group)
    survey.shared = {m: leader for m, leader in shared[0].items() if all(s.get(m) == leader for s in shared)}


def sum_calibrations(calibration: Calibration, group: Any = None) -> Calibration:
    """The sum of the calibrations of all processes, in each of them.

    Raises:
        StatisticsError: the processes collected for other LoRAs, or with other context rows.
    """
    fingerprints = sorted((str(site), space.fingerprint) for site, space in calibration.subspaces.items())
    corrected = sorted((str(site), found.strengths) for site, found in calibration.corrections.items())
    _check_equal(fingerprints, "collected with other LoRAs or context rows (call sum_surveys before see)", group)
    _check_equal(calibration.cases, "ran other combinations, or in another order", group)
    _check_equal(corrected, "refined other layers, or at other strengths", group)
    counts = {site: (seen.tokens, seen.samples, seen.levels) for site, seen in calibration.statistics.items()}
    everyone = _gathered(counts, group)
    statistics = {
        site: _statistics(seen, [counts[site] for counts in everyone], group)
        for site, seen in sorted(calibration.statistics.items(), key=_by_site)
    }
    corrections = {site: _correction(c, group) for site, c in sorted(calibration.corrections.items(), key=_by_site)}
    return Calibration(calibration.loras, calibration.subspaces, statistics, corrections, calibration.cases)


def _statistics(seen: SufficientStatistics, counts: Iterable[Any], group: Any) -> SufficientStatistics:
    tokens, samples, levels = zip(*counts, strict=True)
    return SufficientStatistics(
        _grams(seen.grams, group),
        tuple(map(sum, zip(*tokens, strict=True))),
        seen.fingerprint,
        tuple(map(sum, zip(*samples, strict=True))),
        tuple(reduce(frozenset.union, seen) for seen in zip(*levels, strict=True)),
    )


def _correction(found: Correction, group: Any) -> Correction:
    targets = _each(found.targets, group)
    return replace(found, grams=_grams(found.grams, group), targets=targets)


def _grams(grams: Grams, group: Any) -> Grams:
    return Grams(grams.size, _each(grams.packed, group))


def _each(tensors: tuple[Tensor, ...], group: Any) -> tuple[Tensor, ...]:
    """Of each task's tensor, the sum; processes that did not run a task have an empty one."""
    everyone = _gathered([tensor.shape for tensor in tensors], group)
    shapes = [max(of_task, key=torch.Size.numel) for of_task in zip(*everyone, strict=True)]
    filled = (t if t.numel() else t.new_zeros(shape) for t, shape in zip(tensors, shapes, strict=True))
    return tuple(_summed(tensor, group) if tensor.numel() else tensor for tensor in filled)


def _summed(tensor: Tensor, group: Any) -> Tensor:
    device = torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")
    total = tensor.to(device, copy=True)
    dist.all_reduce(total, group=group)
    return total.to(tensor.device)


def _gathered(value: Value, group: Any) -> list[Value]:
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, value, group=group)
    return everyone


def _check_equal(value: object, what: str, group: Any) -> None:
    everyone = _gathered(value, group)
    if any(other != everyone[0] for other in everyone):
        different = next(rank for rank, other in enumerate(everyone) if other != everyone[0])
        raise StatisticsError(f"Process {different} {what} than process 0, so their statistics do not add up.")


def _by_site(entry: tuple[Any, Any]) -> Any:
    return entry[0]
