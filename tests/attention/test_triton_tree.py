"""The tree search for single queries and sets of them, in Triton's interpreter or on a GPU."""

from __future__ import annotations

import pytest
import torch
from tests.attention.test_triton_decode import made, on

from foveate.errors import BadArgument
from foveate.methods.policies.lists import close_gaps
from foveate.methods.policies.tree import descend

pytest.importorskip("triton")

from foveate.attention.triton.tree import best_blocks


@pytest.mark.parametrize(
    ("dtype", "dim", "heads", "stores", "sets", "rows", "page", "slots"),
    [
        (torch.float32, 24, 2, 2, 1, 1, 2, 5),
        (torch.bfloat16, 128, 6, 2, 1, 1, 3, 8),
        (torch.float16, 64, 8, 1, 2, 1, 2, 4),
        (torch.float32, 64, 6, 2, 1, 1, 1, 40),
        (torch.float32, 8, 4, 2, 3, 5, 2, 6),
        (torch.bfloat16, 64, 3, 1, 2, 17, 2, 9),
    ],
)
def test_finds_what_the_search_in_words_finds(
    seed: int, dtype: torch.dtype, dim: int, heads: int, stores: int, sets: int, rows: int, page: int, slots: int
) -> None:
    torch.manual_seed(seed)
    held = 150
    q, k = made(dtype, 2, heads, sets, rows, dim), made(dtype, 2, stores, held + 9, dim)[:, :, :held]
    low = torch.randint(0, 4, (2, heads, sets))
    high = torch.tensor([held // page, 17]).view(2, 1, 1).expand(2, heads, sets).contiguous()
    high[0, 0, -1] = low[0, 0, -1] + 3  # fewer than may be found
    high[1, 1, 0] = 0
    of_heads = k.double().repeat_interleave(heads // stores, dim=1)
    truth = torch.einsum("bhtrd,bhcd->bhtrc", q.double(), of_heads).amax(3)
    best = truth[..., : held // page * page].unflatten(-1, (-1, page)).amax(-1)
    want = descend(low, high, slots, lambda at: best.gather(-1, at.clamp_max(best.shape[-1] - 1)))
    q, k, low, high = on(q, k, low, high)
    got = best_blocks(q, k, low, high, slots, -(-held // page), page).cpu()
    assert got.shape == (2, heads, sets, slots)
    assert torch.equal(close_gaps(got), close_gaps(want))


@pytest.mark.parametrize(
    ("heads", "stores", "rows", "slots"), [(4, 2, 3, 5), (6, 2, 16, 9), (2, 1, 1, 4), (4, 1, 9, 80)]
)
def test_heads_of_a_group_search_the_same_range(seed: int, heads: int, stores: int, rows: int, slots: int) -> None:
    torch.manual_seed(seed)
    q, k = made(torch.float32, 2, heads, 3, rows, 16), made(torch.float32, 2, stores, 160, 16)
    low = torch.randint(0, 4, (2, stores, 3))
    high = torch.randint(20, 80, (2, stores, 3))
    high[1, 0, 1] = 0
    q, k, low, high = on(q, k, low, high)
    got = best_blocks(q, k, low, high, slots, 80, 2)
    low, high = (x.repeat_interleave(heads // stores, dim=1) for x in (low, high))
    assert torch.equal(got, best_blocks(q, k, low, high, slots, 80, 2))


def test_bad_arguments() -> None:
    q, k, low = torch.zeros(1, 2, 3, 1, 16), torch.zeros(1, 2, 9, 16), torch.zeros(1, 2, 3, dtype=torch.int64)
    with pytest.raises(BadArgument, match="give sets of queries"):
        best_blocks(q[:, :, 0], k, low, low, 2, 4, 2)
    with pytest.raises(BadArgument, match="keys of the same dtype"):
        best_blocks(q, k.half(), low, low, 2, 4, 2)
    with pytest.raises(BadArgument, match="one range a set"):
        best_blocks(q, k, low[..., :1], low[..., :1], 2, 4, 2)
