"""Refinement: one task run twice, with its LoRA alone and with the merge, and the corrections that follow."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .correction import Correction
from .errors import StatisticsError
from .layer import Layer, compute_dtype
from .low_rank_update import LowRankUpdate
from .recording import Place, Recording, Signal, Tap
from .site import Site
from .subspace import Subspace

Placed = list[tuple[Site, Tensor, Tensor]]  # down and up of each update, where the layer computes

TOKENS = 256  # of each layer and forward pass that are compared; outputs under the LoRA alone wait in memory


class Refinement(Recording):
    """Hooks with two branches. Run the model on the same input first inside `alone`, then inside `merged`."""

    def __init__(
        self,
        subspaces: Mapping[Site, Subspace],
        updates: Mapping[Site, LowRankUpdate],
        task: int,
        strengths: Sequence[float],
        tokens: int = TOKENS,
    ) -> None:
        super().__init__(subspaces, task, strengths[task], tokens=tokens)
        self._updates, self._strengths = updates, tuple(strengths)
        self._alone = True
        self._targets: dict[Site, Tensor] = {}  # t^T z', (out, R), on the model's device
        # by layer: how many tokens an output has, which of them wait for the merge, and these under the LoRA
        self._waiting: dict[str, deque[tuple[int, Tensor, Tensor]]] = {}

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Inside, the task's LoRA is active and the outputs of the layers are kept."""
        self._alone = True
        yield

    @contextmanager
    def merged(self) -> Iterator[None]:
        """Inside, the merge is active and its inputs are compared with what `alone` kept.

        Raises:
            StatisticsError: a layer ran under the LoRA alone and not under the merge.
        """
        self._alone = False
        try:
            yield
        finally:
            self._alone = True
        if unmatched := [name for name, waiting in self._waiting.items() if waiting]:
            raise StatisticsError(
                f"{len(unmatched)} layers, such as {unmatched[0]}, ran under the LoRA alone but not under the merge, "
                "so they cannot be compared. A node that skips steps (EasyCache, TeaCache) answered for them: connect "
                "the model before it, or collect without refinement."
            )

    def corrections(self) -> Iterator[tuple[Site, Correction]]:
        """What this run adds, for each site that is routed.

        Raises:
            StatisticsError: activations were not finite.
        """
        for site, seen in self.statistics():
            if site not in self._targets:
                continue  # its layer never ran
            space = self._subspaces[site]
            found = self._targets[site].to("cpu", torch.float32)
            targets = tuple(found if task == self.task else torch.zeros(0, 0) for task in range(len(space.ranks)))
            correction = Correction(seen.grams, targets, seen.fingerprint, self._strengths)
            correction.check(space, site)
            yield site, correction

    def _placed(self, tap: Tap, layer: Layer, where: Place) -> tuple[Placed, Placed, list[Tensor]]:
        """The LoRA's own updates, those of the merge, and each signal's `down`."""
        own = [(site, signal.down[rows], up) for signal in tap.signals for site, rows, up in signal.updates]
        merged = [(s, u.down, u.up) for g in tap.signals for s in g.sites if (u := self._updates.get(s)) is not None]
        own, merged = ([(s, layer.place(down, where), up.to(*where)) for s, down, up in u] for u in (own, merged))
        return own, merged, [layer.place(signal.down, where) for signal in tap.signals]

    def _respond(self, tap: Tap, layer: Layer, placed: Any, x: Tensor, output: Tensor) -> Tensor:
        own, merged, downs = placed
        waiting = self._waiting.setdefault(layer.name, deque())
        if self._alone:
            result = layer.plus(x, output, own)
            tokens = layer.outputs(result)
            chosen = self._some(len(tokens), x.device)
            waiting.append((len(tokens), chosen, tokens[chosen]))
            return result
        if not waiting:
            raise StatisticsError(f"{layer.name} ran under the merge more often than under the LoRA alone.")
        count, chosen, alone = waiting.popleft()
        if count != layer.positions(output):
            raise StatisticsError(
                f"{layer.name} saw {count} tokens under the LoRA alone and {layer.positions(output)} under the merge, "
                "so they cannot be compared. Both have to run on the same batch; or collect without refinement."
            )
        dtype = compute_dtype(x)
        missing = alone.to(dtype) - layer.outputs(output)[chosen].to(dtype)
        for signal, down in zip(tap.signals, downs, strict=True):
            if signal.counted:
                self._count(signal, layer.project_some(x.to(dtype), down, chosen), missing)
        return layer.plus(x, output, merged)

    def _count(self, signal: Signal, z: Tensor, missing: Tensor) -> None:
        """z: (tokens, R) under the merge; missing: (tokens, out) what it should write there."""
        signal.sums.update(z)
        for site in signal.sites:
            target = missing[:, site.start : site.stop].mT @ z
            self._targets[site] = self._targets[site] + target if site in self._targets else target

    def _some(self, tokens: int, device: torch.device) -> Tensor:
        """Indices of at most so many tokens, each as likely as any other."""
        chosen = self._choose(tokens, tokens)
        return (torch.arange(tokens) if chosen is None else chosen).to(device)
