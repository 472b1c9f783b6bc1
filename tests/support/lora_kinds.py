"""LoRA files of every kind of adapter that ComfyUI reads, random, for a few layers of the tiny Flux."""

import torch
from torch import Tensor

from tiny_flux import StateDict

LAYERS = {
    "double_blocks.0.img_attn.proj": (128, 128),
    "double_blocks.0.txt_mlp.0": (512, 128),
    "single_blocks.1.linear2": (128, 640),
}
KINDS = ("loha", "lokr", "lokr factors", "glora", "dora", "loha dora", "oft", "boft", "difference")


def lora_of(kind: str, seed: int = 0, alpha: float | None = 3.0) -> StateDict:
    """One adapter of this kind for each of LAYERS, in the generic spelling."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int, size: float = 1.0) -> Tensor:
        return size * torch.randn(*shape, generator=generator)

    tensors: StateDict = {}
    for layer, (out, inputs) in LAYERS.items():
        parts = _parts(kind, out, inputs, random)
        if alpha is not None and kind != "difference":
            parts["alpha"] = torch.tensor(alpha)
        tensors |= {f"diffusion_model.{layer}.{end}": value for end, value in parts.items()}
    return tensors


def _parts(kind: str, out: int, inputs: int, random) -> StateDict:
    if kind in ("loha", "loha dora"):
        size = inputs**-0.25
        parts = {f"hada_w{i}_a": random(out, 3) for i in (1, 2)} | {
            f"hada_w{i}_b": random(3, inputs, size=size) for i in (1, 2)
        }
        return parts | ({"dora_scale": 1 + 0.3 * random(1, inputs).abs()} if "dora" in kind else {})
    if kind == "lokr":
        return {"lokr_w1": random(4, 8), "lokr_w2": random(out // 4, inputs // 8, size=0.05)}
    if kind == "lokr factors":
        left = {"lokr_w1_a": random(4, 2), "lokr_w1_b": random(2, 8)}
        return left | {"lokr_w2_a": random(out // 4, 2), "lokr_w2_b": random(2, inputs // 8, size=0.1)}
    if kind == "glora":
        first = {"a1.weight": random(inputs, 2, size=0.1), "a2.weight": random(2, inputs, size=0.1)}
        return first | {"b1.weight": random(out, 2), "b2.weight": random(2, inputs, size=0.1)}
    if kind == "dora":
        pair = {"lora_up.weight": random(out, 4), "lora_down.weight": random(4, inputs, size=inputs**-0.5)}
        return pair | {"dora_scale": 1 + 0.3 * random(out, 1).abs()}
    if kind == "oft":
        return {"oft_blocks": random(out // 8, 8, 8, size=0.2)}
    if kind == "boft":
        return {"oft_blocks": random(2, out // 8, 8, 8, size=0.2)}
    return {"diff": random(out, inputs, size=0.3 * inputs**-0.5)}
