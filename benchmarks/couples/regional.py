# SPDX-License-Identifier: Apache-2.0
"""Regions: LoRAs that each write on their own half of the picture only, as masks of regional packs have it.

This is the oracle for two subjects in one picture: where each stands is known. Text and modulation belong to both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

TEXT, SIDE = 16, 8  # tokens of a caption, and of a row of the picture
BOTH = -1


def owners(module: str, tokens: int) -> Tensor:
    """(tokens,) which LoRA each token of a layer belongs to, by number; BOTH for text and modulation."""
    half = (torch.arange(SIDE * SIDE) % SIDE >= SIDE // 2).long()
    text = torch.full((TEXT,), BOTH)
    if tokens == SIDE * SIDE:
        return half
    if tokens == TEXT + SIDE * SIDE:
        return torch.cat([text, half])
    if tokens in (1, TEXT):
        return torch.full((tokens,), BOTH)
    raise ValueError(f"{module} saw {tokens} tokens")


@contextmanager
def regional(model: nn.Module, loras: Sequence[Any], collected: dict[str, list] | None = None) -> Iterator[None]:
    """`model` with LoRA k on half k; what its layers see is kept in `collected` by module, if given."""
    modules, handles = dict(model.named_modules()), []
    names = {site.module for lora in loras for site in lora.updates}
    for name in names:
        handles.append(modules[name].register_forward_hook(_hook(name, loras, collected)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(name: str, loras: Sequence[Any], collected: dict[str, list] | None) -> Any:
    own = [[(site, u) for site, u in lora.updates.items() if site.module == name] for lora in loras]

    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = args[0]
        rows = x if x.ndim == 3 else x[:, None]
        owner = owners(name, rows.shape[1])
        if collected is not None:
            collected.setdefault(name, []).append((rows.detach(), owner))
        written = output if output.ndim == 3 else output[:, None]
        for number, updates in enumerate(own):
            mask = ((owner == number) | (owner == BOTH)).to(rows.dtype)[None, :, None]
            for site, update in updates:
                written[..., site.start : site.stop] += mask * (rows @ update.down.mT.float() @ update.up.mT.float())
        return output

    return hook
