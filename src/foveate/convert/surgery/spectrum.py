"""Eigenvectors, singular vectors and the ranks that keep a share of the energy, in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.errors import BadArgument


@dataclass(frozen=True)
class Principal:
    """The leading eigenvectors of a second moment.

    Args:
        vectors: [n, rank], orthonormal columns by descending eigenvalue.
        values: [n], all eigenvalues, descending, none below 0.
        share: of the sum of eigenvalues, what the rank holds: 1 - E|x - VV'x|² / E|x|². 1 where there is none.
    """

    vectors: Tensor
    values: Tensor
    share: float


@dataclass(frozen=True)
class Truncated:
    """The best approximation of a matrix by one of this rank, left * values @ right.

    Args:
        left: [m, rank], orthonormal columns. values: [rank], descending. right: [rank, n], orthonormal rows.
        share: of the matrix's squared Frobenius norm, what the rank holds. 1 where there is none.
    """

    left: Tensor
    values: Tensor
    right: Tensor
    share: float

    def matrix(self) -> Tensor:
        """The approximation [m, n]."""
        return self.left * self.values @ self.right


def principal(second_moment: Tensor, rank: int | None = None) -> Principal:
    """The eigenvectors [n, rank] with the largest eigenvalues of a second moment [n, n].

    Signs are fixed, so that the same moment gives the same vectors on any machine: the largest component of each is
    positive.

    Raises:
        BadArgument: a matrix that is not square, or a rank above its size.
    """
    size = _square(second_moment)
    rank = _rank(size if rank is None else rank, size)
    moment = second_moment.double()
    values, vectors = torch.linalg.eigh((moment + moment.T) / 2)
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)[:, :rank]
    return Principal(vectors * _signs(vectors), values, _share(values, rank))


def truncated_svd(weight: Tensor, rank: int) -> Truncated:
    """The leading singular vectors of a matrix [m, n], signs fixed by the largest component of each left one.

    Raises:
        BadArgument: not a matrix, or a rank above its smaller side.
    """
    if weight.ndim != 2:
        raise BadArgument("weight", tuple(weight.shape), "give a matrix [m, n]")
    rank = _rank(rank, min(weight.shape))
    left, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
    signs = _signs(left[:, :rank])
    share = _share(values.square(), rank)
    return Truncated(left[:, :rank] * signs, values[:rank], right[:rank] * signs[:, None], share)


def energy_rank(values: Tensor, share: float, multiple_of: int = 1) -> int:
    """The smallest rank that holds this share of the energy, rounded up to a multiple, at most all values.

    Args:
        values: [n] energies such as eigenvalues or squared singular values, descending.

    Raises:
        BadArgument: a share outside 0..1, or values that are not descending and non-negative.
    """
    if not 0 <= share <= 1:
        raise BadArgument("share", share, "give a share between 0 and 1")
    if multiple_of < 1:
        raise BadArgument("multiple_of", multiple_of, "give at least 1")
    values = values.double()
    if values.ndim != 1 or (values < 0).any() or (values.diff() > 0).any():
        raise BadArgument("values", tuple(values.shape), "give a list of energies, descending, none below 0")
    # What is left out decides: beside the sum of the large values the last small ones would be lost to rounding. The
    # allowance is for 1 - share itself, which is rounded.
    left_out = values.flip(0).cumsum(0).flip(0)
    needed = int((left_out > (1 - share) * (1 + 1e-12) * left_out[0]).sum()) if len(values) else 0
    return min(-(-needed // multiple_of) * multiple_of, len(values))


def _square(matrix: Tensor) -> int:
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise BadArgument("second_moment", tuple(matrix.shape), "give a square matrix [n, n]")
    return matrix.shape[0]


def _rank(rank: int, most: int) -> int:
    if not 0 <= rank <= most:
        raise BadArgument("rank", rank, f"give 0 to {most}")
    return rank


def _signs(columns: Tensor) -> Tensor:
    largest = columns.gather(0, columns.abs().argmax(0, keepdim=True))[0]
    return torch.where(largest < 0, -1.0, 1.0).to(columns)


def _share(values: Tensor, rank: int) -> float:
    total = float(values.sum())
    return float(values[:rank].sum()) / total if total > 0 else 1.0
