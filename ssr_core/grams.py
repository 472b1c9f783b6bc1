"""Grams: one Gram matrix per task, each kept as its upper triangle; a task that saw nothing takes no memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Grams:
    """K symmetric matrices of one size. Half the memory of full ones, and less where tasks are absent."""

    size: int  # R
    packed: tuple[Tensor, ...]  # (K,) each (R (R + 1) / 2,), the upper triangle by rows, or (0,) for zeros

    @classmethod
    def zeros(cls, tasks: int, size: int) -> Grams:
        return cls(size, (torch.empty(0, dtype=torch.float64),) * tasks)

    @classmethod
    def of(cls, matrices: Tensor) -> Grams:
        """matrices: (K, R, R), of which only the upper triangles are read."""
        return cls(matrices.shape[-1], tuple(pack(matrix) for matrix in matrices))

    def replaced(self, task: int, packed: Tensor) -> Grams:
        return Grams(self.size, (*self.packed[:task], packed, *self.packed[task + 1 :]))

    def __len__(self) -> int:
        return len(self.packed)

    def __iter__(self) -> Iterator[Tensor]:
        """Each as (R, R) float64, one at a time."""
        return (unpack(packed, self.size) for packed in self.packed)

    def __add__(self, other: Grams) -> Grams:
        return Grams(self.size, tuple(_sum(a, b) for a, b in zip(self.packed, other.packed, strict=True)))

    def chosen(self, tasks: Sequence[int], rows: Tensor) -> Grams:
        """Of these tasks, and of these rows and columns of each."""
        kept = (self.packed[task] for task in tasks)
        return Grams(len(rows), tuple(p if not len(p) else pack(unpack(p, self.size)[rows][:, rows]) for p in kept))

    def dense(self) -> Tensor:
        """(K, R, R) float64"""
        return torch.stack(list(self))

    def is_finite(self) -> bool:
        return all(bool(torch.isfinite(packed).all()) for packed in self.packed)

    @property
    def nbytes(self) -> int:
        return sum(packed.nbytes for packed in self.packed)


def pack(matrix: Tensor) -> Tensor:
    """The upper triangle of a symmetric matrix (R, R), by rows."""
    return matrix[_triangle(len(matrix))].contiguous()


def unpack(packed: Tensor, size: int) -> Tensor:
    """(R, R) float64, symmetric to the bit; zeros of an empty triangle."""
    matrix = torch.zeros(size, size, dtype=torch.float64)
    if len(packed):
        where = _triangle(size)
        matrix[where] = packed.double()
        matrix.T[where] = packed.double()
    return matrix


def _sum(one: Tensor, other: Tensor) -> Tensor:
    return one + other if len(one) and len(other) else one if len(one) else other


@cache
def _triangle(size: int) -> Tensor:
    """(R, R) bool: selecting by it goes through the upper triangle by rows."""
    return torch.ones(size, size, dtype=torch.bool).triu()
