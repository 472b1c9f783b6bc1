"""Grams: one Gram matrix per task, each kept as its upper triangle; a task that saw nothing takes no memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

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
        return Grams(self.size, tuple(sum_of_present(a, b) for a, b in zip(self.packed, other.packed, strict=True)))

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
    return matrix.flatten().index_select(0, _triangle(len(matrix)))


def unpack(packed: Tensor, size: int) -> Tensor:
    """(R, R) float64, symmetric to the bit; zeros of an empty triangle."""
    if not len(packed):
        return torch.zeros(size, size, dtype=torch.float64)
    return packed.double().index_select(0, _places(size)).view(size, size)


def sum_of_present(one: Tensor, other: Tensor) -> Tensor:
    """The sum of two tensors of which either may be absent, that is, empty."""
    return one + other if len(one) and len(other) else one if len(one) else other


@lru_cache(maxsize=64)
def _triangle(size: int) -> Tensor:
    """Where the upper triangle of a flattened (R, R) is, by rows."""
    rows, columns = torch.triu_indices(size, size).unbind()
    return rows * size + columns


@lru_cache(maxsize=64)
def _places(size: int) -> Tensor:
    """(R R,) which entry of the upper triangle each entry of the whole matrix is."""
    places = torch.zeros(size, size, dtype=torch.int64)
    rows, columns = torch.triu_indices(size, size).unbind()
    places[rows, columns] = places[columns, rows] = torch.arange(len(rows))
    return places.flatten()
