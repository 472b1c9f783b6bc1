# SPDX-License-Identifier: Apache-2.0
"""From LoRA files to the merged file: this package against the paper's own runner, on the same model and prompts.

    python benchmarks/speed/end_to_end.py --paper SSR-Merge [--width 512] [--device cuda --dtype bfloat16]

The model is diffusers' Flux transformer with random weights. The paper's runner (github.com/nagara214/SSR-Merge) runs
unmodified; it copies the state dict, adds each LoRA to the weights and restores them. Ours does the same work on the
same calibration points (first row), then with context rows from a survey of one step of each prompt, then with a first
merge that is tried beside each LoRA at half of the steps, three at least. Every run is a process of its own, in turn;
importing and building the model are not counted. Memory is the peak of the process above what it had before, with the
model there. Linux, for /proc.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

import machine
import ssr_core
from diffusers_flux import Pipeline, transformer, write_lora
from timing import CLOCKS

SEED, CONTEXT = 42, 128
WAYS = ("paper", "ours, same work", "ours, context", "ours, context, refined")


def paper(pipe: Pipeline, files: list[str], prompts: list[str], steps: int, output: str) -> None:
    from ssr_merge import runners

    runners.run(pipe, pipe, files, prompts, output, calib_steps=steps, seed=SEED)


def ours(
    pipe: Pipeline,
    files: list[str],
    prompts: list[str],
    steps: int,
    output: str,
    context: int = 0,
    refine: bool = False,
) -> None:
    collector = ssr_core.StatisticsCollector([ssr_core.load_lora(file) for file in files])
    if context:
        for task, prompt in enumerate(prompts):
            with torch.no_grad(), collector.surveying(pipe.dit, task, context):
                pipe(prompt, SEED, 1)
        collector.see(context)
    for task, prompt in enumerate(prompts):
        with torch.no_grad(), collector.watching(pipe.dit, task):
            pipe(prompt, SEED, steps)
    merge = ssr_core.merge(collector.calibration())
    if refine:
        for task, prompt in enumerate(prompts):
            with torch.no_grad(), collector.refining(pipe.dit, task, merge.updates) as run:
                both(pipe, run, prompt, min(steps, max(3, -(-steps // 2))))  # as the nodes do
        merge = ssr_core.merge(collector.calibration())
    ssr_core.save_lora(merge.updates, output)


def both(pipe: Pipeline, run: Any, prompt: str, steps: int) -> None:
    """Each step with the LoRA alone, which goes on, and with the merge on the same latent."""
    latent = pipe.start(SEED)
    for step in range(steps):
        with run.alone():
            velocity = pipe.velocity(latent, prompt, 1 - step / steps)
        with run.merged():
            pipe.velocity(latent, prompt, 1 - step / steps)
        latent = latent - velocity / steps


def child(way: str, files: list[str], steps: int, options: argparse.Namespace, report: Any) -> None:
    """One run; sends seconds and bytes."""
    if options.paper:
        sys.path.append(str(options.paper))
    pipe = Pipeline(transformer(options.width, options.device, getattr(torch, options.dtype)), options.tokens)
    prompts = [f"prompt {number}" for number in range(len(files))]
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        pipe(prompts[0], SEED, 1)  # whatever happens once per process
        output = str(Path(folder) / "merged.safetensors")
        before = machine.memory_now(options.device)
        machine.synchronize(options.device)
        started = CLOCKS[options.clock]()
        if way == "paper":
            paper(pipe, files, prompts, steps, output)
        else:
            ours(pipe, files, prompts, steps, output, CONTEXT if "context" in way else 0, "refined" in way)
        machine.synchronize(options.device)
        report.send((CLOCKS[options.clock]() - started, machine.memory_peak(options.device) - before))


def run_child(context: Any, *arguments: Any) -> tuple[float, int]:
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=child, args=(*arguments, sender))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    finally:
        process.join()


def main() -> None:
    options = arguments()
    if options.paper is None:
        sys.exit("Give --paper, a checkout of github.com/nagara214/SSR-Merge: it is what is compared with.")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["diffusers_flux", "ssr_core"])
    print(machine.describe(options.device, options.dtype))
    print(f"width {options.width}, {options.tokens} tokens, LoRAs of rank {options.rank}, {options.clock} clock")
    print(f"{'LoRAs':>6} {'steps':>6}  {'':<24}{'seconds':>9}{'to paper':>10}{'peak MiB':>10}{'to paper':>10}")
    with tempfile.TemporaryDirectory() as folder:
        files = [str(Path(folder) / f"{number}.safetensors") for number in range(max(options.loras))]
        model = transformer(options.width)
        for number, file in enumerate(files):
            write_lora(Path(file), model, options.rank, number)
        del model
        for count in options.loras:
            for steps in options.steps:
                runs: dict[str, list[tuple[float, int]]] = {way: [] for way in WAYS}
                for repeat in range(options.repeats):
                    for way in WAYS[:: -1 if repeat % 2 else 1]:
                        runs[way].append(run_child(context, way, files[:count], steps, options))
                for way in WAYS:
                    print(row(count, steps, way, runs), flush=True)


def row(count: int, steps: int, way: str, runs: dict[str, list[tuple[float, int]]]) -> str:
    pairs = list(zip(runs[way], runs["paper"], strict=True))
    seconds, ratio = (statistics.median(v) for v in ([one[0] for one, _ in pairs], [a[0] / b[0] for a, b in pairs]))
    size, share = (statistics.median(v) for v in ([one[1] for one, _ in pairs], [a[1] / b[1] for a, b in pairs]))
    return f"{count:>6} {steps:>6}  {way:<24}{seconds:>9.2f}{ratio:>9.2f}x{size / 2**20:>10.0f}{share:>9.2f}x"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--paper", type=Path)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--loras", type=int, nargs="*", default=[2, 4])
    parser.add_argument("--steps", type=int, nargs="*", default=[1])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    return parser.parse_args()


if __name__ == "__main__":
    main()
