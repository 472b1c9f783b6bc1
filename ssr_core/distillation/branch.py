"""Branch: low-rank updates on a model whose weights stay untouched, as hooks that gradients pass through."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from ..lora.lora import Lora
from ..lora.site import Site
from ..measure.finding import find_layers
from ..measure.layer import Layer
from ..measure.placed import Place
from .factors import Fixed
from .hooks import Hooks


class Factors(Protocol):
    def placed(self, where: Place) -> tuple[Tensor, Tensor]: ...


class Branch(Hooks):
    """Adds to the output of each layer what updates make of its input."""

    def __init__(self, factors: Mapping[Site, Factors] | Sequence[tuple[Site, Factors]]) -> None:
        """`factors` by site; in pairs where several updates write to the same rows."""
        super().__init__()
        pairs = factors.items() if isinstance(factors, Mapping) else factors
        self._by_module: dict[str, list[tuple[Site, Factors]]] = {}
        for site, one in pairs:
            self._by_module.setdefault(site.module, []).append((site, one))

    @classmethod
    def of(cls, loras: Iterable[Lora], modules: Collection[str] | None = None) -> Branch:
        """Several LoRAs at their strengths, as somebody loads them; of the named modules only, if any are named."""
        return cls(
            [
                (site, Fixed(update.scaled(lora.strength)))
                for lora in loras
                for site, update in lora.updates.items()
                if modules is None or site.module in modules
            ]
        )

    def _put(self, model: nn.Module) -> Iterator[RemovableHandle]:
        layers = find_layers(model, self._by_module)  # raises before any hook is on
        for name, pairs in self._by_module.items():
            hook = _hook(layers[name], pairs)
            yield layers[name].module.register_forward_hook(hook, with_kwargs=True)


def _hook(layer: Layer, pairs: Sequence[tuple[Site, Factors]]) -> Callable[..., Tensor]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        x = args[0] if args else next(iter(kwargs.values()))
        for site, factors in pairs:
            added = layer.low_rank(x, *factors.placed((x.device, x.dtype)))
            output = output + _in_rows(added, site, 1 if layer.is_conv else -1, output.ndim)
        return output

    return hook


def _in_rows(added: Tensor, site: Site, axis: int, ndim: int) -> Tensor:
    """What some rows of a layer's output get, as what all of them get."""
    if site.is_whole:
        return added
    behind = 2 * (ndim - 1 - axis % ndim)  # pad() counts from the last axis
    return F.pad(added, (*(0,) * behind, site.start, site.out_features - site.stop))
