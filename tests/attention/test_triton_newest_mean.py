"""Means of blocks that are complete, in Triton's interpreter or on a GPU."""

from __future__ import annotations

import pytest
import torch
from tests.attention.test_triton_decode import made, on
from tests.attention.test_triton_decode_votes import speeds, turn
from tests.closeness import assert_close

from foveate.attention.angles import Angles
from foveate.errors import BadArgument

pytest.importorskip("triton")

from foveate.attention.triton.newest_mean import newest_mean

LIMIT = {torch.float32: 1e-5, torch.bfloat16: 6e-3}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("dim", "pairs", "last", "size"),
    [(64, 32, False, 50), (80, 40, False, 7), (128, 64, False, 200), (48, 12, False, 16), (48, 8, True, 1)],
)
def test_complete_blocks_get_their_means(seed: int, dtype, dim: int, pairs: int, last: bool, size: int) -> None:
    """Of other rows nothing is read, and nothing is written but what is new."""
    torch.manual_seed(seed)
    k, f = made(dtype, 4, 3, 3 * size + 5, dim), speeds(pairs)
    ends = [3 * size, 2 * size + size // 2 + (size == 1), 0, size]
    lengths = torch.tensor([[n] * 3 for n in ends], dtype=torch.int32)
    means = torch.randn(4, 3, 4, dim)
    want = means.clone().double()
    seen = torch.zeros(4, 3 * size + 5, dtype=torch.bool)
    for row, end in enumerate(ends):
        if end and end % size == 0:
            slots = torch.arange(end - size, end)
            raw = turn(k[row, :, slots], -slots.double()[:, None] * f.double(), last)
            want[row, :, end // size - 1], seen[row, slots] = raw.mean(1), True
    k = k.masked_fill(~seen[:, None, :, None], torch.nan)
    got, k, lengths, f = on(means, k, lengths, f)
    newest_mean(got, k, lengths[:, 0], size, Angles(f, last))
    assert_close(got.cpu(), want, LIMIT[dtype])


def test_what_does_not_fit_is_named() -> None:
    means, k, lengths = torch.zeros(1, 2, 3, 16), torch.zeros(1, 2, 9, 16), torch.zeros(1, dtype=torch.int32)
    with pytest.raises(BadArgument, match="a frequency for each pair"):
        newest_mean(means, k, lengths, 3, Angles(speeds(9)))
    with pytest.raises(BadArgument, match="float32"):
        newest_mean(means.half(), k, lengths, 3, Angles(speeds(8)))
