"""Refinement: one task run twice, with its LoRA alone and with the merge, and the corrections that follow."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .correction import Correction
from .errors import StatisticsError
from .layer import Layer, compute_dtype
from .low_rank_update import LowRankUpdate
from .recording import Recording, Tap
from .site import Site
from .subspace import Subspace

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
        self._sums: dict[Site, tuple[Tensor, Tensor]] = {}  # z'^T z' (R, R), t^T z' (out, R), on the model's device

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Inside, the task's LoRA is active and the outputs of the layers are kept."""
        self._alone = True
        yield

    @contextmanager
    def merged(self) -> Iterator[None]:
        """Inside, the merge is active and its inputs are compared with what `alone` kept."""
        self._alone = False
        try:
            yield
        finally:
            self._alone = True

    def corrections(self) -> Iterator[tuple[Site, Correction]]:
        """What this run adds, for each site that is routed.

        Raises:
            StatisticsError: activations were not finite.
        """
        for site, (gram, target) in self._sums.items():
            space = self._subspaces[site]
            empty = Correction.empty(space, self._strengths)
            empty.gram[self.task] = gram.to("cpu", torch.float64)
            empty.target[self.task] = target.to("cpu", torch.float32)
            empty.check(space, site)
            yield site, empty

    def _hook(self, tap: Tap, layer: Layer) -> Callable[..., Tensor]:
        waiting: deque[tuple[int, Tensor, Tensor]] = deque()  # how many tokens, which, their outputs under the LoRA
        active = {site: own for signal in tap.signals for site, own, _ in signal.updates}
        ups = {site: up for signal in tap.signals for site, _, up in signal.updates}

        @torch.no_grad()
        def hook(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor) -> Tensor:
            x = args[0] if args else next(iter(kwargs.values()))
            tap.fired = True
            with torch.autocast(x.device.type, enabled=False):
                if self._alone:
                    result = layer.plus(x, output, (self._own(site, own, ups[site]) for site, own in active.items()))
                    tokens = layer.outputs(result)
                    chosen = self._some(len(tokens), x.device)
                    waiting.append((len(tokens), chosen, tokens[chosen]))
                    return result
                if not waiting:
                    raise StatisticsError(f"{layer.name} ran under the merge more often than under the LoRA alone.")
                count, chosen, alone = waiting.popleft()
                if count != len(layer.outputs(output)):
                    raise StatisticsError(
                        f"{layer.name} saw {count} tokens under the LoRA alone and {len(layer.outputs(output))} under "
                        "the merge, so they cannot be compared. Both have to run on the same batch; or collect without "
                        "refinement."
                    )
                self._compare(tap, layer, x, output, chosen, alone)
                sites = [site for signal in tap.signals for site in signal.sites if site in self._updates]
                return layer.plus(x, output, ((site, self._updates[site]) for site in sites))

        return hook

    def _own(self, site: Site, own: slice, up: Tensor) -> tuple[Site, LowRankUpdate]:
        return site, LowRankUpdate(self._subspaces[site].down[own], up)

    def _some(self, tokens: int, device: torch.device) -> Tensor:
        """Indices of at most so many tokens, each as likely as any other."""
        chosen = self._choose(tokens, tokens)
        return (torch.arange(tokens) if chosen is None else chosen).to(device)

    def _compare(self, tap: Tap, layer: Layer, x: Tensor, output: Tensor, chosen: Tensor, alone: Tensor) -> None:
        dtype = compute_dtype(x)
        missing = alone.to(dtype) - layer.outputs(output)[chosen].to(dtype)
        for signal in tap.signals:
            if not signal.counted:
                continue
            down = signal.down.reshape(-1, *layer.weight_shape[1:]).to(x.device, dtype)
            z = layer.project_some(x.to(dtype), down, chosen)
            for site in signal.sites:
                gram, target = self._sums.get(site, (0.0, 0.0))
                product = (z.mT @ z).to(torch.float32 if x.device.type == "mps" else torch.float64)
                self._sums[site] = (gram + product, target + missing[:, site.start : site.stop].mT @ z)
