"""Distillation of a merge: what least squares leaves, layer by layer, a few gradient steps take off all layers at once.

The LoRAs are their merge's teachers: at points of their calibration, what the model answers with the LoRAs that a case
asks for is what it should answer with the merge. No images are needed, and the model's weights stay as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..errors import SolveError
from ..lora.low_rank_update import LowRankUpdate
from ..lora.site import Site
from ..parallel import each
from ..statistics.case import Case, singles
from .branch import Branch
from .factors import Learning
from .frozen import frozen
from .judge import Evaluation, Judge, distance
from .muon import Muon
from .overwriting import Overwriting
from .point import Point

DIVERGED = 2.0  # times the error it began with
SLOWER = 0.5  # of the learning rate, for what is left of the steps, where it diverged
RETURNS = 3  # to the best step so far, before it gives up
WARM_UP = 0.1  # of the steps: before momentum has the mean of some gradients, it steps too far
HALF_SCALE = 2.0**12  # of a loss in float16, at first


@dataclass(frozen=True)
class DistillationSettings:
    """How a merge is distilled."""

    steps: int = 100
    batch: int = 8  # points a step, one after the other
    learning_rate: float = 0.014  # of each factor's root mean square, a step, at first; it falls to 0
    evaluations: int = 8  # how often the held-out points are looked at
    seed: int = 0  # of the order of the points
    only_up: bool = False  # `down` stays as it is: half of what learns, and of its memory

    @property
    def points(self) -> int:
        """How many are learnt from over all steps, those that come again, too."""
        return self.steps * self.batch

    def __post_init__(self) -> None:
        if min(self.steps, self.batch, self.evaluations) < 1 or not 0 < self.learning_rate < math.inf:
            raise SolveError(f"{self} cannot be meant: all but seed have to be above 0.")


@dataclass(frozen=True, eq=False)
class Distilled:
    """A merge after distillation, as it was where its error on the held-out points was the smallest."""

    updates: Mapping[Site, LowRankUpdate]
    history: tuple[Evaluation, ...]  # the first is of the merge that it began at
    stopped: str = ""  # why, if before the last step
    returns: int = 0  # how often the error rose, and it went on from the best step with a lower learning rate

    @property
    def start(self) -> Evaluation:
        return self.history[0]

    @property
    def best(self) -> Evaluation:
        return min(self.history, key=lambda one: one.error)


def distil(
    model: nn.Module,
    network: nn.Module,
    updates: Mapping[Site, LowRankUpdate],
    points: Sequence[Point],
    held_out: Sequence[Point],
    device: torch.device,
    cases: Sequence[Case] = (),
    settings: DistillationSettings | None = None,
    on_point: Callable[[int, int], None] = lambda done, total: None,
    on_evaluation: Callable[[Evaluation], None] = lambda evaluation: None,
) -> Distilled:
    """Distil the LoRAs of all cases into `updates`.

    Args:
        model: whose layers the sites name; none of its LoRAs may be active on it.
        network: the part of it whose calls the points are.
        held_out: points that are not learnt from: they decide which step is kept.
        device: where the model computes.
        cases: (C,) who speaks in each; given empty, each LoRA by itself.
        on_point: called after each point with how many are done. What it raises ends everything, and the model is as
            it was.

    Raises:
        SolveError: too few points, a model that passes no gradient, or errors that are not finite from the beginning.
    """
    if not points or not held_out:
        raise SolveError("There are too few points to distil at: some to learn from and some to judge by are needed.")
    if not all(update.is_finite() for update in updates.values()):
        raise SolveError("The merge holds values that are not finite, so there is nothing to begin at.")
    settings = settings or DistillationSettings()
    with torch.inference_mode(False), torch.enable_grad(), frozen(model):
        judge = Judge(network, held_out, device, cases or singles(1 + max(point.case for point in held_out)))
        student = _Student(updates, network, device, settings, judge.shares(points))
        with student.attached(model):
            return _learn(student, judge, points, settings, on_point, on_evaluation)


def _learn(
    student: _Student,
    judge: Judge,
    points: Sequence[Point],
    settings: DistillationSettings,
    on_point: Callable[[int, int], None],
    on_evaluation: Callable[[Evaluation], None],
) -> Distilled:
    history, best, returns = [judge.evaluate(0)], student.updates(), 0
    on_evaluation(history[0])
    if not math.isfinite(history[0].error):
        raise SolveError("The model's answers with this merge are not finite, so there is nothing to begin at.")
    batches, every = _batches(points, settings), max(1, settings.steps // settings.evaluations)
    for step in range(1, settings.steps + 1):
        for number, point in enumerate(next(batches), 1):
            student.see(point)
            on_point((step - 1) * settings.batch + number, settings.points)
        student.step()
        if step % every and step != settings.steps:
            continue
        history.append(judge.evaluate(step))
        on_evaluation(history[-1])
        error = history[-1].error
        if error <= min(one.error for one in history):
            best = student.updates()
        if error < DIVERGED * history[0].error:
            continue
        if returns == RETURNS:
            return Distilled(best, tuple(history), f"the error rose to {error:.2f} at step {step}", returns)
        student.return_to(best)
        returns += 1
    return Distilled(best, tuple(history), returns=returns)


class _Student:
    """The merge's factors, how they take part in the model, and how they learn."""

    def __init__(
        self,
        updates: Mapping[Site, LowRankUpdate],
        network: nn.Module,
        device: torch.device,
        settings: DistillationSettings,
        shares: Sequence[float],
    ) -> None:
        learning = each(lambda update: Learning(update, device, settings.only_up), list(updates.values()))
        self._factors = dict(zip(updates, learning, strict=True))
        self.attached = Branch(self._factors).attached
        self._network, self._device = network, device
        self._shares = [share / settings.batch for share in shares]
        self._learning = [one for factors in self._factors.values() for one in factors.parameters()]
        self._optimizer = Muon(self._learning, settings.learning_rate)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self._optimizer, lambda step: _rising(step, settings.steps) * _falling(step, settings.steps)
        )
        self._scaler: torch.amp.GradScaler | None = None

    def see(self, point: Point) -> None:
        """Add the gradient of one point."""
        if self._scaler is None:
            half = any(target.dtype == torch.float16 for target in point.target)
            self._scaler = torch.amp.GradScaler(self._device.type, init_scale=HALF_SCALE, enabled=half)
        with Overwriting():
            loss = distance(point, self._network, self._device) * self._shares[point.case]
            if not loss.requires_grad:
                raise SolveError("The model passes no gradient to its layers, so nothing can be distilled on it.")
            self._scaler.scale(loss).backward()

    def step(self) -> None:
        assert self._scaler is not None
        self._scaler.unscale_(self._optimizer)
        torch.nn.utils.clip_grad_norm_(self._learning, 1.0)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad()
        self._schedule.step()

    def return_to(self, updates: Mapping[Site, LowRankUpdate]) -> None:
        """To what updates() gave before, and on from there with a lower learning rate."""
        for site, factors in self._factors.items():
            factors.return_to(updates[site])
        self._optimizer.state.clear()
        self._schedule.base_lrs = [SLOWER * rate for rate in self._schedule.base_lrs]

    def updates(self) -> dict[Site, LowRankUpdate]:
        return {site: factors.update() for site, factors in self._factors.items()}


def _rising(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / (WARM_UP * steps + 1))


def _falling(step: int, steps: int) -> float:
    return 0.5 * (1 + math.cos(math.pi * step / steps))


def _batches(points: Sequence[Point], settings: DistillationSettings) -> Iterator[list[Point]]:
    """Without end; each point once before any comes again."""
    generator = torch.Generator().manual_seed(settings.seed)
    waiting: list[Point] = []
    while True:
        while len(waiting) < settings.batch:
            waiting += [points[index] for index in torch.randperm(len(points), generator=generator).tolist()]
        yield waiting[: settings.batch]
        del waiting[: settings.batch]
