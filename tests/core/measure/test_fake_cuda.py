"""Collecting on a device "cuda" that is not there: nothing on the wrong device, no wait in a hook, few kernels."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from fake_cuda import FakeCuda, fake_cuda, on_device
from torch import Tensor, nn

from ssr_core import Lora, LowRankUpdate, Site, StatisticsCollector
from ssr_core.measure.collector import CONTEXT

WIDTH, TOKENS, COUNTED = 512, 4096, 1024
LAYERS = 9
KERNELS = {"survey": 8, "measuring": 8, "alone": 6, "merged": 14}  # of ours a layer and pass, at most
DTYPES = ["bfloat16", "float16", "float32"]


class Block(nn.Module):
    """Layers as transformers have them: of one vector, of one input, wide ones, and a patch embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(16, WIDTH, 2, 2)
        self.embedding, self.modulation = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.wide, self.narrow = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.last = nn.Linear(WIDTH, 64)

    def forward(self, image: Tensor, vector: Tensor) -> Tensor:
        scale, shift = self.modulation(self.embedding(vector)).chunk(2, dim=-1)
        x = self.patches(image).flatten(2).mT * scale + shift
        x = x + self.q(x) + self.k(x) + self.v(x)
        return self.last(x + self.narrow(nn.functional.gelu(self.wide(x))))


def loras(dtype: torch.dtype, rank: int = 16) -> list[Lora]:
    def factor(*shape: int) -> Tensor:
        return torch.randn(*shape).to(dtype)

    layers = {name: tuple(one.weight.shape) for name, one in Block().named_modules() if hasattr(one, "weight")}
    return [
        Lora(
            name,
            {
                Site.whole(layer, out): LowRankUpdate(factor(rank, *inputs), factor(out, rank))
                for layer, (out, *inputs) in layers.items()
            },
        )
        for name in ("cat", "dog")
    ]


class Bench:
    """A model on the device and what it takes without hooks."""

    def __init__(self, seen: FakeCuda, dtype: torch.dtype) -> None:
        self.model = on_device(Block, dtype)
        side = 2 * int(TOKENS**0.5)
        self._given = [torch.empty(shape, device="cuda", dtype=dtype) for shape in ((1, 16, side, side), (1, 1, WIDTH))]
        self.seen, self._own = seen, seen.live
        seen.reset()
        self.forward()
        self._kernels, self._running = seen.launches, seen.peak - self._own

    def forward(self) -> None:
        with torch.no_grad():
            self.model(*self._given)

    def passed(self, name: str, inside: Callable | None = None) -> None:
        """Once more with the hooks on: no wait, few kernels."""
        self.seen.reset()
        if inside is None:
            self.forward()
        else:
            with inside():
                self.forward()
        assert not self.seen.waits
        assert not self.seen.sent
        assert self.seen.launches - self._kernels <= KERNELS[name] * LAYERS

    @property
    def taken(self) -> int:
        """The peak of the last pass beside the model and what it takes to run, or more."""
        return max(self.seen.live, self.seen.peak - self._running) - self._own


@contextmanager
def listening(bench: Bench, opened) -> Iterator:
    with opened as run:
        run.attach(bench.model)
        yield run
        run.detach()


def with_context(collector: StatisticsCollector) -> StatisticsCollector:
    """As after `see`, of inputs that nobody has seen."""
    spaces = {}
    for site, space in collector.subspaces.items():
        spaces[site] = space.with_context(torch.eye(space.down.shape[1])[:CONTEXT])
    seeing = StatisticsCollector(collector.loras, spaces)
    seeing.survey.shared = {"k": "q", "v": "q"}
    return seeing


@pytest.mark.parametrize("of_model", ["bfloat16", "float16"])
@pytest.mark.parametrize("of_files", DTYPES)
def test_no_hook_waits_for_the_device_and_what_is_told_before_is_what_is_taken(of_model, of_files):
    dtype = getattr(torch, of_model)
    given = loras(getattr(torch, of_files))
    with fake_cuda() as seen:
        bench, collector = Bench(seen, dtype), StatisticsCollector(given)
        with listening(bench, collector.recording(0, CONTEXT, COUNTED)):
            bench.forward()
            assert not seen.waits  # nor the first time: copies to the device do not wait
            bench.passed("survey")
            assert bench.taken <= collector.requirement(CONTEXT, dtype=dtype).device
        collector = with_context(collector)
        for case in (0, 1):
            with listening(bench, collector.recording(case, 0, COUNTED)):
                seen.reset()
                bench.forward()
                assert not seen.waits
                bench.passed("measuring")
                assert bench.taken <= collector.requirement(dtype=dtype).device
        updates = {site: space.plain_stack() for site, space in collector.subspaces.items()}
        with listening(bench, collector.refinement(0, updates)) as run:
            seen.reset()
            for branch in (run.alone, run.merged):
                with branch():
                    bench.forward()
            assert set(seen.waits) <= {WHETHER_MOVED}
            bench.passed("alone", run.alone)
            waiting = bench.taken
            bench.passed("merged", run.merged)
            assert max(waiting, bench.taken) <= collector.requirement(refine=True, dtype=dtype).device


WHETHER_MOVED = "refinement.py: (self._unmoved if torch.equal(alone, merged) else self._moved).add(tap)"


def test_groups_of_layers_take_less_of_the_device_and_as_much_as_is_told():
    dtype, given = torch.bfloat16, loras(torch.bfloat16)
    taken = {}
    for count in (1, 3):
        with fake_cuda() as seen:
            bench, collector = Bench(seen, dtype), with_context(StatisticsCollector(given))
            updates = {site: space.plain_stack() for site, space in collector.subspaces.items()}
            for modules in collector.groups(count):
                with listening(bench, collector.refinement(0, updates, modules)) as run:
                    for branch in (run.alone, run.merged) * 2:
                        with branch():
                            bench.forward()
                        taken[count] = max(taken.get(count, 0), bench.taken)
            assert taken[count] <= collector.requirement(refine=True, dtype=dtype, groups=count).device
    assert taken[3] < 0.7 * taken[1]


def test_the_fake_device_sees_waits_copies_and_mixed_devices():
    with fake_cuda() as seen:
        there = torch.ones(4, device="cuda")
        assert float(there.sum()) == 1 and there.cpu().shape == (4,)
        torch.ones(8).to("cuda", non_blocking=True)
        assert sum(seen.waits.values()) == 2 and seen.sent == 32
        with pytest.raises(RuntimeError, match="device"):
            there + torch.ones(4)
