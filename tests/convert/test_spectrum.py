"""Spectra: the best subspace, its share of the energy, and the rank for a share."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foveate.convert.surgery.spectrum import energy_rank, principal, truncated_svd
from foveate.errors import BadArgument


def tokens(seed: int, count: int = 50, dim: int = 8) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, dim, generator=generator, dtype=torch.float64) @ torch.diag(
        0.5 ** torch.arange(dim).double()
    )


@given(rank=st.integers(0, 8), seed=st.integers(0, 99))
def test_principal_vectors_lose_least(rank, seed):
    x = tokens(seed)
    found = principal(x.T @ x / len(x), rank)
    v = found.vectors
    torch.testing.assert_close(v.T @ v, torch.eye(rank, dtype=torch.float64))
    lost = 1 - float((x - x @ v @ v.T).square().sum() / x.square().sum())
    assert found.share == pytest.approx(lost, abs=1e-12)
    generator = torch.Generator().manual_seed(seed + 1)
    other = torch.linalg.qr(torch.randn(8, max(rank, 1), generator=generator, dtype=torch.float64)).Q[:, :rank]
    assert (x - x @ v @ v.T).norm() <= (x - x @ other @ other.T).norm() + 1e-12
    assert (found.values.diff() <= 0).all()


def test_principal_vectors_are_the_eigenvectors_in_order_and_sign():
    q = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64)).Q
    values = torch.tensor([9.0, 4.0, 2.0, 0.5, 0.0], dtype=torch.float64)
    found = principal(q * values @ q.T)
    torch.testing.assert_close(found.values, values)
    torch.testing.assert_close((found.vectors * q).sum(0).abs(), torch.ones(5, dtype=torch.float64))
    assert all(column[column.abs().argmax()] > 0 for column in found.vectors.T)
    assert found.share == 1 and principal(q * values @ q.T, 1).share == pytest.approx(9 / 15.5)


def test_moments_in_low_precision_are_worked_on_in_float64():
    x = tokens(3).float()
    found = principal(x.T @ x, 2)
    assert found.vectors.dtype == torch.float64
    assert principal(torch.zeros(3, 3), 0).share == 1


@given(rank=st.integers(0, 5), seed=st.integers(0, 99))
def test_a_truncated_svd_is_the_best_of_its_rank(rank, seed):
    w = tokens(seed, 7, 5)
    found = truncated_svd(w, rank)
    assert found.left.shape == (7, rank) and found.right.shape == (rank, 5)
    all_values = torch.linalg.svdvals(w)
    assert float((w - found.matrix()).square().sum()) == pytest.approx(
        float(all_values[rank:].square().sum()), abs=1e-12
    )
    assert found.share == pytest.approx(float(all_values[:rank].square().sum() / all_values.square().sum()))
    if rank == 5:
        torch.testing.assert_close(found.matrix(), w)


def test_ranks_hold_the_share_and_no_smaller_one_does():
    values = torch.tensor([4.0, 3.0, 2.0, 1.0])
    assert [energy_rank(values, share) for share in (0.0, 0.4, 0.41, 0.7, 0.9, 0.91, 1.0)] == [0, 1, 2, 2, 3, 4, 4]
    assert energy_rank(values, 0.41, multiple_of=3) == 3
    assert energy_rank(values, 0.95, multiple_of=3) == 4
    assert energy_rank(torch.tensor([1.0, 1e-17, 0.0]), 1.0) == 2  # 1 + 1e-17 is 1
    assert energy_rank(torch.zeros(4), 1.0) == 0


@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=12), st.floats(0, 1))
def test_the_rank_is_the_smallest(energies, share):
    values = torch.tensor(sorted(energies, reverse=True), dtype=torch.float64)
    rank = energy_rank(values, share)
    total = values.sum()
    assert values[:rank].sum() >= (share - 1e-12) * total
    assert rank == 0 or values[: rank - 1].sum() <= (share + 1e-12) * total


@pytest.mark.parametrize(
    "call",
    [
        lambda: principal(torch.eye(3), 4),
        lambda: principal(torch.ones(3, 2)),
        lambda: truncated_svd(torch.ones(3, 2), 3),
        lambda: truncated_svd(torch.ones(3), 1),
        lambda: energy_rank(torch.ones(3), 1.5),
        lambda: energy_rank(torch.tensor([1.0, 2.0]), 0.5),
        lambda: energy_rank(torch.ones(3), 0.5, multiple_of=0),
    ],
)
def test_what_cannot_be_is_refused(call):
    with pytest.raises(BadArgument, match="give"):
        call()
