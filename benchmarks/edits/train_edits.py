# SPDX-License-Identifier: Apache-2.0
"""Trains what the benchmark of edits measures: the demo's model, taught to change a picture, and a LoRA per edit.

    COMFYUI_PATH=/path/to/ComfyUI python benchmarks/edits/train_edits.py

The picture is seen as Flux Kontext sees it, as a reference latent. What exists already is not trained again.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "demo"), str(Path(__file__).parent)]

import edits  # noqa: E402
import torch  # noqa: E402
import training  # noqa: E402, F401  (puts ComfyUI on the path)
from torch import Tensor, nn  # noqa: E402
from torch.nn import functional  # noqa: E402
from training import diffusion, lora  # noqa: E402
from training.autoencoder import keeper, latents_of, pixels_of  # noqa: E402
from training.captions import Captions, stray_words  # noqa: E402

FOLDER = ROOT / ".cache" / "edits"
BASE = "base"
METHOD = "index"  # how the tokens of the reference are told from the picture's: by the first of their three positions


@dataclass(frozen=True)
class Lesson:
    """Latents of all pictures (N, 16, 16, 16); example n is `captions` n with pictures before[n] and after[n]."""

    latents: Tensor
    before: Tensor
    after: Tensor
    captions: Captions

    @classmethod
    def on(cls, examples: Sequence[edits.Example]) -> Lesson:
        every = [picture for example in examples for picture in (example.before, example.after)]
        number = {picture: n for n, picture in enumerate(dict.fromkeys(every))}
        pairs = torch.tensor([number[picture] for picture in every]).view(-1, 2)
        captions = Captions.encode([example.text for example in examples])
        return cls(latents_of(pixels_of(list(number))), pairs[:, 0], pairs[:, 1], captions)

    def loss(self, model: nn.Module, batch: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Mean squared error of the velocity over a random batch with stratified noise levels."""
        n = torch.randint(len(self.before), (batch,))
        x, noise = self.latents[self.after[n]], torch.randn(batch, *self.latents.shape[1:])
        sigma = (torch.randperm(batch) + torch.rand(batch)) / batch
        noisy = torch.lerp(x, noise, sigma.view(-1, 1, 1, 1))
        told = (self.captions.tokens[n], self.captions.pooled[n], self.latents[self.before[n]])
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            velocity = velocity_of(model, noisy, sigma, *told)
        return functional.mse_loss(velocity.float(), noise - x)


def velocity_of(model: nn.Module, x: Tensor, sigma: Tensor, tokens: Tensor, pooled: Tensor, seen: Tensor) -> Tensor:
    """Of noisy latents x (n, 16, 16, 16) with the pictures that are edited, as many."""
    return model(x, sigma, tokens, y=pooled, ref_latents=[seen], ref_latents_method=METHOD)


def teach_base(steps: int, batch: int) -> None:
    model = diffusion.base_model()
    course = Lesson.on(list(edits.of_base(6000, stray_words(1500), seed=1)))
    keep = keeper(f"{BASE}.unfinished", model, folder=FOLDER, steps=steps)
    diffusion.fit(model, lambda: course.loss(model, batch, torch.bfloat16), steps, 1.5e-3, keep)
    (FOLDER / f"{BASE}.unfinished.safetensors").rename(FOLDER / f"{BASE}.safetensors")


def teach_lora(name: str, steps: int, batch: int, seed: int) -> None:
    recipe = lora.Recipe(name, edits.EDITS[name].wordings[0], 8, lora.native_file, lambda _: iter(()), steps, seed)
    torch.manual_seed(seed)
    model = diffusion.base_model(BASE, FOLDER)
    course = Lesson.on(list(edits.of_lora(name, 400, seed=7)))
    last: dict = {}
    lora.fit(model, recipe, lambda: course.loss(model, batch, torch.bfloat16), last.update)
    lora.save_lora(recipe, last, FOLDER)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-steps", type=int, default=1200)
    parser.add_argument("--lora-steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=16)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    FOLDER.mkdir(parents=True, exist_ok=True)
    if not (FOLDER / f"{BASE}.safetensors").exists():
        torch.manual_seed(0)
        teach_base(args.base_steps, args.batch)
    for number, name in enumerate(edits.EDITS):
        if not (FOLDER / f"{name}.safetensors").exists():
            teach_lora(name, args.lora_steps, args.batch, 40 + number)


if __name__ == "__main__":
    main()
