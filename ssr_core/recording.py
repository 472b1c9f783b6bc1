"""Recording: one run of one task on a model, the hooks that listen and the sums behind them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .accumulator import Accumulator
from .errors import ModelMismatchError
from .layer import Layer, compute_dtype
from .site import Site, canonical
from .sketch import Sketch
from .subspace import Subspace
from .sufficient_statistics import SufficientStatistics

Place = tuple[torch.device, torch.dtype]  # where a layer computes, and in which precision


class Recording:
    """One run of one task: the hooks on the model and the sums behind them."""

    def __init__(
        self, subspaces: Mapping[Site, Subspace], task: int, strength: float, survey: int = 0, tokens: int = 0
    ) -> None:
        """`tokens` of each layer and forward pass are counted at most, chosen at random; 0 = all."""
        self.task = task
        self.names: dict[str, str] = {}  # how the LoRAs call a module -> how the model does
        self.levels: set[float] = set()
        self._limit = tokens
        self._generator = torch.Generator().manual_seed(task)
        self._taps = _taps(subspaces, task, strength, survey)
        self._subspaces = subspaces
        self._handles: list[RemovableHandle] = []
        self._attached: nn.Module | None = None

    def attach(self, model: nn.Module) -> None:
        """Put the hooks on `model`; does nothing if they are there already."""
        if self._attached is model:
            return
        self.detach()
        modules = dict(model.named_modules())
        known = {canonical(name): name for name in modules}
        layers = {tap.module: _layer(modules, known, tap.module, model) for tap in self._taps}
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
        """Take the hooks off; does nothing if there are none."""
        while self._handles:
            self._handles.pop().remove()
        self._attached = None

    @property
    def heard(self) -> bool:
        """Whether any of the modules ran while the hooks were on."""
        return any(tap.fired for tap in self._taps)

    @property
    def silent(self) -> list[str]:
        """Modules that should have run and did not."""
        return [tap.module for tap in self._taps if not tap.fired]

    def sketches(self) -> Iterator[tuple[str, Tensor]]:
        """What a survey found, for each module that ran."""
        return ((tap.module, tap.sketch.mean()) for tap in self._taps if tap.sketch is not None and tap.fired)

    def _hook(self, tap: Tap, layer: Layer) -> Callable[..., Tensor]:
        """The forward hook of one module. What it computes with is put where the layer computes once, not each time."""
        placed: dict[Place, Any] = {}

        @torch.no_grad()
        def hook(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor) -> Tensor:
            x = args[0] if args else next(iter(kwargs.values()))
            where = (x.device, compute_dtype(x))
            if where not in placed:
                placed[where] = self._placed(tap, layer, where)
            tap.fired = True
            with torch.autocast(x.device.type, enabled=False):
                return self._respond(tap, layer, placed[where], x, output)

        return hook

    def _placed(self, tap: Tap, layer: Layer, where: Place) -> Any:
        """What `_respond` needs of the tap: `down` and the running task's `up` of each signal."""
        return [
            (signal, layer.place(signal.down, where), [up.to(*where) for _, _, up in signal.updates])
            for signal in tap.signals
        ]

    def _respond(self, tap: Tap, layer: Layer, placed: Any, x: Tensor, output: Tensor) -> Tensor:
        """Project, count, and add the running task's update to a copy of the output."""
        for signal in tap.signals:
            signal.sums.samples += layer.samples(x)
        result = output.clone(memory_format=torch.contiguous_format)
        positions, rank = layer.positions(output), max(len(signal.down) for signal in tap.signals)
        for piece, written in layer.chunks(x, result, rank):
            piece = piece.to(compute_dtype(x))
            if tap.sketch is not None:
                tap.sketch.update(layer.features(piece))
            for signal, down, ups in placed:
                z = layer.project(piece, down)
                if signal.counted:
                    chosen = self._choose(len(z), positions)
                    signal.sums.update(z if chosen is None else z[chosen.to(z.device)])
                for (site, own, _), up in zip(signal.updates, ups, strict=True):
                    rows = written[..., site.start : site.stop]
                    rows += (z[:, own] @ up.mT).reshape(rows.shape)
        return result

    def _choose(self, tokens: int, of: int) -> Tensor | None:
        """Which tokens of a piece of `tokens` out of `of` are counted, each as likely as any other; None for all."""
        if not self._limit or of <= self._limit:
            return None
        return torch.randperm(tokens, generator=self._generator)[: max(1, round(self._limit * tokens / of))]

    def statistics(self) -> Iterator[tuple[Site, SufficientStatistics]]:
        """What this run adds, for each site that is routed."""
        levels = frozenset(self.levels)
        for tap in self._taps:
            for signal in tap.signals:
                for site in signal.sites:
                    if signal.counted:
                        yield site, signal.sums.compute(self.task, self._subspaces[site], levels)


@dataclass(eq=False)
class Signal:
    """One joint `down` of a module and the sites that share it: slices of a fused LoRA need one projection."""

    down: Tensor  # (R, in, *kernel)
    counted: bool
    sites: list[Site]
    updates: list[tuple[Site, slice, Tensor]]  # rows of the output, rows of z, up (out, r) of the running task
    sums: Accumulator = field(default_factory=Accumulator)


@dataclass(eq=False)
class Tap:
    """What the hook on one module needs."""

    module: str
    signals: list[Signal]
    sketch: Sketch | None = None
    fired: bool = False

    def check(self, layer: Layer) -> None:
        for signal in self.signals:
            out, in_numel = signal.sites[0].out_features, signal.down[0].numel()
            shape = layer.weight_shape
            if out != shape[0] or in_numel != torch.Size(shape[1:]).numel():
                raise ModelMismatchError(
                    f"A LoRA writes to {layer.name} with {in_numel} inputs and {out} outputs, but this model's layer "
                    f"has the shape {shape}. It was trained for another model."
                )


def _taps(subspaces: Mapping[Site, Subspace], task: int, strength: float, survey: int) -> list[Tap]:
    taps: dict[str, Tap] = {}
    grouped: dict[tuple[str, str], Signal] = {}
    for site, space in subspaces.items():
        if not (space.is_routed or space.ranks[task]):
            continue  # neither to be measured nor active now
        tap = taps.setdefault(site.module, Tap(site.module, []))
        key = (site.module, space.fingerprint)
        if key not in grouped:
            grouped[key] = Signal(space.down, space.is_routed and not survey, [], [])
            tap.signals.append(grouped[key])
        grouped[key].sites.append(site)
        if survey and space.is_routed:
            tap.sketch = tap.sketch or Sketch(min(survey, space.down.shape[1]))
        if space.ranks[task] and strength:
            own = space.blocks[task]
            grouped[key].updates.append((site, own, space.up[:, own].float() * strength))
    return list(taps.values())


def _layer(modules: Mapping[str, nn.Module], known: Mapping[str, str], name: str, model: nn.Module) -> Layer:
    """The layer that LoRAs call `name`, in dots or in kohya's underscores."""
    found = name if name in modules else known.get(canonical(name), "")
    if not found or getattr(modules[found], "weight", None) is None:
        raise ModelMismatchError(
            f"The model ({type(model).__name__}) has no layer {name!r}. Was the LoRA trained for another model, "
            "or do its keys carry a prefix that the model's module names lack?"
        )
    return Layer(modules[found], found)
