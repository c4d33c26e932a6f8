"""Queries brought together by the blocks that they list, in Triton's interpreter or on a GPU."""

from __future__ import annotations

import random

import pytest
import torch
from tests.attention.reads import random_lists
from tests.attention.test_triton_decode import made, on
from tests.attention.test_triton_decode_votes import LIMIT, speeds, turn
from tests.closeness import assert_close

from foveate.attention import Frame, Geometry, Selection, framed, grouped, turned
from foveate.attention.angles import Angles
from foveate.errors import BadArgument

pytest.importorskip("triton")

from foveate.attention.triton.grouped_read import grouped_read, tiles

CASES = [
    (torch.float32, 64, 32, False, 16),
    (torch.bfloat16, 80, 40, False, 50),  # no power of two
    (torch.float16, 128, 64, False, 130),  # several tiles of a block
    (torch.float32, 48, 12, False, 33),  # a part of the channels is rotated
    (torch.bfloat16, 48, 8, True, 64),  # and here they are the last ones
]


@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize(("dtype", "dim", "pairs", "last", "size"), CASES)
def test_against_the_definition(seed: int, dtype, dim: int, pairs: int, last: bool, size: int, softcap) -> None:
    """Ends within blocks, rows that read nothing, and slots that nobody reads and that hold anything."""
    torch.manual_seed(seed)
    batch, heads, n, keys, width, v_dim = 2, 3, 37, 211, 3, 40
    q, k, v = made(dtype, batch, heads, n, dim), made(dtype, batch, keys, dim), made(dtype, batch, keys, v_dim)
    lists = random_lists(random.Random(seed), (batch, heads, n), -(-keys // size), width)
    lists[0, 1, 5] = -1
    places, ends = torch.randint(0, 400, lists.shape), torch.randint(1, keys + 1, (batch, n))
    ends[1, 7] = 0
    slot = torch.arange(keys)
    scores = torch.full((batch, heads, n, keys), -torch.inf, dtype=torch.float64)
    for entry in range(lists.shape[-1]):
        block, place = lists[..., entry, None], places[..., entry, None]
        delta = (block * size - place)[..., 0]
        x = turn(q, delta.unsqueeze(-1) * speeds(pairs).double(), last) @ k.double().unsqueeze(1).mT * 0.2
        mine = (block >= 0) & (slot // size == block) & (slot < ends[:, None, :, None])
        scores = torch.where(mine, x if softcap is None else softcap * (x / softcap).tanh(), scores)
    lse = scores.logsumexp(-1)
    weights = (scores - torch.where(lse.isinf(), 0.0, lse).unsqueeze(-1)).exp()
    want = weights @ v.double().unsqueeze(1)
    unread = (scores == -torch.inf).all(1).all(1).unsqueeze(-1)
    k, v = k.masked_fill(unread, torch.nan), v.masked_fill(unread, torch.nan)
    q, k, v, lists, places, ends = on(q, k, v, lists, places, ends)
    angles = Angles(speeds(pairs), last)
    out, mass = grouped_read(q, k, v, lists, places, ends, angles, size=size, scale=0.2, softcap=softcap)
    assert out.dtype == dtype
    assert_close(out.cpu(), want, LIMIT[dtype])
    assert_close(mass.cpu(), lse, LIMIT[dtype])
    assert lse.isinf().any()


def test_many_queries_of_a_block_stand_in_wide_tiles(seed: int) -> None:
    torch.manual_seed(seed)
    q, k = made(torch.bfloat16, 1, 2, 300, 64), made(torch.bfloat16, 1, 150, 64)
    lists = torch.stack([torch.randint(-1, 2, (1, 2, 300)), torch.full((1, 2, 300), 2)], dim=-1)
    places, ends = torch.randint(0, 400, lists.shape), torch.randint(60, 150, (1, 300))
    q, k, lists, places, ends = on(q, k, lists, places, ends)
    angles, how = Angles(speeds(32)), {"size": 40, "scale": 0.2}
    out, lse = grouped_read(q, k, k, lists, places, ends, angles, **how)
    for some in (slice(0, 100), slice(100, 200), slice(200, 300)):
        rows = lists[:, :, some], places[:, :, some], ends[:, some]
        near, mass = grouped_read(q[:, :, some], k, k, *rows, angles, **how)
        assert_close(out[:, :, some].cpu(), near.cpu(), LIMIT[torch.bfloat16])
        assert_close(lse[:, :, some].cpu(), mass.cpu(), 1e-5)


def test_tiles_hold_every_entry_once(seed: int) -> None:
    torch.manual_seed(seed)
    lists = torch.randint(-1, 6, (2, 2, 45, 3), dtype=torch.int32)
    ends = torch.randint(0, 60, (2, 45), dtype=torch.int32)
    found = tiles(lists, 10, ends, 6, 16)
    b, _, i, _ = torch.unravel_index(torch.arange(lists.numel()), lists.shape)
    flat = lists.flatten()
    seen: list[int] = []
    for begin, count, group in zip(found.begin.tolist(), found.count.tolist(), found.group.tolist(), strict=True):
        some = found.which[begin : begin + count]
        assert count <= 16
        assert (b[some] == group // 6).all() and (flat[some] == group % 6).all()
        seen += some.tolist()
    assert sorted(seen) == torch.nonzero((flat >= 0) & (flat * 10 < ends[b, i])).flatten().tolist()


def test_reads_of_many_queries_take_the_kernel(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of the queries at a time, lists of several queries and of all heads: what `framed` reads without it."""
    torch.manual_seed(seed)
    q, k, v = made(torch.float32, 2, 3, 70, 64), made(torch.float32, 2, 1, 93, 64), made(torch.float32, 2, 1, 93, 24)
    lengths, first = torch.tensor([[93], [80]]), torch.tensor([[23], [10]])
    lists = random_lists(random.Random(seed), (2, 1, 24), 6, 4)
    places = torch.randint(0, 50, lists.shape)
    q, k, v, lists, places, lengths, first = on(q, k, v, lists, places, lengths, first)
    geometry = Geometry(2, 70, 93, lengths, first, first + torch.arange(70, device=q.device), device=q.device)
    selection = Selection(lists, 3, 16, frame=Frame(keys=places))
    angles = Angles(speeds(32).to(q.device))
    options = {"scale": 0.3, "softcap": None, "move": angles.move}
    want = framed.attend(q, v, framed.pieces(q, k, selection, geometry, (), **options))
    monkeypatch.setattr(turned, "serves", lambda q, angles: q.shape[2] > 1)
    monkeypatch.setattr(grouped, "at_once", lambda device: 5000)
    got = framed.read(q, k, v, selection, geometry, (), **options, angles=angles)
    assert_close(got.out, want.out, 1e-5)
    assert_close(got.lse, want.lse, 1e-5)


def test_what_does_not_fit_is_named() -> None:
    q, k = torch.randn(1, 2, 3, 64), torch.randn(1, 9, 64)
    lists = torch.zeros(1, 2, 3, 1, dtype=torch.int32)
    ends, angles = torch.ones(1, 3), Angles(speeds(32))
    with pytest.raises(BadArgument, match="one dtype with adjacent channels"):
        grouped_read(q, k.half(), k, lists, lists, ends, angles, size=4, scale=1.0)
    with pytest.raises(BadArgument, match=r"lists .*give both for each query and head"):
        grouped_read(q, k, k, lists[:, :1], lists, ends, angles, size=4, scale=1.0)
    with pytest.raises(BadArgument, match=r"ends=.*give one end per query"):
        grouped_read(q, k, k, lists, lists, ends[:, :2], angles, size=4, scale=1.0)
