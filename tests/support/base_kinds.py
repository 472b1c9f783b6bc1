"""Forms of base that tests of several kinds run on: cast, computed, quantized, offloaded, with a LoRA on it already."""

from contextlib import ExitStack
from typing import Any

import torch

import bases
from bases import Base
from run_nodes import load_lora
from tiny_flux import flux_lora, flux_state_dict

SPEED = flux_lora("generic", rank=2, seed=9)  # one that is on the base already


def plain() -> Any:
    return bases.load(flux_state_dict())


def kept_in(dtype: torch.dtype) -> Base:
    """Narrow weights that are cast to float32 when a layer runs."""
    return bases.of(bases.load(flux_state_dict(), dtype=dtype))


def computed_in(dtype: torch.dtype, **device: bool) -> Base:
    with bases.a_device_that(**device):
        model = bases.load({key: one.to(dtype) for key, one in flux_state_dict().items()}, dtype=dtype)
    return bases.of(model)


def quantized(form: str, **device: bool) -> Base:
    with bases.a_device_that(**device):
        model = bases.load(bases.QUANTIZED[form]())
    return bases.of(model)


def offloaded(base: Base, stack: ExitStack) -> Base:
    stack.enter_context(bases.room_for(base.model, 0.5))
    return base


def carrying_a_lora(base: Base) -> Base:
    """Where ComfyUI adds it to a weight without rounding."""
    return Base(*(load_lora(model, SPEED, 0.7) for model in (base.model, base.exact)))


def gguf(kind: str) -> Base:
    return bases.of(bases.load_gguf(kind))
