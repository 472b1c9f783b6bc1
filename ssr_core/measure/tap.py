"""Tap: what the hook on one module needs, and the signals that sites with one input have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import ModelMismatchError
from ..lora.site import Site
from ..lora.subspace import Subspace
from .accumulator import Accumulator
from .layer import Layer
from .placed import Place, Placed, PlacedUp, sent
from .sketch import Sketch


class Update(NamedTuple):
    """What a speaking LoRA adds at one site."""

    site: Site  # whose rows of the output
    own: slice  # rows of z
    up: Tensor  # (out, r)
    strength: float


@dataclass(eq=False)
class Signal:
    """One joint subspace of a module and the sites that share it, slices of a fused LoRA; the sum of its Gram."""

    space: Subspace
    counted: bool
    sites: list[Site]
    updates: list[Update]  # of the LoRAs that speak
    sums: Accumulator = field(default_factory=Accumulator)


class Joint:
    """The `down` of several signals with the same input, joined so that one product serves them all.

    Context rows that they have in common are there once.
    """

    def __init__(self, signals: Sequence[Signal]) -> None:
        self.signals = tuple(signals)
        self._blocks: list[Tensor] = []
        self._columns: dict[Signal, Tensor] = {}
        self._placed: dict[Place, Placed] = {}
        self.taps = 1  # how many modules share it
        rows = 0
        seen: list[tuple[Tensor, int]] = []  # context rows, and where they begin
        for signal in self.signals:
            space = signal.space
            context = space.down[space.rank :]
            start = next((at for known, at in seen if _equal(known, context)), None)
            joined = space.down if start is None else space.down[: space.rank]
            self._blocks.append(joined)
            own = torch.arange(rows, rows + space.rank)
            rows += len(joined)
            if start is None:
                start = rows - space.context
                seen.append((context, start))
            self._columns[signal] = torch.cat([own, torch.arange(start, start + space.context)])
        self.rank = rows

    def placed(self, layer: Layer, where: Place) -> Placed:
        """All rows, where the layer computes; put there once."""
        if where not in self._placed:
            down = self._blocks[0] if len(self._blocks) == 1 else torch.cat(self._blocks)
            self._placed[where] = layer.place(down, where)
            if len(self.signals) > 1:
                self._columns = {signal: sent(rows, where[0]) for signal, rows in self._columns.items()}
        return self._placed[where]

    def part(self, signal: Signal, z: Tensor) -> Tensor:
        """The signal's own columns of a joint z."""
        return z if len(self.signals) == 1 else z.index_select(1, self._columns[signal])


@dataclass(eq=False)
class Tap:
    """What the hook on one module needs."""

    module: str
    signals: list[Signal]
    number: int
    sketch: Sketch | None = None
    shared: Joint | None = None  # with other modules that have the same input
    calls: int = 0

    def __post_init__(self) -> None:
        self._own: Joint | None = None
        self._rows: dict[Place, Placed] = {}
        self._ups: dict[Place, list[PlacedUp]] = {}

    @property
    def own(self) -> Joint:
        """Of this module's signals."""
        self._own = self._own or Joint(self.signals)
        return self._own

    @property
    def counted(self) -> bool:
        return any(signal.counted for signal in self.signals)

    @property
    def updates(self) -> list[Update]:
        """Of all signals, those of the LoRAs that speak."""
        return [update for signal in self.signals for update in signal.updates]

    def ups(self, where: Place) -> list[PlacedUp]:
        """The `up` of each of the updates, where the layer computes."""
        if where not in self._ups:
            self._ups[where] = [PlacedUp.of(update.up, where, update.strength) for update in self.updates]
        return self._ups[where]

    def rows(self, layer: Layer, where: Place) -> Placed:
        """The speaking LoRAs' own rows of `down`, of one update after the other, where the layer computes."""
        if where not in self._rows:
            rows = [signal.space.down[update.own] for signal in self.signals for update in signal.updates]
            self._rows[where] = layer.place(rows[0] if len(rows) == 1 else torch.cat(rows), where)
        return self._rows[where]

    def check(self, layer: Layer) -> None:
        """Raise ModelMismatchError unless the layer has the size that the LoRAs write to."""
        out, *inputs = layer.weight_shape
        for signal in self.signals:
            in_numel, shape = signal.space.down[0].numel(), layer.weight_shape
            if signal.sites[0].out_features != out or in_numel != torch.Size(inputs).numel():
                raise ModelMismatchError(
                    f"A LoRA writes to {layer.name} with {in_numel} inputs and {signal.sites[0].out_features} outputs, "
                    f"but this model's layer has the shape {shape}. It was trained for another model."
                )

    def release(self) -> None:
        """Forget what was put where the model computes."""
        self.__post_init__()
        self.shared = None


def taps_of(
    subspaces: Mapping[Site, Subspace],
    speakers: Mapping[int, float],
    survey: int = 0,
    shared: Mapping[str, str] | None = None,
) -> list[Tap]:
    """The taps of one run.

    Args:
        speakers: the LoRAs that are active, by number, and their strengths.
        survey: context rows to look for; 0 = measure.
        shared: which modules have the same input as another one, which is called before them.
    """
    taps: dict[str, Tap] = {}
    grouped: dict[tuple[str, str], Signal] = {}
    tests: dict[object, Tensor] = {}
    for site, space in subspaces.items():
        if not (space.is_routed or any(space.ranks[task] for task in speakers)):
            continue  # neither to be measured nor active now
        tap = taps.setdefault(site.module, Tap(site.module, [], len(taps)))
        key = (site.module, space.fingerprint)
        if key not in grouped:
            grouped[key] = Signal(space, space.is_routed and not survey, [], [])
            tap.signals.append(grouped[key])
        grouped[key].sites.append(site)
        if survey and space.is_routed:
            tap.sketch = tap.sketch or Sketch(min(survey, space.down.shape[1]), tests)
        for task, strength in speakers.items():
            if space.ranks[task] and strength:
                own = space.blocks[task]
                grouped[key].updates.append(Update(site, own, space.up[:, own], strength))
    _share(taps, shared or {})
    return list(taps.values())


def _share(taps: Mapping[str, Tap], shared: Mapping[str, str]) -> None:
    """Give the taps of modules with the same input one Joint."""
    groups: dict[str, list[Tap]] = {}
    for module, tap in taps.items():
        groups.setdefault(shared.get(module, module), []).append(tap)
    for group in groups.values():
        if len(group) > 1 and all(tap.counted for tap in group):
            joint = Joint([signal for tap in group for signal in tap.signals])
            joint.taps = len(group)
            for tap in group:
                tap.shared = joint


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other)
