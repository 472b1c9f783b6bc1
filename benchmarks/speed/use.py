# SPDX-License-Identifier: Apache-2.0
"""What a merge costs when it is used: sampling with one LoRA, with K stacked ones, with their merge at the size of one.

    COMFYUI_PATH=... [COMFYUI_GGUF_PATH=...] python benchmarks/speed/use.py [--width 768]

In a real ComfyUI, on its own Flux with random weights, in turn; putting LoRAs on the model is not measured. Patched:
ComfyUI adds them to the weights, so that sampling costs the same with any number. Bypass: it computes them beside each
layer; it keeps one file at a time in this way, so the stack is one file of the joint rank. GGUF: ComfyUI-GGUF adds them
to weights that it unpacks for every call. Ratios are to one LoRA.
"""

from __future__ import annotations

import argparse
import importlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

import machine
from ssr_core import Lora, LowRankUpdate, MergeSettings, Site, StatisticsCollector, merge
from ssr_core.files.lora_file import to_state_dict
from ssr_core.lora.subspace import join_loras
from timing import CLOCKS, Way, interleaved
from tiny_flux import conditioning, empty_latent, flux_linears, flux_state_dict

STEPS, SIDE, TEXT_TOKENS = 2, 32, 64  # SIDE of the latent, two of which make a token's
State = Mapping[str, Tensor]
Load = Callable[[Any, State], Any]


def main() -> None:
    options = arguments()
    machine.start_comfyui(options.device)
    importlib.import_module("comfy.utils").PROGRESS_BAR_ENABLED = False
    print(machine.describe(options.device))
    print(f"width {options.width}, rank {options.rank}, {options.clock} clock, medians of {options.repeats}")
    print(f"{'LoRAs':>6}  {'base and loader':<16}" + "".join(f"{way:>20}" for way in ("one", "stacked", "merged")))
    for name, (model, load) in bases(options.width).items():
        for count in options.loras:
            tasks = random_loras(count, options.rank, options.width)
            one, stack, merged = (
                [tasks[0].updates],
                [task.updates for task in tasks],
                [merged_of(model, tasks, options.rank)],
            )
            if name == "bypass":
                stack = [{site: space.plain_stack() for site, space in join_loras(tasks).items()}]
            models = {"one": one, "stacked": stack, "merged": merged}
            ways = {way: way_of(with_all(model, load, files)) for way, files in models.items()}
            times = interleaved(ways, options.repeats, options.device, options.clock)
            print(f"{count:>6}  {name:<16}" + "".join(f"{times.cell(way):>20}" for way in ways), flush=True)


def bases(width: int) -> dict[str, tuple[Any, Load]]:
    """By name: a ModelPatcher and what puts a LoRA on it."""
    sd = importlib.import_module("comfy.sd")
    with torch.inference_mode():
        plain = sd.load_diffusion_model_state_dict(flux_state_dict(width))
    found: dict[str, tuple[Any, Load]] = {
        "patched": (plain, partial(on, sd.load_lora_for_models)),
        "bypass": (plain, partial(on, sd.load_bypass_lora_for_models)),
    }
    if os.environ.get("COMFYUI_GGUF_PATH"):
        load_gguf = importlib.import_module("bases").load_gguf
        found["GGUF Q8_0"] = (load_gguf("Q8_0", width), partial(on, sd.load_lora_for_models))
    return found


def on(load: Any, model: Any, state: State) -> Any:
    return load(model, None, dict(state), 1.0, 0)[0]


def with_all(model: Any, load: Load, files: Sequence[Mapping[Site, LowRankUpdate]]) -> Any:
    for updates in files:
        model = load(model, to_state_dict(updates, ""))
    return model


def way_of(model: Any) -> Way:
    return Way(partial(sample, model), partial(loaded, model))


@contextmanager
def loaded(model: Any) -> Iterator[None]:
    """The LoRAs of another ModelPatcher are off the weights, and those of this one on."""
    with torch.inference_mode():
        importlib.import_module("comfy.model_management").load_models_gpu([model])
    yield


def sample(model: Any) -> Tensor:
    nodes = importlib.import_module("nodes")
    prompt = conditioning(0, TEXT_TOKENS)
    with torch.inference_mode():
        latent = empty_latent(SIDE, SIDE)
        return nodes.common_ksampler(model, 0, STEPS, 1.0, "euler", "simple", prompt, prompt, latent)[0]["samples"]


def random_loras(count: int, rank: int, width: int) -> list[Lora]:
    """On all layers of the blocks."""
    torch.manual_seed(0)
    layers = {name: shape for name, shape in flux_linears(width).items() if "_blocks." in name}
    return [
        Lora(
            str(task),
            {
                Site.whole(f"diffusion_model.{name}", out): LowRankUpdate(
                    torch.randn(rank, inner) / inner**0.5, torch.randn(out, rank) * 0.02
                )
                for name, (out, inner) in layers.items()
            },
        )
        for task in range(count)
    ]


def merged_of(model: Any, tasks: Sequence[Lora], rank: int) -> Mapping[Site, LowRankUpdate]:
    """Their merge at the rank of one, as many numbers as one LoRA has."""
    collector = StatisticsCollector(tasks)
    for task in range(len(tasks)):
        with collector.watching(model.model, task):
            sample(model)
    return merge(collector.calibration(), MergeSettings(rank=rank)).updates


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--loras", type=int, nargs="*", default=[2, 4])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    return parser.parse_args()


if __name__ == "__main__":
    main()
