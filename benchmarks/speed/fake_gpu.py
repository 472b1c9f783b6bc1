# SPDX-License-Identifier: Apache-2.0
"""What collecting does on a GPU, counted without one: kernels, waits of the host, copies and memory at real sizes.

    python benchmarks/speed/fake_gpu.py [--loras 2 --rank 16] [--file-dtype float16]

All layers of Flux at their size, one after the other, on tensors of a device "cuda" that is not there (torch's
FakeTensorMode). Only what this package adds is counted. "Told" is what `Requirement` says before.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[2] / "tests" / "support")]

import torch  # noqa: E402
from fake_cuda import FakeCuda, fake_cuda  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from flux_sizes import DOUBLE, SINGLE  # noqa: E402
from ssr_core import Lora, LowRankUpdate, Site, StatisticsCollector, Subspace  # noqa: E402

TOKENS = {"image": 4096, "text": 512, "both": 4608, "vector": 1}
CONTEXT, COUNTED = 128, 1024


class Layers(nn.Module):
    """The linear layers of Flux, each with the number of tokens that it sees."""

    def __init__(self, blocks: tuple[int, int], dtype: torch.dtype) -> None:
        super().__init__()
        self.tokens: list[int] = []
        self.layers = nn.ModuleList()
        for stream in ("image", "text"):
            for out, inputs in DOUBLE * blocks[0]:
                self._add(out, inputs, "vector" if out == 6 * inputs else stream, dtype)
        for out, inputs in SINGLE * blocks[1]:
            self._add(out, inputs, "vector" if out == 3 * inputs else "both", dtype)

    def _add(self, out: int, inputs: int, stream: str, dtype: torch.dtype) -> None:
        self.layers.append(nn.Linear(inputs, out, dtype=dtype))
        self.tokens.append(TOKENS[stream])

    @torch.no_grad()
    def forward(self, x: Tensor) -> None:
        for layer, tokens in zip(self.layers, self.tokens, strict=True):
            layer(x[None, :tokens, : layer.in_features].clone())


def lora(number: int, sites: dict[Site, int], rank: int, dtype: torch.dtype) -> Lora:
    def factor(*shape: int) -> Tensor:
        return torch.full(shape, 1 / 3).to(dtype) + number

    updates = {s: LowRankUpdate(factor(rank, inputs), factor(s.out_features, rank)) for s, inputs in sites.items()}
    return Lora(str(number), updates)


def with_context(spaces: dict[Site, Subspace]) -> dict[Site, Subspace]:
    return {s: space.with_context(torch.ones(CONTEXT, space.down.shape[1])) for s, space in spaces.items()}


def main() -> None:
    options = arguments()
    dtype, file_dtype = getattr(torch, options.dtype), getattr(torch, options.file_dtype)
    print(f"Flux, {options.loras} x {options.rank} in {options.file_dtype} on {options.dtype}, context {CONTEXT}")
    print(f"{'':22}{'kernels':>9}{'waits':>7}{'sent MB':>9}{'live GB':>9}{'peak GB':>9}{'told GB':>9}")
    with fake_cuda() as seen:
        with torch.device("cuda"):
            model = Layers(tuple(options.blocks), dtype)
        sites = {Site.whole(f"layers.{n}", one.out_features): one.in_features for n, one in enumerate(model.layers)}
        loras = [lora(number, sites, options.rank, file_dtype) for number in range(options.loras)]
        x = torch.empty(max(TOKENS.values()), 16384, device="cuda", dtype=dtype)
        show = Table(seen, lambda: model(x))
        collector = StatisticsCollector(loras)
        told = collector.requirement(CONTEXT, dtype=dtype).device
        with collector.recording(0, CONTEXT, COUNTED) as run:
            run.attach(model)
            show("survey", told)
        collector = StatisticsCollector(loras, with_context(collector.subspaces))
        with collector.recording(0, 0, COUNTED) as run:
            run.attach(model)
            show("measuring", collector.requirement(dtype=dtype).device)
        stack = {site: space.plain_stack() for site, space in collector.subspaces.items()}
        with collector.refinement(0, stack) as run:
            run.attach(model)
            show("refining", collector.requirement(refine=True, dtype=dtype).device, run.alone, run.merged)


class Table:
    """A row for each forward pass, of what is beside the model's own."""

    def __init__(self, seen: FakeCuda, forward: Callable[[], None]) -> None:
        self._seen, self._forward = seen, forward
        seen.reset()
        base = seen.live
        forward()
        self._kernels, self._model, self._activations = seen.launches, base, seen.peak - base

    def __call__(self, name: str, told: int, *branches: Any) -> None:
        for number in (1, 2):
            for branch in branches or (None,):
                self._seen.reset()
                if branch is None:
                    self._forward()
                else:
                    with branch():
                        self._forward()
                label = f"{name}{f', {branch.__name__}' if branch else ''}, {number}."
                seen, own = self._seen, self._seen.live - self._model
                peak = max(own, seen.peak - self._model - self._activations)
                print(
                    f"{label:22}{seen.launches - self._kernels:>9}{sum(seen.waits.values()):>7}{seen.sent / 1e6:>9.0f}"
                    f"{own / 1e9:>9.2f}{peak / 1e9:>9.2f}{told / 1e9:>9.2f}",
                    flush=True,
                )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--loras", type=int, default=2)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--file-dtype", default="bfloat16")
    parser.add_argument("--blocks", type=int, nargs=2, default=[19, 38])
    return parser.parse_args()


if __name__ == "__main__":
    main()
