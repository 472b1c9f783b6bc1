"""StatisticsCollector: runs LoRAs on a model one at a time and gathers their statistics, without touching a weight."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .calibration import Calibration, check_task
from .errors import LoraError, ModelMismatchError
from .layer import Layer, compute_dtype
from .lora import Lora
from .site import Site, canonical
from .subspace import Subspace, join_loras
from .sufficient_statistics import Accumulator, SufficientStatistics


class StatisticsCollector:
    """Collects the statistics of K LoRAs on one model.

    >>> collector = StatisticsCollector([cat, dog])
    >>> for task, batch in enumerate(batches):
    ...     with torch.no_grad(), collector.watching(model, task):  # LoRA `task` is active inside
    ...         model(**batch)
    >>> calibration = collector.calibration()
    """

    def __init__(self, loras: Sequence[Lora]) -> None:
        if not loras:
            raise LoraError("There is no LoRA to collect statistics for; give at least one.")
        self.loras = tuple(loras)
        self.subspaces = join_loras(loras)
        if not self.subspaces:
            raise LoraError(f"None of {', '.join(lora.name for lora in loras)} holds a low-rank update.")
        self._statistics = {
            site: SufficientStatistics.empty(space) for site, space in self.subspaces.items() if space.is_shared
        }
        self._names: dict[str, str] = {}

    @contextmanager
    def watching(self, model: nn.Module, task: int) -> Iterator[Recording]:
        """Inside the block LoRA `task` is active on `model` and its tokens are counted.

        A transaction: statistics are added only if the block ends without an exception. Hooks always come off.

        Raises:
            ModelMismatchError: a LoRA writes to a layer that the model lacks or that has another size.
            StatisticsError: activations were not finite.
        """
        with self.recording(task) as recording:
            recording.attach(model)
            yield recording

    @contextmanager
    def recording(self, task: int) -> Iterator[Recording]:
        """Like `watching`, for hosts that decide themselves when the hooks go on (`attach`) and off (`detach`)."""
        check_task(task, self.loras)
        recording = Recording(self.subspaces, task, self.loras[task].strength)
        try:
            yield recording
        finally:
            recording.detach()
        self._statistics.update(self._sums_with(recording))
        self._names.update(recording.names)

    def calibration(self) -> Calibration:
        """Everything collected so far. Sites carry the names of the model's modules."""
        names = self._names

        def renamed(site: Site) -> Site:
            return Site(names.get(site.module, site.module), site.start, site.stop, site.out_features)

        return Calibration(
            self.loras,
            {renamed(site): space for site, space in self.subspaces.items()},
            {renamed(site): statistics for site, statistics in self._statistics.items()},
        )

    def _sums_with(self, recording: Recording) -> dict[Site, SufficientStatistics]:
        sums = {}
        for site, seen in recording.statistics():
            seen.check(self.subspaces[site], site)
            sums[site] = self._statistics[site] + seen
        return sums


class Recording:
    """One run of one task: the hooks on the model and the sums behind them."""

    def __init__(self, subspaces: dict[Site, Subspace], task: int, strength: float) -> None:
        self.task = task
        self.names: dict[str, str] = {}  # how the LoRAs call a module -> how the model does
        self._taps = _taps(subspaces, task, strength)
        self._subspaces = subspaces
        self._handles: list[RemovableHandle] = []
        self._attached: nn.Module | None = None

    def attach(self, model: nn.Module) -> None:
        """Put the hooks on `model`; does nothing if they are there already."""
        if self._attached is model:
            return
        self.detach()
        layers = {tap.module: find_layer(model, tap.module) for tap in self._taps}
        for tap in self._taps:
            tap.check(layers[tap.module])
        self._attached = model
        self.names.update({module: layer.name for module, layer in layers.items()})
        for tap in self._taps:
            hook = _hook(tap, layers[tap.module])
            self._handles.append(layers[tap.module].module.register_forward_hook(hook, with_kwargs=True))

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

    def statistics(self) -> Iterator[tuple[Site, SufficientStatistics]]:
        """What this run adds, for each shared site."""
        for tap in self._taps:
            for signal in tap.signals:
                for site in signal.sites:
                    if self._subspaces[site].is_shared:
                        yield site, signal.sums.compute(self.task, self._subspaces[site])


@dataclass(eq=False)
class _Signal:
    """One joint `down` of a module and the sites that share it: slices of a fused LoRA need one projection."""

    down: Tensor  # (R, in, *kernel)
    counted: bool
    sites: list[Site]
    updates: list[tuple[Site, slice, Tensor]]  # rows of the output, rows of z, up (out, r) of the running task
    sums: Accumulator = field(default_factory=Accumulator)


@dataclass(eq=False)
class _Tap:
    """What the hook on one module needs."""

    module: str
    signals: list[_Signal]
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


def _taps(subspaces: dict[Site, Subspace], task: int, strength: float) -> list[_Tap]:
    grouped: dict[str, dict[str, _Signal]] = {}
    for site, space in subspaces.items():
        if not (space.is_shared or space.ranks[task]):
            continue  # neither to be measured nor active now
        signals = grouped.setdefault(site.module, {})
        signal = signals.setdefault(space.fingerprint, _Signal(space.down, space.is_shared, [], []))
        signal.sites.append(site)
        if space.ranks[task] and strength:
            own = space.blocks[task]
            signal.updates.append((site, own, space.up[:, own].float() * strength))
    return [_Tap(module, list(signals.values())) for module, signals in grouped.items()]


def _hook(tap: _Tap, layer: Layer) -> Callable[..., Tensor]:
    """The forward hook of one module: project, count, and add the running task's update to the output."""
    placed: dict[tuple[torch.device, torch.dtype], list[tuple[_Signal, Tensor, list[Tensor]]]] = {}

    def place(device: torch.device, dtype: torch.dtype) -> list[tuple[_Signal, Tensor, list[Tensor]]]:
        return [
            (
                signal,
                signal.down.reshape(-1, *layer.weight_shape[1:]).to(device, dtype),
                [up.to(device, dtype) for _, _, up in signal.updates],
            )
            for signal in tap.signals
        ]

    @torch.no_grad()
    def hook(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor) -> Tensor:
        x = args[0] if args else next(iter(kwargs.values()))
        where = (x.device, compute_dtype(x))
        if where not in placed:
            placed[where] = place(*where)
        tap.fired = True
        result = output.clone(memory_format=torch.contiguous_format)
        with torch.autocast(x.device.type, enabled=False):
            for piece, written in layer.chunks(x, result):
                piece = piece.to(where[1])
                for signal, down, ups in placed[where]:
                    z = layer.project(piece, down)
                    if signal.counted:
                        signal.sums.update(z)
                    for (site, own, _), up in zip(signal.updates, ups, strict=True):
                        rows = written[..., site.start : site.stop]
                        rows += (z[:, own] @ up.mT).reshape(rows.shape)
        return result

    return hook


def find_layer(model: nn.Module, name: str) -> Layer:
    """The layer of `model` that LoRAs call `name`, in dots or in kohya's underscores.

    Raises:
        ModelMismatchError: there is none, or it is no linear or conv layer.
    """
    modules = dict(model.named_modules())
    found = name if name in modules else next((m for m in modules if canonical(m) == canonical(name)), None)
    if found is None or getattr(modules[found], "weight", None) is None:
        raise ModelMismatchError(
            f"The model ({type(model).__name__}) has no layer {name!r}. Was the LoRA trained for another model, "
            "or do its keys carry a prefix that the model's module names lack?"
        )
    return Layer(modules[found], found)
