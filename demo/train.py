# SPDX-License-Identifier: Apache-2.0
"""Trains everything in demo/assets from nothing, on a CPU, with ComfyUI's own modules.

    COMFYUI_PATH=/path/to/ComfyUI python demo/train.py                            # all of it, in two hours on 2 cores
    COMFYUI_PATH=/path/to/ComfyUI python demo/train.py lora:mochi lora:robo       # some of it, on top of what is there

Steps, in the order in which they depend on each other: components (the latent space), text (a frozen random text
encoder), decoder, encoder, base, finish, narrow, lora:mochi, lora:robo, lora:sepia. Seeds are fixed; another
machine's rounding still leads to other, equally good weights.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from functools import partial

import torch
from training import autoencoder, captions, diffusion, lora


def training_steps(args: argparse.Namespace) -> dict[str, Callable[[], None]]:
    return {
        "components": autoencoder.fit_components,
        "text": captions.draw_text_encoder,
        "decoder": partial(autoencoder.train_decoder, args.decoder_steps),
        "encoder": partial(autoencoder.train_encoder, args.encoder_steps),
        "base": partial(diffusion.train_base, args.base_steps, args.batch),
        "finish": partial(diffusion.finish_base, args.finish_steps, args.batch),
        "narrow": diffusion.narrow_base,
        **{f"lora:{name}": partial(lora.train_lora, name, args.lora_batch) for name in lora.RECIPES},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="*", metavar="STEP", help="which steps to take; all of them if none is named")
    parser.add_argument("--decoder-steps", type=int, default=800)
    parser.add_argument("--encoder-steps", type=int, default=200)
    parser.add_argument("--base-steps", type=int, default=2200)
    parser.add_argument("--finish-steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lora-batch", type=int, default=16)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    steps = training_steps(args)
    if unknown := sorted(set(args.steps) - set(steps)):
        parser.error(f"no such step: {', '.join(unknown)}; there are {', '.join(steps)}")
    for name in args.steps or steps:
        torch.manual_seed(0)
        steps[name]()


if __name__ == "__main__":
    main()
