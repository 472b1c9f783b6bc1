# SPDX-License-Identifier: Apache-2.0
"""What measuring costs next to plain sampling: forward passes of ComfyUI's own Flux at its real width.

    COMFYUI_PATH=... python benchmarks/speed/collect.py [--paper SSR-Merge] [--device cuda --dtype bfloat16]

Four ways to run the same blocks on the same tokens: the plain model; the model with one LoRA added to the
weights, as ComfyUI's loader leaves them; this package's recording, in which that LoRA is active and the statistics of
all LoRAs are summed; the paper's
collector (`--paper`, a checkout of github.com/nagara214/SSR-Merge), with the LoRA patched in, as its runner does it.
Each repetition runs all four, in turn; the table has medians of seconds and of the ratios to the plain model.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "fidelity"))

import host  # isort: skip  (puts ComfyUI on the path)

import comfy.ldm.flux.model
import comfy.ops

core = host.ssr_core
CASES = ((2, 32, 0), (2, 32, 64), (2, 32, 128), (4, 16, 64), (8, 16, 64), (2, 128, 64))  # LoRAs, rank, context rows
TEXT_TOKENS = 256


def flux(width: int, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
    """One double and one single block, with random weights."""
    torch.manual_seed(0)
    model = comfy.ldm.flux.model.Flux(
        in_channels=16, out_channels=16, vec_in_dim=768, context_in_dim=4096, hidden_size=width, mlp_ratio=4.0,
        num_heads=width // 128, depth=1, depth_single_blocks=1, axes_dim=[16, 56, 56], theta=10000, patch_size=2,
        qkv_bias=True, guidance_embed=False, txt_ids_dims=[], dtype=dtype, device=device,
        operations=comfy.ops.disable_weight_init,
    )  # fmt: skip
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.02)
    return model.eval().requires_grad_(False)


def inputs(tokens: int, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Latent, time, text and pooled text for an image of so many tokens."""
    side = 2 * round(tokens**0.5)
    shapes = ((1, 16, side, side), (1,), (1, TEXT_TOKENS, 4096), (1, 768))
    return tuple(torch.randn(shape, device=device).to(dtype) for shape in shapes)


def make_loras(model: torch.nn.Module, count: int, rank: int) -> list[Any]:
    torch.manual_seed(1)
    layers = {
        name: module.weight.shape
        for name, module in model.named_modules()
        if "blocks." in name and getattr(module, "weight", None) is not None and module.weight.ndim == 2
    }
    return [
        core.Lora(
            str(task),
            {
                core.Site.whole(name, out): core.LowRankUpdate(
                    torch.randn(rank, wide) / wide**0.5, torch.randn(out, rank) * 0.02
                )
                for name, (out, wide) in layers.items()
            },
        )
        for task in range(count)
    ]


class Patched:
    """The LoRA in the weights, which is what ComfyUI's loader leaves the model with while it samples."""

    def __init__(self, model: torch.nn.Module, lora: Any) -> None:
        self.layers = dict(model.named_modules())
        self.lora = lora

    def __enter__(self) -> None:
        self.saved = {site.module: self.layers[site.module].weight.data for site in self.lora.updates}
        for site, update in self.lora.updates.items():
            weight = self.layers[site.module].weight
            weight.data = weight + update.dense().to(weight)

    def __exit__(self, *_: object) -> None:
        for name, weight in self.saved.items():
            self.layers[name].weight.data = weight


def measure(model: Any, args: Sequence[torch.Tensor], loras: Sequence[Any], context: int, repeats: int, paper: Any):
    """Seconds of each way, one list each."""
    device = args[0].device

    def timed(around: Callable[[], Any] | None = None) -> float:
        manager = around() if around else None
        if manager:
            manager.__enter__()
        synchronize(device)
        started = time.perf_counter()
        model(args[0], args[1], args[2], args[3])
        synchronize(device)
        elapsed = time.perf_counter() - started
        if manager:
            manager.__exit__(None, None, None)
        return elapsed

    collector = core.StatisticsCollector(loras)
    if context:
        with collector.surveying(model, 0, context):
            model(*args)
        collector.see(context)
    found: dict[str, list[float]] = {}
    with torch.inference_mode(), collector.recording(0) as recording:

        class Watched:
            def __enter__(self) -> None:
                recording.attach(model)

            def __exit__(self, *_: object) -> None:
                recording.detach()

        ways: dict[str, Any] = {"plain": None, "loader": lambda: Patched(model, loras[0]), "ours": Watched}
        if paper is not None:
            pairs = [{s.module: (u.down, u.up) for s, u in lora.updates.items()} for lora in loras]
            merger = paper.SSRMerger(pairs)
            merger.set_active_task(0)

            class Paper(Patched):
                def __enter__(self) -> None:
                    super().__enter__()
                    merger.attach({n: m for n, m in model.named_modules() if n in merger.layer_stats})

                def __exit__(self, *_: object) -> None:
                    merger.detach()
                    super().__exit__()

            ways["paper"] = lambda: Paper(model, loras[0])
        for repeat in range(repeats + 1):
            for name, around in ways.items():
                seconds = timed(around)
                if repeat:  # the first one warms up
                    found.setdefault(name, []).append(seconds)
    return found


def ratio(times: Sequence[float], baseline: Sequence[float]) -> float:
    """Median of the ratios within each repetition."""
    return statistics.median(t / b for t, b in zip(times, baseline, strict=True))


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=3072)
    parser.add_argument("--tokens", type=int, nargs="*", default=[1024])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--paper", type=Path)
    parser.add_argument("--cases", type=int, default=len(CASES), help="only so many of the cases")
    options = parser.parse_args()
    paper = None
    if options.paper:
        sys.path.insert(0, str(options.paper))
        from ssr_merge import core as paper  # type: ignore[no-redef,import-not-found]
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{platform.machine()}, {name}, torch {torch.__version__}, {options.dtype}, width {options.width}")
    print(
        f"{'tokens':>7} {'LoRAs x rank':>13} {'context':>8}   "
        + "".join(f"{w:>18}" for w in ("plain", "loader", "ours", "paper"))
    )
    model = flux(options.width, device, dtype)
    for tokens in options.tokens:
        args = inputs(tokens, device, dtype)
        for count, rank, context in CASES[: options.cases]:
            found = measure(model, args, make_loras(model, count, rank), context, options.repeats, paper)
            cells = [
                f"{statistics.median(times):8.3f} s {ratio(times, found['plain']):6.3f}x" for times in found.values()
            ]
            print(
                f"{tokens:>7} {f'{count} x {rank}':>13} {context:>8}   " + "".join(f"{c:>18}" for c in cells),
                flush=True,
            )


if __name__ == "__main__":
    main()
