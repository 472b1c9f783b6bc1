"""Grams: one Gram matrix per case, each kept as its upper triangle; a case that saw nothing takes no memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import zip_longest

import torch
from torch import Tensor

NOTHING = torch.empty(0, dtype=torch.float64)  # the sum of a case that saw nothing


@dataclass(frozen=True, eq=False)
class Grams:
    """C symmetric matrices of one size. Half the memory of full ones, and less where cases are absent."""

    size: int  # R
    packed: tuple[Tensor, ...]  # (C,) each (R (R + 1) / 2,), the upper triangle by rows, or (0,) for zeros

    @classmethod
    def zeros(cls, cases: int, size: int) -> Grams:
        return cls(size, (NOTHING,) * cases)

    @classmethod
    def of(cls, matrices: Tensor) -> Grams:
        """matrices: (C, R, R), of which only the upper triangles are read."""
        return cls(matrices.shape[-1], tuple(pack(matrix) for matrix in matrices))

    def replaced(self, case: int, packed: Tensor) -> Grams:
        return Grams(self.size, (*self.packed[:case], packed, *self.packed[case + 1 :]))

    def __len__(self) -> int:
        return len(self.packed)

    def __iter__(self) -> Iterator[Tensor]:
        """Each as (R, R) float64, one at a time."""
        return (unpack(packed, self.size) for packed in self.packed)

    def __add__(self, other: Grams) -> Grams:
        """Cases that one of them does not have saw nothing there."""
        pairs = zip_longest(self.packed, other.packed, fillvalue=NOTHING)
        return Grams(self.size, tuple(sum_of_present(a, b) for a, b in pairs))

    def padded(self, cases: int) -> Grams:
        """With so many cases; those that are new saw nothing."""
        return Grams(self.size, self.packed + (NOTHING,) * (cases - len(self.packed)))

    def chosen(self, cases: Sequence[int | None], rows: Tensor) -> Grams:
        """Of these cases (None: one that saw nothing), and of these rows and columns of each."""
        kept = (NOTHING if case is None else self.packed[case] for case in cases)
        return Grams(len(rows), tuple(p if not len(p) else pack(unpack(p, self.size)[rows][:, rows]) for p in kept))

    def dense(self) -> Tensor:
        """(C, R, R) float64"""
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
