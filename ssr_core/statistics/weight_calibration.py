"""Weight calibration: what LoRAs' weights alone let one expect of the layers' signals, for a merge without a model.

A LoRA is trained on what its layers see, so it reads what is there: the rows of its update W_k stand for its inputs, as
in WUDI-Merging (Cheng et al., arXiv 2503.08099) and ACE-Merging (arXiv 2603.02945). Most of an input it does not read;
that part is taken to be alike for all LoRAs and in all directions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import LoraError
from ..lora.lora import Lora
from ..lora.subspace import Subspace, join_loras
from ..parallel import each
from .calibration import Calibration
from .grams import NOTHING, Grams, pack
from .sufficient_statistics import SufficientStatistics

UNREAD = 10.0  # how much more of a layer's input a LoRA passes over than it reads; of 0 to 1000 tried on small models


def weight_calibration(loras: Sequence[Lora]) -> Calibration:
    """A calibration that nothing was run for, as if each LoRA had seen one token in one sample.

    So little is trusted by the ridge about as much as the mean of the LoRAs. A layer of one LoRA only stays as it is.

    Raises:
        LoraError: there is nothing to merge, or LoRAs disagree about the size of a layer.
    """
    spaces = join_loras(loras) if loras else {}
    if not spaces:
        raise LoraError("There is no LoRA to merge, or none holds a low-rank update.")
    routed = [site for site, space in spaces.items() if space.is_routed]
    expected = dict(zip(routed, each(lambda site: _expected(spaces[site]), routed), strict=True))
    return Calibration(tuple(loras), spaces, expected, measured=False)


def _expected(space: Subspace) -> SufficientStatistics:
    """G_k = A (W_k^T W_k / |W_k|^2 + UNREAD I / in) A^T, with A the joint `down` and in the layer's inputs."""
    down = space.down.flatten(1).float().cpu()
    products = (down @ down.mT).double()
    grams = [NOTHING] * len(space.ranks)
    for task in space.present:
        grams[task] = pack(_read(space, products, space.blocks[task]) + products * (UNREAD / down.shape[1]))
    seen = tuple(int(rank > 0) for rank in space.ranks)
    return SufficientStatistics(Grams(len(down), tuple(grams)), seen, space.fingerprint)


def _read(space: Subspace, products: Tensor, block: slice) -> Tensor:
    """A W_k^T W_k A^T / |W_k|^2, from down_k = A's rows of the LoRA and up_k^T up_k; zero of an update that is zero."""
    energy, shared = space.energy[block, block], products[:, block]
    norm = (energy * products[block, block]).sum()
    return shared @ energy @ shared.mT / norm.clamp_min(torch.finfo(torch.float64).tiny)
