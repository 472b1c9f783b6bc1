"""Sketch: the principal directions of what a layer sees, from one pass and in bounded memory.

The router sees only z = down x, which is often blind to which task a token belongs to. A few more rows of `down`, along
the directions in which the layer's inputs vary most, let it see; they write nothing.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from .accumulator import zeros
from .placed import sent

OVERSAMPLING = 16


class Sketch:
    """Nystrom sketch of C = sum of x x^T (Tropp et al. 2017, "Fixed-rank approximation of a PSD matrix from streaming
    data"): keeps C Omega for a fixed random Omega, (in, rank + oversampling), never C itself.
    """

    def __init__(self, rank: int, tests: dict[object, Tensor] | None = None) -> None:
        """`tests`: test matrices on devices, kept for all sketches of a run."""
        self.rank = rank
        self.tokens = 0
        self._range: Tensor | None = None
        self._tests = {} if tests is None else tests

    def update(self, x: Tensor) -> None:
        """Add tokens. x: (tokens, in), float32 or float64."""
        columns = self.rank + OVERSAMPLING
        key = (x.shape[1], columns, x.device, x.dtype)
        if key not in self._tests:
            self._tests[key] = sent(test_matrix(x.shape[1], columns).to(x.dtype), x.device)
        test = self._tests[key]
        if self._range is None:
            self._range = zeros(*test.shape, device=x.device, dtype=x.dtype)
        self._range.addmm_(x.mT, x @ test)
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
    return _left_singular(basis)[:, :rank].mT.float().contiguous()


def _left_singular(matrix: Tensor) -> Tensor:
    """The left singular vectors of a tall matrix, float64, by its small Gram matrix where that is accurate enough."""
    values, vectors = torch.linalg.eigh(matrix.mT @ matrix)
    if values[0] <= 1e-10 * values[-1]:
        return torch.linalg.svd(matrix, full_matrices=False)[0]
    return (matrix @ vectors / values.sqrt()).flip(1)
