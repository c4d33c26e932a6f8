"""Estimated peaks of blocks by the kernel are those of the method's own code."""

from __future__ import annotations

import os

import pytest
import torch
from tests.closeness import assert_close

from foveate.methods.policies.lowbit import block_peaks

pytest.importorskip("triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = pytest.mark.skipif(
    DEVICE.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1", reason="needs a GPU or TRITON_INTERPRET=1"
)


@pytest.mark.parametrize(("softcap", "tile"), [(None, 4), (3.0, 4), (None, 32), (None, 1)])
@pytest.mark.parametrize(
    ("heads", "stores", "n", "m", "dim", "blocks"),
    [(2, 1, 150, 150, 64, (64, 32)), (4, 2, 70, 203, 40, (16, 16)), (3, 3, 33, 300, 80, (128, 128))],
)
def test_peaks(
    seed: int, heads: int, stores: int, n: int, m: int, dim: int, blocks: tuple[int, int], softcap: float | None,
    tile: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    q, k = torch.randn(heads, n, dim) + 0.5, torch.randn(stores, m, dim) - 0.3
    k[:, 7] = 0  # a scale of 0 where neighbours share none
    lse = torch.randn(heads, n)
    lse[0, 5] = -torch.inf  # what found nothing reads everything
    q, k, lse = q.to(DEVICE), k.to(DEVICE), lse.to(DEVICE)
    q_block, k_block = blocks
    got, want = (
        block_peaks(q, k, lse, q_block=q_block, k_block=k_block, tile=tile, scale=0.2, softcap=softcap, kernel=kernel)
        for kernel in (True, False)
    )
    assert got.shape == want.shape
    last = m - n + (torch.arange(got.shape[1]) + 1).mul(q_block).clamp(max=n)
    past = (torch.arange(got.shape[2]) * k_block < last[:, None]).expand(heads, -1, -1)
    assert_close(got.cpu()[past], want.cpu()[past], 1e-6)
    assert (got.cpu()[~past] == -torch.inf).all()
