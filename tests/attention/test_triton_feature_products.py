"""Scores of blocks that are known by one feature, for many queries, in Triton's interpreter or on a GPU."""

from __future__ import annotations

import pytest
import torch
from tests.attention.test_triton_decode import made, on
from tests.closeness import assert_close

from foveate.attention import turned
from foveate.errors import BadArgument
from foveate.methods.policies.features import _products

pytest.importorskip("triton")

from foveate.attention.triton.feature_products import feature_products


@pytest.mark.parametrize(
    ("dtype", "queries", "dim", "blocks", "share", "softcap", "forced"),
    [
        (torch.float32, 40, 24, 70, 1, None, True),
        (torch.bfloat16, 150, 64, 90, 3, 3.0, False),
        (torch.bfloat16, 140, 80, 130, 1, None, True),
        (torch.float16, 20, 128, 9, 2, None, False),
    ],
)
def test_against_the_definition(seed: int, dtype, queries, dim, blocks, share, softcap, forced) -> None:
    """Features are not rounded to the dtype of the queries."""
    torch.manual_seed(seed)
    q = made(dtype, 2, queries, 6, dim).transpose(1, 2)
    features = torch.randn(2, 6 // share, blocks, dim)
    high = torch.arange(queries).div(2, rounding_mode="floor").expand(2, -1) + torch.tensor([[0], [11]])
    sure = high - 2 if forced else None
    want = _products(q.double(), features, high, sure, 0.3, softcap)
    exact = q.double() @ features.double().repeat_interleave(share, 1).mT * 0.3
    exact = exact if softcap is None else softcap * (exact / softcap).tanh()
    want = torch.where(want.isinf(), want.double(), exact)
    q, features, high = on(q, features, high)
    sure = None if sure is None else sure.to(q.device)
    got = feature_products(q, features, high, sure, scale=0.3, softcap=softcap)
    assert got.dtype == torch.float32
    assert_close(got.cpu(), want, 2e-6)


def test_who_multiplies() -> None:
    assert not turned.multiplies(torch.ones(1, 2, 3, 8, dtype=torch.float64))
    assert not turned.multiplies(torch.ones(1, 2, 3, 512))
    assert not turned.multiplies(torch.ones(1, 2, 3, 8, requires_grad=True))


def test_bad_arguments() -> None:
    q, features, high = torch.ones(1, 2, 3, 8), torch.ones(1, 2, 4, 8), torch.ones(1, 3, dtype=torch.int64)
    with pytest.raises(BadArgument, match="features that fit them"):
        feature_products(q, features.half(), high, None)
    with pytest.raises(BadArgument, match="one number a query"):
        feature_products(q, features, high[:, :2], None)
