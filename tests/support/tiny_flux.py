"""A Flux-like model small enough for tests: random weights in the real layout, and LoRAs for it in three spellings.

Nothing here imports ComfyUI, so the same state dict can be loaded in this process or saved for a server.
No weight and no bias is zero: an untrained layer must not hide a mistake behind a factor of nothing.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

StateDict = dict[str, Tensor]
Spelling = Literal["generic", "kohya", "diffusers"]

HEAD = 128  # width of one attention head in Flux; the model's width is a multiple of it
CHANNELS = 16  # of the latent
CONTEXT, POOLED = 32, 16  # widths of the text encoders' token and pooled outputs


def flux_state_dict(
    width: int = 128, double_blocks: int = 1, single_blocks: int = 2, guidance: bool = False, seed: int = 0
) -> StateDict:
    """Weights that ComfyUI takes for Flux schnell, or with `guidance` (a guidance embedding) for Flux dev."""
    if width % HEAD:
        raise ValueError(f"the width of Flux is a multiple of {HEAD}, not {width}")
    generator = torch.Generator().manual_seed(seed)
    weights: StateDict = {}
    for name, (out, inner) in flux_linears(width, double_blocks, single_blocks, guidance).items():
        weights[f"{name}.weight"] = torch.randn(out, inner, generator=generator) / inner**0.5
        weights[f"{name}.bias"] = 0.1 * torch.randn(out, generator=generator)
    norms = [f"double_blocks.{i}.{side}_attn.norm" for i in range(double_blocks) for side in ("img", "txt")]
    norms += [f"single_blocks.{i}.norm" for i in range(single_blocks)]
    for norm in norms:
        for kind in ("query_norm", "key_norm"):
            weights[f"{norm}.{kind}.scale"] = 1 + 0.1 * torch.randn(HEAD, generator=generator)
    return weights


def flux_for_tiny_clip() -> StateDict:
    """`flux_state_dict()`, as wide where texts come in as the tiny text encoder's outputs."""
    weights = flux_state_dict()
    for name in ("txt_in", "vector_in.in_layer"):
        weights[f"{name}.weight"] = torch.randn(128, 64, generator=torch.Generator().manual_seed(9)) / 8
    return weights


def flux_linears(
    width: int = 128, double_blocks: int = 1, single_blocks: int = 2, guidance: bool = False
) -> dict[str, tuple[int, int]]:
    """{module name: (out, in)} of every linear layer."""
    linears = {
        "img_in": (width, 4 * CHANNELS),
        "txt_in": (width, CONTEXT),
        "time_in.in_layer": (width, 256),
        "time_in.out_layer": (width, width),
        "vector_in.in_layer": (width, POOLED),
        "vector_in.out_layer": (width, width),
    }
    if guidance:
        linears |= {"guidance_in.in_layer": (width, 256), "guidance_in.out_layer": (width, width)}
    for i in range(double_blocks):
        for side in ("img", "txt"):
            linears |= {
                f"double_blocks.{i}.{side}_mod.lin": (6 * width, width),
                f"double_blocks.{i}.{side}_attn.qkv": (3 * width, width),
                f"double_blocks.{i}.{side}_attn.proj": (width, width),
                f"double_blocks.{i}.{side}_mlp.0": (4 * width, width),
                f"double_blocks.{i}.{side}_mlp.2": (width, 4 * width),
            }
    for i in range(single_blocks):
        linears |= {
            f"single_blocks.{i}.linear1": (7 * width, width),
            f"single_blocks.{i}.linear2": (width, 5 * width),
            f"single_blocks.{i}.modulation.lin": (3 * width, width),
        }
    linears |= {
        "final_layer.linear": (4 * CHANNELS, width),
        "final_layer.adaLN_modulation.1": (2 * width, width),
    }
    return linears


def flux_lora(
    spelling: Spelling = "generic",
    width: int = 128,
    rank: int = 4,
    alpha: float | None = None,
    strength: float = 0.3,
    seed: int = 0,
    only: Callable[[str], bool] = lambda module: True,
) -> StateDict:
    """A LoRA file's content, random, for the attention, MLP and modulation layers of `flux_state_dict(width)`.

    generic: `diffusion_model.<module>.lora_A.weight`, as this pack saves; kohya: `lora_unet_<module>.lora_down.weight`;
    diffusers: `transformer.<diffusers module>.lora_A.weight` with q, k, v apart. Without `alpha` no alpha is written,
    which means alpha = rank. `strength` scales the update: at 1 its entries are as large as the weight's. `only`
    selects modules by their name in the spelling, for example `lambda module: "attn" in module`.
    """
    generator = torch.Generator().manual_seed(seed)
    linears = diffusers_linears(width) if spelling == "diffusers" else block_linears(width)
    down, up = ("lora_down", "lora_up") if spelling == "kohya" else ("lora_A", "lora_B")
    weights: StateDict = {}
    for module, (out, inner) in linears.items():
        if not only(module):
            continue
        name = {
            "generic": f"diffusion_model.{module}",
            "kohya": "lora_unet_" + module.replace(".", "_"),
            "diffusers": f"transformer.{module}",
        }[spelling]
        weights[f"{name}.{down}.weight"] = torch.randn(rank, inner, generator=generator) / inner**0.5
        weights[f"{name}.{up}.weight"] = strength * torch.randn(out, rank, generator=generator) / rank**0.5
        if alpha is not None:
            weights[f"{name}.alpha"] = torch.tensor(float(alpha))
    return weights


def block_linears(width: int) -> dict[str, tuple[int, int]]:
    return {name: shape for name, shape in flux_linears(width).items() if "_blocks." in name}


def diffusers_linears(width: int) -> dict[str, tuple[int, int]]:
    """The block layers under diffusers' names, where fused layers are apart (ComfyUI: `utils.flux_to_diffusers`)."""
    double, single = "transformer_blocks.0", "single_transformer_blocks"
    square, up, down = (width, width), (4 * width, width), (width, 4 * width)
    linears = {f"{double}.attn.{name}": square for name in ("to_q", "to_k", "to_v", "to_out.0")}
    linears |= {f"{double}.attn.{name}": square for name in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")}
    linears |= {f"{double}.{name}.net.0.proj": up for name in ("ff", "ff_context")}
    linears |= {f"{double}.{name}.net.2": down for name in ("ff", "ff_context")}
    linears |= {f"{double}.{name}.linear": (6 * width, width) for name in ("norm1", "norm1_context")}
    for i in range(2):
        linears |= {f"{single}.{i}.attn.{name}": square for name in ("to_q", "to_k", "to_v")}
        linears |= {
            f"{single}.{i}.proj_mlp": up,
            f"{single}.{i}.proj_out": (width, 5 * width),
            f"{single}.{i}.norm.linear": (3 * width, width),
        }
    return linears


def conditioning(seed: int = 0, tokens: int = 8) -> list[list]:
    """A ComfyUI CONDITIONING with random tokens (1, tokens, CONTEXT) and pooled output (1, POOLED)."""
    generator = torch.Generator().manual_seed(seed)
    cross_attention = torch.randn(1, tokens, CONTEXT, generator=generator)
    return [[cross_attention, {"pooled_output": torch.randn(1, POOLED, generator=generator)}]]


def empty_latent(height: int = 8, width: int = 8, batch: int = 1) -> dict[str, Tensor]:
    """A ComfyUI LATENT; height and width in latent pixels (two of them make a token's side)."""
    return {"samples": torch.zeros(batch, CHANNELS, height, width)}
