"""What layers share: one basis for all of them, whatever is done to them one by one."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch
from tests.closeness import assert_close

from foveate.cache import Column, JointColumn
from foveate.cache.joint import Basis


def column(basis: Basis, *, first: bool, tail: int = 0, packed: tuple[int, int] = (5, 3)) -> JointColumn:
    """Two rows of two heads with 4 channels, the first 3 of which are made of the basis [2, 5, 2]."""
    mix, rest = torch.randn(2, 2, 6), torch.randn(4, 5, 1)
    counts = np.array(packed).repeat(2)
    return JointColumn(Column(torch.randn(4, tail, 4)), basis, mix, rest, counts, 2, first, None)


def test_layers_picked_one_by_one_share_one_basis() -> None:
    basis = Basis(torch.randn(2, 5, 2))
    one, other = (column(basis, first=first) for first in (True, False))
    pairs = torch.tensor([2, 3, 0, 1, 2, 3])
    a, b = one.pick(pairs), other.pick(pairs)
    assert a.basis is b.basis is not basis
    assert torch.equal(a.basis.data, basis.data[[1, 0, 1]])
    assert a.packed.tolist() == [3, 3, 5, 5, 3, 3]
    for old, new in ((one, a), (other, b)):
        assert_close(new.read(5)[2:4], old.read(5)[:2], 1e-6)
        assert_close(new.read(3)[[0, 1, 4, 5]], old.read(3)[[2, 3, 2, 3]], 1e-6)
    assert one.pick(torch.arange(4)).basis is basis  # nothing ever changes it
    gone = weakref.ref(a.basis)
    del a, b, new
    gc.collect()
    assert gone() is None


def test_the_basis_is_counted_once() -> None:
    basis = Basis(torch.randn(2, 5, 2))
    one, other = (column(basis, first=first) for first in (True, False))
    assert one.nbytes - other.nbytes == 2 * 5 * 2 * 4
    assert other.nbytes == (2 * 2 * 6 + 4 * 5) * 4


def test_tokens_behind_the_joint_ones_are_exact() -> None:
    """Also in rows of different length, and after some of the joint ones were cut off."""
    made = column(Basis(torch.randn(2, 5, 2)), first=True, tail=4)
    whole = (made.basis.data @ made.mix).unflatten(2, (2, 3)).transpose(1, 2).flatten(0, 1)
    want = torch.cat([whole, made.rest], dim=-1)
    tail = made.tail.data.clone()
    got = made.read(9)
    assert_close(got[:2], torch.cat([want[:2], tail[:2]], dim=1), 1e-6)
    assert_close(got[2:, :7], torch.cat([want[2:, :3], tail[2:]], dim=1), 1e-6)
    made.truncate(np.array([2, 2, 2, 2]))
    assert made.packed.tolist() == [2, 2, 2, 2]
    made.write(torch.ones(4, 1, 4), made.packed, None)
    assert_close(made.read(3), torch.cat([want[:, :2], torch.ones(4, 1, 4)], dim=1), 1e-6)


def test_rows_go_whole() -> None:
    with pytest.raises(AssertionError, match="whole rows"):
        column(Basis(torch.randn(2, 5, 2)), first=True).pick(torch.tensor([0, 2]))
