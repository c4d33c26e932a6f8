"""Reads of whole blocks that stand elsewhere, each head over its own list, in Triton's interpreter or on a GPU."""

from __future__ import annotations

import pytest
import torch
from tests.attention.test_triton_decode import made, on
from tests.attention.test_triton_decode_votes import speeds, turn
from tests.closeness import assert_close

pytest.importorskip("triton")

from foveate.attention.triton import decode_framed as framed
from foveate.attention.triton import decode_moved

LIMIT = {torch.float32: 1e-5, torch.bfloat16: 6e-3}
"""Nothing is rounded but the output; angles of some 300 positions are float32."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("dim", "pairs", "last", "share", "page", "softcap"),
    [
        (64, 32, False, 1, 32, None),
        (80, 40, False, 3, 50, 3.0),
        (128, 64, False, 8, 100, None),
        (48, 12, False, 3, 40, None),  # a part of the channels is rotated
        (48, 8, True, 2, 128, 3.0),  # and here they are the last ones
    ],
)
def test_reads(seed: int, dtype, dim: int, pairs: int, last: bool, share: int, page: int, softcap) -> None:
    """Against the definition; what is not listed may hold anything, and a list may be empty."""
    torch.manual_seed(seed)
    units, held = 2 * share, 403
    q, f = made(dtype, units, 1, 1, dim), speeds(pairs)
    k, v = made(dtype, 2, held, dim), made(dtype, 2, held, 24)
    lengths, blocks = torch.tensor([held, 190], dtype=torch.int32), -(-held // page)
    lists = torch.stack([torch.randperm(blocks)[:3].sort().values for _ in range(units)]).to(torch.int32)
    lists[0, 2:], lists[-1] = -1, -1
    places = torch.randint(-9, 300, lists.shape, dtype=torch.int32)
    slots = (lists.unsqueeze(-1) * page + torch.arange(page)).flatten(1)
    there = (places.unsqueeze(-1) + torch.arange(page)).flatten(1)
    pair = torch.arange(units) // share
    keep = (lists >= 0).repeat_interleave(page, 1) & (slots < lengths[pair, None])
    slots = slots.clamp(0, held - 1).long()
    keys, values = (x[pair].gather(1, slots.unsqueeze(-1).expand(-1, -1, x.shape[2])) for x in (k, v))
    keys = turn(keys, (there - slots).double().unsqueeze(-1) * f.double(), last)
    scores = torch.einsum("und,umd->um", q[:, 0].double(), keys) * 0.2
    scores = scores if softcap is None else softcap * (scores / softcap).tanh()
    scores = scores.masked_fill(~keep, -torch.inf)
    want = (scores.softmax(-1).nan_to_num(0.0).unsqueeze(1) @ values.double()).unsqueeze(1)
    used = torch.zeros(units, held).scatter_add(1, slots, keep.float()).unflatten(0, (2, share)).sum(1) > 0
    k, v = (x.masked_fill(~used.unsqueeze(-1), torch.nan) for x in (k, v))
    given = on(q, k, v, lists, places, lengths, f)
    assert decode_moved.serves(1, page)
    out, lse = framed.decode_framed(*given, last=last, page=page, scale=0.2, softcap=softcap)
    assert_close(out.cpu(), want, LIMIT[dtype])
    assert_close(lse.cpu(), scores.logsumexp(-1)[:, None, None], LIMIT[dtype])


def test_who_is_served() -> None:
    """Heads that share a list meet each key together, and small blocks are met many at a time."""
    assert decode_moved.serves(1, 256) and not decode_moved.serves(4, 256) and not decode_moved.serves(1, 16)
