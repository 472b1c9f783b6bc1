"""Sketch: the principal directions of what a layer sees, from one pass and in bounded memory.

The router sees only z = down x, which is often blind to which task a token belongs to. A few more rows of `down`, along
the directions in which the layer's inputs vary most, let it see; they write nothing.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

OVERSAMPLING = 16


class Sketch:
    """Nystrom sketch of C = sum of x x^T (Tropp et al. 2017, "Fixed-rank approximation of a PSD matrix from streaming
    data"): keeps C Omega for a fixed random Omega, (in, rank + oversampling), never C itself.
    """

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.tokens = 0
        self._range: Tensor | None = None
        self._test: Tensor | None = None  # on the device of the tokens, so that updating copies nothing there

    def update(self, x: Tensor) -> None:
        """Add tokens. x: (tokens, in), floating point."""
        if self._test is None or (self._test.device, self._test.dtype) != (x.device, x.dtype):
            self._test = test_matrix(x.shape[1], self.rank + OVERSAMPLING).to(x.device, x.dtype)
        product = x.mT @ (x @ self._test)
        self._range = product if self._range is None else self._range + product
        self.tokens += x.shape[0]

    def mean(self) -> Tensor:
        """C Omega / tokens, (in, rank + oversampling) float64: of several sketches of one layer these add up."""
        assert self._range is not None
        return self._range.to("cpu", torch.float64) / max(self.tokens, 1)


@cache
def test_matrix(width: int, columns: int) -> Tensor:
    """Omega, (width, min(width, columns)): random, orthonormal, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(width, min(width, columns), generator=generator, dtype=torch.float64)
    return torch.linalg.qr(normal)[0].float()


def principal_rows(sketched: Tensor, rank: int) -> Tensor:
    """The leading eigenvectors of C as rows, at most (rank, in), float32 orthonormal, from C Omega."""
    test = test_matrix(*sketched.shape).double()
    # a small shift keeps the core positive definite and leaves the eigenvectors as they are
    shift = torch.finfo(torch.float32).eps * sketched.norm().clamp_min(torch.finfo(torch.float32).tiny)
    shifted = sketched + shift * test
    core = test.mT @ shifted
    factor = torch.linalg.cholesky((core + core.mT) / 2)
    basis = torch.linalg.solve_triangular(factor, shifted.mT, upper=False).mT
    return torch.linalg.svd(basis, full_matrices=False)[0][:, :rank].mT.float().contiguous()
