"""Random LoRAs, models and tokens, and the dense arithmetic that the tests of ssr_core compare against."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssr_core import (
    Accumulator,
    Calibration,
    Lora,
    LowRankUpdate,
    Site,
    StatisticsCollector,
    Subspace,
    SufficientStatistics,
    join_rows,
)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def random_update(out: int, in_shape: int | Sequence[int], rank: int, seed: int = 0) -> LowRankUpdate:
    """In float32, as files are; its effect on an input of unit variance is of unit size."""
    in_shape = (in_shape,) if isinstance(in_shape, int) else tuple(in_shape)
    down = random(rank, *in_shape, seed=2 * seed, dtype=torch.float32) / torch.Size(in_shape).numel() ** 0.5
    return LowRankUpdate(down, random(out, rank, seed=2 * seed + 1, dtype=torch.float32) / rank**0.5)


def random_lora(name: str, model: nn.Module, rank: int, seed: int = 0, modules: Sequence[str] | None = None) -> Lora:
    """A LoRA for every weight of `model`, or for those of `modules`."""
    layers = {n: m.weight.shape for n, m in model.named_modules() if isinstance(getattr(m, "weight", None), Tensor)}
    updates = {
        Site.whole(module, shape[0]): random_update(shape[0], shape[1:], rank, 1000 * seed + index)
        for index, (module, shape) in enumerate(layers.items())
        if modules is None or module in modules
    }
    return Lora(name, updates)


def mlp(seed: int = 0) -> nn.Sequential:
    """Two linear layers, called "0" and "2", in float64."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8)).double()


def collect(loras: Sequence[Lora], model: nn.Module, batches: Sequence[Tensor]) -> Calibration:
    collector = StatisticsCollector(loras)
    run(collector, model, batches)
    return collector.calibration()


def run(collector: StatisticsCollector, model: nn.Module, batches: Sequence[Tensor]) -> None:
    """Each task on its own batch."""
    for task, batch in enumerate(batches):
        with torch.no_grad(), collector.watching(model, task):
            model(batch)


def measure(space: Subspace, tokens: Sequence[Tensor]) -> SufficientStatistics:
    """The statistics of a linear layer whose inputs under task k are tokens[k], (n, in)."""
    statistics = SufficientStatistics.empty(space)
    for task, x in enumerate(tokens):
        accumulator = Accumulator()
        accumulator.update(x.double() @ space.down.double().flatten(1).mT)
        statistics = statistics + accumulator.compute(task, space)
    return statistics


def calibration_at(site: Site, updates: Sequence[LowRankUpdate | None], tokens: Sequence[Tensor]) -> Calibration:
    """A calibration of LoRAs that share one linear layer, without a model."""
    loras = tuple(
        Lora(name, {} if update is None else {site: update})
        for name, update in zip(("cat", "dog", "style", "pose"), updates, strict=False)
    )
    space = Subspace.join(updates)
    return Calibration(loras, {site: space}, {site: measure(space, tokens)} if space.is_routed else {})


def dense(update: LowRankUpdate) -> Tensor:
    """The update as an explicit matrix (out, in and kernel flattened), float64."""
    return update.up.double() @ update.down.double().flatten(1)


def dense_modules(updates: Mapping[Site, LowRankUpdate]) -> dict[str, Tensor]:
    """One explicit matrix per module, each site's rows added where they belong."""
    matrices: dict[str, Tensor] = {}
    for site, update in updates.items():
        matrix = dense(update)
        whole = matrices.setdefault(site.module, torch.zeros(site.out_features, matrix.shape[1], dtype=torch.float64))
        whole[site.start : site.stop] += matrix
    return matrices


def dense_joined(updates: Mapping[Site, LowRankUpdate]) -> dict[str, Tensor]:
    return {module: dense(update) for module, update in join_rows(updates).items()}


def inputs_of(module: nn.Module, x: Tensor) -> Tensor:
    """What each output position of a linear or convolution layer sees, (tokens, in * kernel): padded and unfolded."""
    kernel = module.weight.shape[2:]
    if not kernel:
        return x.reshape(-1, x.shape[-1])
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    x = F.pad(x, [p for p in reversed(padding_of(module)) for _ in range(2)], mode=mode)
    for axis, (size, stride, dilation) in enumerate(zip(kernel, module.stride, module.dilation, strict=True), 2):
        x = x.unfold(axis, dilation * (size - 1) + 1, stride)[..., ::dilation]
    order = [0, *range(2, 2 + len(kernel)), 1, *range(2 + len(kernel), 2 + 2 * len(kernel))]
    return x.permute(order).flatten(0, len(kernel)).flatten(1)


def padding_of(module: nn.Module) -> tuple[int, ...]:
    """Of each axis; "same" is tested with odd kernels only."""
    if module.padding == "valid":
        return (0,) * len(module.kernel_size)
    if module.padding == "same":
        reach = zip(module.dilation, module.kernel_size, strict=True)
        return tuple(dilation * (size - 1) // 2 for dilation, size in reach)
    return tuple(module.padding)


def outputs_of(tokens: Tensor, like: Tensor, spatial: bool) -> Tensor:
    """(tokens, out) back in the layout of a layer's output."""
    if not spatial:
        return tokens.reshape(like.shape)
    return tokens.reshape(like.shape[0], *like.shape[2:], like.shape[1]).movedim(-1, 1)


def relative_error(value: Tensor, reference: Tensor) -> float:
    return float((value.double() - reference.double()).norm() / reference.double().norm())
