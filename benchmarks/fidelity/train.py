# SPDX-License-Identifier: Apache-2.0
"""Trains what the fidelity benchmark measures: a base model of a given width, and eight LoRAs for it.

    COMFYUI_PATH=/path/to/ComfyUI python benchmarks/fidelity/train.py --width 384

At width 256 the base model is the demo's own. What exists already is not trained again, so an interrupted run goes on
where it was.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "demo"))

import cast  # noqa: E402
import torch  # noqa: E402
import world  # noqa: E402
from torch import nn  # noqa: E402
from training import diffusion, lora, storage  # noqa: E402
from training.autoencoder import keeper  # noqa: E402

DEMO_WIDTH = diffusion.CONFIG["hidden_size"]
HEAD = 128  # channels of an attention head of Flux
BASE = "base"


def folder_of(width: int) -> Path:
    return ROOT / ".cache" / "fidelity" / str(width)


def config(width: int) -> dict:
    """The demo's model at another width, with more blocks where they are small."""
    blocks = 5 if width == HEAD else diffusion.CONFIG["depth_single_blocks"]
    return {**diffusion.CONFIG, "hidden_size": width, "num_heads": width // HEAD, "depth_single_blocks": blocks}


def base_model(width: int) -> nn.Module:
    return diffusion.base_model(BASE, folder_of(width), config(width))


def train_base(width: int, steps: int, batch: int) -> None:
    model, unfinished = diffusion.new_model(config(width)), f"{BASE}.unfinished"
    keep = keeper(unfinished, model, folder=folder_of(width), steps=steps)
    diffusion.teach(model, world.ordinary_scenes("", world.CENTRED), steps, batch, 2e-3, keep)
    (folder_of(width) / f"{unfinished}.safetensors").rename(folder_of(width) / f"{BASE}.safetensors")


def train_lora(width: int, recipe: lora.Recipe, batch: int) -> None:
    last: dict = {}
    lora.teach_lora(base_model(width), recipe, batch, last.update)
    lora.save_lora(recipe, last, folder_of(width))


def provide_base(width: int, steps: int, batch: int) -> None:
    """The demo's model at its width, else one of our own."""
    target = folder_of(width) / f"{BASE}.safetensors"
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    if width == DEMO_WIDTH:
        shutil.copy(storage.ASSETS / "tiny_flux.safetensors", target)
    else:
        torch.manual_seed(0)
        train_base(width, steps, batch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=384, help="channels of the model, a multiple of 128")
    parser.add_argument("--base-steps", type=int, default=1100)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--loras", nargs="*", help="names of LoRAs; all of them if none is given")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    cast.join_world()
    recipes = cast.recipes()
    provide_base(args.width, args.base_steps, args.batch)
    for name in args.loras or [*cast.HELD_OUT, *cast.TUNING]:
        if not (folder_of(args.width) / f"{recipes[name].file}.safetensors").exists():
            train_lora(args.width, recipes[name], args.batch)


if __name__ == "__main__":
    main()
