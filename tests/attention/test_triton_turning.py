"""Cosines and sines of kernels, in Triton's interpreter or on a GPU."""

from __future__ import annotations

import pytest
import torch
from tests.attention.test_triton_decode import on

pytest.importorskip("triton")

from foveate.attention.triton.turning import circle
from foveate.attention.triton.workers import jit, tl


@jit
def _circle(x, cos, sin, N: tl.constexpr):
    n = tl.arange(0, N)
    a, b = circle(tl.load(x + n))
    tl.store(cos + n, a)
    tl.store(sin + n, b)


@pytest.mark.parametrize("far", [1.0, 300.0, 131072.0, 4e6])
def test_angles_of_any_size(seed: int, far: float) -> None:
    """Of either sign, whole quarters of a turn and what lies between."""
    torch.manual_seed(seed)
    x = (2 * torch.rand(256) - 1) * far
    x[:64] = (torch.arange(-32, 32) * (torch.pi / 4)).float()
    (x,) = on(x)
    cos, sin = torch.empty_like(x), torch.empty_like(x)
    _circle[(1,)](x, cos, sin, N=256)
    for got, want in ((cos, x.double().cos()), (sin, x.double().sin())):
        assert not got.isnan().any()
        assert (got - want).abs().max() < 2e-7
