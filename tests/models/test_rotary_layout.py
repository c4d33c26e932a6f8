"""Half-split and interleaved rows: a permutation, undone by the other, that the rotation does not notice."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from foveate.errors import BadArgument
from foveate.models.rotary_layout import half_split, half_splitting, interleaved, interleaving

layouts = st.tuples(st.integers(0, 24), st.integers(0, 9), st.integers(0, 9)).map(
    lambda n: (2 * n[0], n[1], n[1] + 2 * n[0] + n[2])
)
"""Rotated dims, where they begin, all dims."""


def turned(x: Tensor, angle: Tensor, pairs: list[tuple[int, int]]) -> Tensor:
    out = x.clone()
    for i, (a, b) in enumerate(pairs):
        out[..., a] = x[..., a] * angle[i].cos() - x[..., b] * angle[i].sin()
        out[..., b] = x[..., a] * angle[i].sin() + x[..., b] * angle[i].cos()
    return out


def test_of_eight_dims_the_first_and_the_fifth_are_a_pair():
    assert interleaving(8).tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert half_splitting(8).tolist() == [0, 2, 4, 6, 1, 3, 5, 7]
    assert interleaving(4, 7).tolist() == [0, 2, 1, 3, 4, 5, 6]
    assert interleaving(4, 7, first=3).tolist() == [0, 1, 2, 3, 5, 4, 6]


@given(layout=layouts, seed=st.integers(0, 99))
def test_each_undoes_the_other(layout, seed):
    rotary, first, dim = layout
    x = torch.randn(3, dim, 2, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(half_split(interleaved(x, rotary, first=first), rotary, first=first), x)
    assert torch.equal(interleaved(half_split(x, rotary, first=first), rotary, first=first), x)
    matrix = torch.eye(dim)[interleaving(rotary, dim, first)]
    assert torch.equal(matrix @ matrix.T, torch.eye(dim))
    assert torch.equal(torch.eye(dim)[half_splitting(rotary, dim, first)], matrix.T)


@given(layout=layouts, seed=st.integers(0, 99))
def test_each_goes_with_its_rotation(layout, seed):
    rotary, first, dim = layout
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, dim, generator=generator, dtype=torch.float64)
    angle = torch.randn(rotary // 2, generator=generator, dtype=torch.float64)
    split = [(first + i, first + i + rotary // 2) for i in range(rotary // 2)]
    neighbours = [(first + 2 * i, first + 2 * i + 1) for i in range(rotary // 2)]
    here = interleaved(turned(x, angle, split), rotary, axis=-1, first=first)
    there = turned(interleaved(x, rotary, axis=-1, first=first), angle, neighbours)
    assert torch.equal(here, there)


def test_rows_and_biases_go_alike():
    weight, bias, x = torch.randn(2, 10, 5), torch.randn(2, 10), torch.randn(5)
    there = interleaved(weight, 6) @ x + interleaved(bias, 6, axis=-1)
    assert torch.equal(there, interleaved(weight @ x + bias, 6, axis=-1))


@pytest.mark.parametrize(("rotary", "dim", "first"), [(3, 8, 0), (10, 8, 0), (4, 8, 5), (4, 8, -1), (-2, 8, 0)])
def test_dims_that_do_not_fit_are_refused(rotary, dim, first):
    with pytest.raises(BadArgument, match="rotary_dim"):
        interleaving(rotary, dim, first)
