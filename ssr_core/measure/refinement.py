"""Refinement: one case run twice, with its LoRAs alone and with the merge, and the corrections that follow."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from ..lora.low_rank_update import LowRankUpdate
from ..lora.site import Site
from ..lora.subspace import Subspace
from ..statistics.correction import NOT_RUN, Correction
from .accumulator import zeros
from .layer import Layer, add_product
from .placed import Place, Placed, PlacedUp
from .recording import Recording
from .tap import Tap

Merged = list[tuple[Site, Placed, PlacedUp]]  # down and up of each update, where the layer computes

FEW = 16  # tokens of a layer that may see the same under any LoRA
# what a merge is rounded to for half of the memory; the smallest values of one would vanish in float16
ROUNDED = torch.bfloat16
TOKENS = 128  # of each layer and forward pass that are compared; outputs under the LoRA alone wait in memory


@dataclass(frozen=True, eq=False)
class Alone:
    """What one call of a layer left under the LoRA alone, to be compared with the same call under the merge."""

    count: int  # tokens of its output
    chosen: Tensor | None = None  # which of them are compared; None = all
    tokens: Tensor | None = None  # these, (tokens, out); None = no comparison
    x: Tensor | None = None  # its input, in order to see whether the merge changes that at all


class Uncompared(Enum):
    """Why a layer is measured and not refined."""

    TOKENS = "saw other tokens under the merge than under the LoRA alone, as where each chooses its expert"
    CALLS = "did not run as often under the merge as under the LoRA alone, as where a node skips steps"


class Refinement(Recording):
    """Hooks with two branches. Run the model on the same input first inside `alone`, then inside `merged`.

    What runs in neither (text embeddings, before the first step) has the LoRA alone active, see `outside`; what runs in
    the two branches in different ways is in `uncompared`. Neither is compared, nor gets a correction.
    """

    def __init__(
        self,
        subspaces: Mapping[Site, Subspace],
        updates: Mapping[Site, LowRankUpdate],
        case: int,
        speakers: Sequence[int],
        strengths: Sequence[float],
        tokens: int = TOKENS,
        modules: frozenset[str] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """`modules` that are compared, as the LoRAs call them; the others only run in both branches. None = all.

        `dtype`: what targets are kept in.
        """
        super().__init__(subspaces, case, {task: strengths[task] for task in speakers}, tokens=tokens)
        self._updates, self._strengths = updates, tuple(strengths)
        self.uncompared: dict[str, Uncompared] = {}  # by module
        self.outside: set[str] = set()  # modules that ran in neither branch
        self._compared, self._kept_in = modules, dtype
        self._branch: bool | None = None  # whether the LoRA is alone; None outside of both branches
        self._targets: dict[Site, Tensor] = {}  # t^T z', (out, R), on the model's device
        self._placed: dict[tuple[str, Place], Merged] = {}
        self._waiting: dict[str, deque[Alone]] = {}  # by layer
        # Modulation layers see the same vector under any LoRA that leaves the time embedding alone: there is nothing
        # to make up for, and their outputs are a third of all that would be kept.
        self._unmoved: set[Tap] = set()
        self._moved: set[Tap] = set()  # layers of few tokens that see another one

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Inside, the case's LoRAs are active and the outputs of the layers are kept."""
        with self._in_branch(True):
            yield

    @contextmanager
    def merged(self) -> Iterator[None]:
        """Inside, the merge is active and its inputs are compared with what `alone` kept."""
        with self._in_branch(False):
            yield
        for module, waiting in self._waiting.items():
            if waiting:
                self._give_up(module, Uncompared.CALLS)
                waiting.clear()

    @contextmanager
    def _in_branch(self, alone: bool) -> Iterator[None]:
        self._branch = alone
        try:
            yield
        finally:
            self._branch = None

    def _give_up(self, module: str, why: Uncompared) -> None:
        """Compare nothing of a module, neither before nor after: a part of its tokens would stand for all.

        Nor of those of its name but for numbers: another expert may have got as many tokens, and not the same.
        """
        if module not in self.uncompared:
            alike = (tap.module for tap in self._taps if _numberless(tap.module) == _numberless(module))
            self.uncompared.update(dict.fromkeys(alike, why))

    def close(self) -> None:
        super().close()
        self._placed.clear()
        self._waiting.clear()

    def clear(self) -> None:
        super().clear()
        self._targets.clear()

    def corrections(self) -> Iterator[tuple[Site, Correction]]:
        """What this run adds, for each site that is routed.

        Raises:
            StatisticsError: activations were not finite.
        """
        for site, seen in self.statistics():
            if site not in self._targets or site.module in self.uncompared:
                continue  # its layer never ran, or not in the same way
            space = self._subspaces[site]
            found = self._targets[site].to(self._kept_in).cpu()
            targets = tuple(found if case == self.case else NOT_RUN for case in range(len(seen.tokens)))
            correction = Correction(seen.grams, targets, seen.fingerprint, self._strengths)
            correction.check(space, site)
            yield site, correction

    def _respond(self, tap: Tap, layer: Layer, where: Place, x: Tensor, output: Tensor) -> Tensor:
        waiting = self._waiting.setdefault(tap.module, deque())
        if self._branch is not False:
            result = layer.writable(x, output)
            self._add(tap, layer, where, x, result, tap.ups(where))
            if self._branch:
                waiting.append(self._kept(tap, layer, x, result))
            else:
                self.outside.add(tap.module)
            return result
        self._look(tap, layer, where, x, output, waiting.popleft() if waiting else None)
        result = layer.writable(x, output)
        for site, placed, up in self._merged(tap, layer, where):
            for piece, written in layer.pieces(x, result, placed.rank, where[1]):
                add_product(written[..., site.start : site.stop], layer.project(piece, placed, wide=False), up)
        return result

    def _look(self, tap: Tap, layer: Layer, where: Place, x: Tensor, output: Tensor, alone: Alone | None) -> None:
        """Compare a call with the same one under the LoRA alone, if that is what `alone` is."""
        if alone is None:
            self._give_up(tap.module, Uncompared.CALLS)
        elif alone.count != layer.positions(output):
            self._give_up(tap.module, Uncompared.TOKENS)
        elif alone.x is not None and self._is_unmoved(tap, alone.x, x):
            return
        elif alone.tokens is not None and tap.module not in self.uncompared:
            self._compare(tap, layer, where, x, output, alone.chosen, alone.tokens)

    def _is_unmoved(self, tap: Tap, alone: Tensor, merged: Tensor) -> bool:
        """Whether a layer sees the same in both branches; looked at once, as it waits for the device."""
        (self._unmoved if torch.equal(alone, merged) else self._moved).add(tap)
        return tap in self._unmoved

    def _kept(self, tap: Tap, layer: Layer, x: Tensor, result: Tensor) -> Alone:
        """What has to wait for the merge."""
        count = layer.positions(result)
        if not tap.counted or tap in self._unmoved or tap.module in self.uncompared:
            return Alone(count)
        chosen = self._choice.of(count, x.device, tap.calls + tap.number)  # in any group, so that all draw the same
        if self._compared is not None and tap.module not in self._compared:
            return Alone(count)
        tokens = layer.outputs(result)
        kept = tokens.clone() if chosen is None else tokens.index_select(0, chosen)
        return Alone(count, chosen, kept, x if count <= FEW and tap not in self._moved else None)

    def _compare(
        self, tap: Tap, layer: Layer, where: Place, x: Tensor, output: Tensor, chosen: Tensor | None, alone: Tensor
    ) -> None:
        """Add what the merge sees at the chosen tokens, and what it should write there to come to `alone`."""
        wide = torch.promote_types(where[1], torch.float32)
        tokens, down = layer.outputs(output), tap.own.placed(layer, where)
        missing = alone.to(wide) - (tokens if chosen is None else tokens.index_select(0, chosen)).to(wide)
        all_tokens = torch.arange(len(tokens), device=x.device) if chosen is None else chosen
        z = layer.project_some(x, down, all_tokens, where[1])
        for signal in (signal for signal in tap.signals if signal.counted):
            part = tap.own.part(signal, z)
            signal.sums.update(part)
            for site in signal.sites:
                target = self._targets.get(site)
                if target is None:
                    shape = (site.stop - site.start, part.shape[1])
                    target = self._targets[site] = zeros(*shape, device=x.device, dtype=wide)
                target.addmm_(missing[:, site.start : site.stop].mT, part)

    def _merged(self, tap: Tap, layer: Layer, where: Place) -> Merged:
        """The merge's own updates of this module, where the layer computes."""
        known = self._placed.get((tap.module, where))
        if known is None:
            sites = (site for signal in tap.signals for site in signal.sites)
            updates = ((site, self._updates[site]) for site in sites if site in self._updates)
            known = [
                (site, layer.place(_rounded(update.down, where), where), PlacedUp.of(update.up, where))
                for site, update in updates
            ]
            self._placed[tap.module, where] = known
        return known


def _rounded(down: Tensor, where: Place) -> Tensor:
    """Of a merge, in models of ROUNDED: what that takes from it, the corrections make up for."""
    return down.to(ROUNDED) if where[1] == ROUNDED else down


def _numberless(module: str) -> str:
    return re.sub(r"\d+", "*", module)
