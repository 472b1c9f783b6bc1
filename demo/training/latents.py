# SPDX-License-Identifier: Apache-2.0
"""The latent space: principal components of 8 x 8 x 3 patches, scaled towards unit variance."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

PATCH = 8
CHANNELS = 16
WHITENING = 0.6  # 0 leaves the components' variances as they are, 1 makes all of them equal


def patches_of(pixels: Tensor) -> Tensor:
    """(N, 3, H, W) in [0, 1] -> (N, H / 8, W / 8, 192)"""
    n, c, h, w = pixels.shape
    grid = pixels.reshape(n, c, h // PATCH, PATCH, w // PATCH, PATCH)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(n, h // PATCH, w // PATCH, -1)


@dataclass(frozen=True)
class PatchComponents:
    """z = (patch - mean) @ components: what the diffusion model works on."""

    mean: Tensor  # (192,)
    components: Tensor  # (192, 16), scaled

    @classmethod
    def fit(cls, pixels: Tensor) -> PatchComponents:
        """The 16 directions of largest variance; together they have mean square 1."""
        patches = patches_of(pixels).reshape(-1, 3 * PATCH * PATCH).double()
        mean = patches.mean(0)
        variances, directions = torch.linalg.eigh((patches - mean).T @ (patches - mean) / len(patches))
        deviations = variances.flip(0)[:CHANNELS].sqrt()
        scale = deviations**-WHITENING
        scale = scale / (scale * deviations).square().mean().sqrt()
        return cls(mean.float(), (directions.flip(1)[:, :CHANNELS] * scale).float())

    def encode(self, pixels: Tensor) -> Tensor:
        """(N, 3, H, W) in [0, 1] -> (N, 16, H / 8, W / 8)"""
        return ((patches_of(pixels) - self.mean) @ self.components).permute(0, 3, 1, 2).contiguous()

    def decode(self, latents: Tensor) -> Tensor:
        """(N, 16, H / 8, W / 8) -> (N, 3, H, W): of all pictures with these latents the one of least norm."""
        patches = latents.permute(0, 2, 3, 1) @ torch.linalg.pinv(self.components) + self.mean
        n, rows, columns, _ = patches.shape
        grid = patches.reshape(n, rows, columns, 3, PATCH, PATCH).permute(0, 3, 1, 4, 2, 5)
        return grid.reshape(n, 3, rows * PATCH, columns * PATCH)
