"""Recording: one run of one case on a model, the hooks that listen and the sums behind them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..lora.site import Site
from ..lora.subspace import Subspace
from ..statistics.sufficient_statistics import SufficientStatistics
from .accumulator import Accumulator
from .finding import find_layers
from .layer import Layer, add_product, compute_dtype, fits
from .placed import Place, PlacedUp
from .tap import Joint, Tap, taps_of
from .token_choice import Choice

SURVEYED = 1024  # tokens of each layer and forward pass that a survey looks at


@dataclass(eq=False)
class Heard:
    """What was projected last, for the modules that get the same input next."""

    x: Tensor
    joint: Joint
    z: Tensor  # (tokens, joint.rank), of those that are counted
    whole: bool  # whether these are all
    waiting: int  # how many modules will ask for it yet


class Recording:
    """One run of one case: the hooks on the model and the sums behind them."""

    def __init__(
        self,
        subspaces: Mapping[Site, Subspace],
        case: int,
        speakers: Mapping[int, float],
        survey: int = 0,
        tokens: int = 0,
        shared: Mapping[str, str] | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        """`tokens` of each layer and forward pass are counted at most, chosen at random; 0 = all.

        Args:
            case: the number that its sums have among those of all cases.
            speakers: the LoRAs that are active, by number, and their strengths.
            shared: which modules have the same input as another one, as `followers` of a survey gave them.
            dtype: what the statistics are kept in.
        """
        self.case = case
        self.names: dict[str, str] = {}  # how the LoRAs call a module -> how the model does
        self.levels: set[float] = set()
        self._subspaces, self._dtype = subspaces, dtype
        self._choice = Choice(min(tokens or SURVEYED, SURVEYED) if survey else tokens, seed=case)
        self._taps = taps_of(subspaces, speakers, survey, shared)
        self._handles: list[RemovableHandle] = []
        self._attached: nn.Module | None = None
        self._heard: Heard | None = None
        # in a survey: the last new input, which the model may let go of, and whose it was
        self._last: tuple[ReferenceType[Tensor], Tap] | None = None
        self._follows: dict[Tap, set[Tap | None]] = {}  # and whose input each other module had, None for its own

    def attach(self, model: nn.Module) -> None:
        """Put the hooks on `model`; does nothing if they are there already."""
        if self._attached is model:
            return
        self.detach()
        layers = find_layers(model, (tap.module for tap in self._taps))
        for tap in self._taps:
            tap.check(layers[tap.module])
        self._attached = model
        self.names.update({module: layer.name for module, layer in layers.items()})
        for tap in self._taps:
            hook = self._hook(tap, layers[tap.module])
            self._handles.append(layers[tap.module].module.register_forward_hook(hook, with_kwargs=True))

    def at(self, level: float) -> None:
        """Say at which noise level the model runs next, in any unit; what was never seen is trusted less."""
        self.levels.add(level)

    def detach(self) -> None:
        """Take the hooks off; does nothing if there are none. What they compute with stays where it is."""
        while self._handles:
            self._handles.pop().remove()
        self._attached = self._heard = self._last = None

    def close(self) -> None:
        """Take the hooks off for good, and free what was put where the model computes. The sums stay."""
        self.detach()
        for tap in self._taps:
            tap.release()

    def clear(self) -> None:
        """Forget the sums, which somebody else has now; what was heard is still known."""
        for tap in self._taps:
            tap.sketch = None
            for signal in tap.signals:
                signal.sums = Accumulator()

    @property
    def heard(self) -> bool:
        """Whether any of the modules ran while the hooks were on."""
        return any(tap.calls for tap in self._taps)

    @property
    def ran(self) -> set[str]:
        """Modules that ran while the hooks were on."""
        return {tap.module for tap in self._taps if tap.calls}

    @property
    def idle(self) -> set[str]:
        """Modules that a LoRA changes and that did not run."""
        return {tap.module for tap in self._taps if not tap.calls}

    @property
    def followers(self) -> dict[str, str]:
        """Found by a survey: modules that always had the input of another one, which ran just before."""
        return {
            tap.module: leader.module
            for tap, leaders in self._follows.items()
            if len(leaders) == 1 and (leader := next(iter(leaders))) is not None
        }

    def sketches(self) -> Iterator[tuple[str, Tensor]]:
        """What a survey found, for each module that ran."""
        return ((tap.module, tap.sketch.mean()) for tap in self._taps if tap.sketch is not None and tap.calls)

    def statistics(self) -> Iterator[tuple[Site, SufficientStatistics]]:
        """What this run adds, for each site that is routed."""
        levels = frozenset(self.levels)
        for tap in self._taps:
            for signal in (signal for signal in tap.signals if signal.counted):
                found = signal.sums.compute(self.case, signal.space, levels, self._dtype)
                yield from ((site, found) for site in signal.sites)

    def _hook(self, tap: Tap, layer: Layer) -> Callable[..., Tensor]:
        @torch.no_grad()
        def hook(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor) -> Tensor:
            x = args[0] if args else next(iter(kwargs.values()))
            with torch.autocast(x.device.type, enabled=False):
                result = self._respond(tap, layer, (x.device, compute_dtype(x)), x, output)
            tap.calls += 1
            return result

        return hook

    def _respond(self, tap: Tap, layer: Layer, where: Place, x: Tensor, output: Tensor) -> Tensor:
        """Project, count, and add what the speaking LoRAs write to the output."""
        for signal in tap.signals:
            signal.sums.samples += layer.samples(x)
        chosen = self._choice.of(layer.positions(output), x.device, tap.calls + tap.number)
        if tap.sketch is not None:
            self._survey(tap, layer, x, chosen)
        result, ups = layer.writable(x, output), tap.ups(where)
        heard = self._hear(tap, layer, where, x, chosen)
        if heard is not None and heard.whole:
            self._count(tap, heard.joint, heard.z, result.view(-1, result.shape[-1]), ups)
            return result
        if tap.counted and heard is None and chosen is None:
            down = tap.own.placed(layer, where)
            for piece, written in layer.pieces(x, result, down.rank, where[1]):
                self._count(tap, tap.own, layer.project(piece, down), written, ups)
            return result
        if heard is not None:
            self._count(tap, heard.joint, heard.z)
        elif tap.counted and chosen is not None:
            self._count(tap, tap.own, layer.project_some(x, tap.own.placed(layer, where), chosen, where[1]))
        self._add(tap, layer, where, x, result, ups)
        return result

    def _count(
        self, tap: Tap, joint: Joint, z: Tensor, written: Tensor | None = None, ups: Sequence[PlacedUp] = ()
    ) -> None:
        """Add tokens to the sums, and what the speaking LoRAs make of the same tokens to `written`."""
        left = iter(ups)
        for signal in tap.signals:
            part = joint.part(signal, z)
            if signal.counted:
                signal.sums.update(part)
            if written is not None:
                for update in signal.updates:
                    rows = slice(update.site.start, update.site.stop)
                    add_product(written[..., rows], part[:, update.own], next(left))

    def _add(self, tap: Tap, layer: Layer, where: Place, x: Tensor, result: Tensor, ups: Sequence[PlacedUp]) -> None:
        """Add what the speaking LoRAs write, which not all of the counted rows are needed for."""
        if not ups:
            return
        rows = tap.rows(layer, where)
        for piece, written in layer.pieces(x, result, rows.rank, where[1]):
            z, start = layer.project(piece, rows, wide=False), 0
            for (site, *_), up in zip(tap.updates, ups, strict=True):
                columns = slice(start, start + up.matrix.shape[1])
                add_product(written[..., site.start : site.stop], z[:, columns], up)
                start = columns.stop

    def _hear(self, tap: Tap, layer: Layer, where: Place, x: Tensor, chosen: Tensor | None) -> Heard | None:
        """The joint signal of all modules with this input, computed by the first; None if there is none to share."""
        heard, joint = self._heard, tap.shared
        self._heard = None
        if joint is None:
            return None
        if heard is None or heard.x is not x or heard.joint is not joint:
            heard = self._projected(joint, layer, where, x, chosen)
        else:
            heard = replace(heard, waiting=heard.waiting - 1)
        self._heard = heard if heard is not None and heard.waiting else None
        return heard

    def _projected(self, joint: Joint, layer: Layer, where: Place, x: Tensor, chosen: Tensor | None) -> Heard | None:
        tokens = x.numel() // x.shape[-1] if chosen is None else len(chosen)
        if layer.is_conv or not fits(tokens, joint.rank):
            return None
        placed = joint.placed(layer, where)
        if chosen is not None:
            z = layer.project_some(x, placed, chosen, where[1])
        else:
            z = torch.cat([layer.project(piece, placed) for piece in layer.inputs(x, where[1])])
        return Heard(x, joint, z, chosen is None, joint.taps - 1)

    def _survey(self, tap: Tap, layer: Layer, x: Tensor, chosen: Tensor | None) -> None:
        """Look at the inputs, and at whether they are those of the module before."""
        assert tap.sketch is not None
        leader = self._last[1] if self._last is not None and self._last[0]() is x else None
        self._follows.setdefault(tap, set()).add(leader)
        if leader is None:
            self._last = (ref(x), tap)
        for piece in layer.seen(x, chosen):
            tap.sketch.update(piece)
