"""Votes for keys at position 0 and reads of keys that stand elsewhere, in Triton's interpreter or on a GPU."""

from __future__ import annotations

import pytest
import torch
from tests.attention.test_triton_decode import DEVICE, bound, made, on
from tests.closeness import assert_close

from foveate.attention.angles import Angles
from foveate.errors import BadArgument

pytest.importorskip("triton")

from foveate.attention.triton.decode_framed import decode_framed
from foveate.attention.triton.decode_votes import turned_votes
from foveate.attention.turned import Rule, Vote, newest_voter, tally

CASES = [
    (torch.float32, 64, 32, False, 1),
    (torch.bfloat16, 80, 40, False, 3),
    (torch.float16, 128, 64, False, 8),
    (torch.float32, 48, 12, False, 3),  # a part of the channels is rotated
    (torch.bfloat16, 48, 8, True, 3),  # and here they are the last ones
]
ON_A_GPU = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
LIMIT = {dtype: most if DEVICE.type == "cuda" else bound(dtype) for dtype, most in ON_A_GPU.items()}
"""Keys are rounded to their dtype where they are turned."""


def speeds(pairs: int) -> torch.Tensor:
    return 10000.0 ** -(torch.arange(pairs) / pairs)


def turn(x: torch.Tensor, angle: torch.Tensor, last: bool = False) -> torch.Tensor:
    """x [..., D] in float64, its rotated channels by angle [..., F]."""
    x, f = x.double(), angle.shape[-1]
    begin = x.shape[-1] - 2 * f if last else 0
    z = torch.complex(x[..., begin : begin + f], x[..., begin + f : begin + 2 * f])
    z = z * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([x[..., :begin], z.real, z.imag, x[..., begin + 2 * f :]], dim=-1)


@pytest.mark.parametrize(("dtype", "dim", "pairs", "last", "group"), CASES)
@pytest.mark.parametrize("count", [1, 3])
def test_votes(seed: int, dtype, dim: int, pairs: int, last: bool, group: int, count: int) -> None:
    """Odd edges, one before the first and one behind the last tile, and slots behind them that hold anything."""
    torch.manual_seed(seed)
    voters, k, f = torch.randn(2, count, 2 * group, dim), made(dtype, 4, 333, dim), speeds(pairs)
    edges = torch.tensor([[333, 70, 5][:count], [129, 300, 9][:count]], dtype=torch.int32)
    keys = turn(k, -torch.arange(333).double()[:, None] * f.double(), last).view(2, 1, 2, 1, 333, dim)
    inside = (torch.arange(333) >= 7) & (torch.arange(333) < edges.unsqueeze(-1))
    logits = (keys @ voters.double().view(2, count, 2, group, dim, 1)).squeeze(-1) * 0.1
    want = logits.masked_fill(~inside[:, :, None, None], -torch.inf).softmax(-1).nan_to_num(0.0).sum((2, 3))
    behind = torch.arange(333) >= edges.amax(1)[:, None, None]
    k = k.view(2, 2, 333, dim).masked_fill(behind.unsqueeze(-1), torch.nan).flatten(0, 1)
    voters, k, edges, f = on(voters, k, edges, f)
    got = turned_votes(voters, k, 7, edges, f, 0.1, last=last, rounded=False).cpu()
    assert ((got == -torch.inf) == ~inside).all()
    assert_close(got.masked_fill(~inside, 0.0), want, LIMIT[dtype])
    rounded = turned_votes(voters, k, 7, edges, f, 0.1, last=last).cpu()
    assert torch.equal(rounded, got.bfloat16().float())
    stands = on(torch.tensor([0, 1], dtype=torch.int32))[0]
    some = turned_votes(voters, k, 7, edges, f, 0.1, last=last, stands=stands).cpu()
    assert torch.equal(some[0], rounded[0])
    assert (some[1] == -torch.inf).all()


def test_votes_far_from_the_first_token(seed: int) -> None:
    """Angles of hundreds of thousands of positions are kept, though float32 keeps no more than 1/64 of a turn there."""
    torch.manual_seed(seed)
    f = speeds(16)
    far = 200_000
    k = torch.zeros(1, far + 70, 32)
    k[:, far:] = torch.randn(1, 70, 32)
    voters, edges = torch.randn(1, 1, 2, 32), torch.tensor([[far + 70]], dtype=torch.int32)
    keys = turn(k[0, far:], -torch.arange(far, far + 70).double()[:, None] * f.double())
    want = (voters[0, 0].double() @ keys.T).softmax(-1).sum(0)
    voters, k, edges, f = on(voters, k, edges, f)
    assert_close(
        turned_votes(voters, k, far, edges, f, 1.0, rounded=False)[0, 0, far:].cpu(), want, LIMIT[torch.float32]
    )


@pytest.mark.parametrize(("dtype", "dim", "pairs", "last", "group"), CASES)
@pytest.mark.parametrize(("page", "softcap", "share"), [(1, None, 1), (4, 3.0, 3), (10, None, 2)])
def test_reads(seed: int, dtype, dim: int, pairs: int, last: bool, group: int, page: int, softcap, share: int) -> None:
    """Against the definition; what is not listed may hold anything, and a list may be empty."""
    torch.manual_seed(seed)
    units = 3 * share
    q, f = made(dtype, units, group, 1, dim), speeds(pairs)
    k, v = made(dtype, 3, 203, dim), made(dtype, 3, 203, 24)
    lengths = torch.tensor([203, 150, 40], dtype=torch.int32)
    blocks = -(-203 // page)
    lists = torch.stack([torch.randperm(blocks)[:17].sort().values for _ in range(units)]).to(torch.int32)
    lists[0, 12:], lists[-1] = -1, -1
    places = torch.randint(-9, 300, lists.shape, dtype=torch.int32)
    slots = (lists.unsqueeze(-1) * page + torch.arange(page)).flatten(1)
    there = (places.unsqueeze(-1) + torch.arange(page)).flatten(1)
    pair = torch.arange(units) // share
    keep = (lists >= 0).repeat_interleave(page, 1) & (slots < lengths[pair, None])
    slots = slots.clamp(0, 202).long()
    picked = [x[pair].gather(1, slots.unsqueeze(-1).expand(-1, -1, x.shape[2])) for x in (k, v)]
    keys = turn(picked[0], (there - slots).double().unsqueeze(-1) * f.double(), last)
    scores = torch.einsum("pgnd,pmd->pgnm", q.double(), keys) * 0.2
    scores = scores if softcap is None else softcap * (scores / softcap).tanh()
    scores = scores.masked_fill(~keep[:, None, None], -torch.inf)
    want = scores.softmax(-1).nan_to_num(0.0) @ picked[1].double().unsqueeze(1)
    used = torch.zeros(units, 203).scatter_add(1, slots, keep.float()).unflatten(0, (3, share)).sum(1) > 0
    k, v = (x.masked_fill(~used.unsqueeze(-1), torch.nan) for x in (k, v))
    given = on(q, k, v, lists, places, lengths, f)
    out, lse = decode_framed(*given, last=last, page=page, scale=0.2, softcap=softcap)
    assert_close(out.cpu(), want, LIMIT[dtype])
    assert_close(lse.cpu(), scores.logsumexp(-1), LIMIT[dtype])


@pytest.mark.parametrize(("dtype", "dim", "pairs", "last"), [case[:4] for case in CASES])
def test_who_votes_and_what_stands(seed: int, dtype, dim: int, pairs: int, last: bool) -> None:
    """The tokens between are few in one row, and in the last one just as many as may win."""
    torch.manual_seed(seed)
    q, f, lengths = made(dtype, 5, 3, 1, dim), speeds(pairs), torch.tensor([90, 77, 91, 21, 32], dtype=torch.int32)
    rule = Rule(first=4, local=8, k=20, theta=0.5)
    want = turn(q[:, :, 0], (8 - (lengths - 1).double())[:, None, None] * f.double(), last)
    noise = torch.tensor([0.1, 5.0, 0.1, 0.1, 0.1])[:, None]
    query = (want.flatten(1) + noise * torch.randn(5, 3 * dim)).float()
    vote = Vote(query, torch.arange(100, dtype=torch.int32).view(5, 20), torch.tensor([1, 1, 0, 1, 1]).bool())
    alike = torch.cosine_similarity(want.flatten(1), query.double()) >= 0.5
    q, f, lengths, *there = on(q, f, lengths, *vote)
    vote = Vote(*there)
    voter, edges, stands = newest_voter(q, lengths, Angles(f, last), rule, vote)
    assert_close(voter[:, 0].cpu(), want, 1e-5)
    assert edges.flatten().tolist() == [82, 69, 83, 13, 24]
    assert stands.tolist() == [1, 0, 0, 0, 0] and alike.tolist() == [True, False, True, True, True]
    assert newest_voter(q, lengths, Angles(f, last), rule, None)[2].tolist() == [0] * 5
    chosen = torch.stack([4 + torch.randperm(60)[:20].sort().values for _ in range(5)]).to(torch.int32)
    chosen[3, 9:], counts = -1, torch.tensor([20, 20, 20, 9, 20], dtype=torch.int32)
    chosen[3, :9], chosen[4] = torch.arange(4, 13), torch.arange(4, 24)
    chosen, counts = on(chosen, counts)
    for before in (vote, None):
        lists, places, now = (
            x if isinstance(x, tuple) else x.cpu()
            for x in tally(voter, edges, lengths, stands * (before is not None), chosen, counts, rule, before)
        )
        for row in range(5):
            stays = before is not None and row == 0
            won = (vote.winners if stays else chosen)[row]
            assert torch.equal(now.winners[row], won)
            assert torch.equal(now.query[row], (vote.query if stays else voter.flatten(1))[row])
            length, edge = int(lengths[row]), int(edges[row, 0])
            read = [0, 1, 2, 3, *won[won >= 0].tolist(), *range(edge, length)]
            assert lists[row].tolist() == read + [-1] * (32 - len(read))
            assert places[row, : len(read)].tolist() == list(range(length - len(read), length))
        assert now.held.tolist() == [True, True, True, False, False]


def test_refusals() -> None:
    voters, k, edges = torch.randn(1, 1, 4, 32), torch.randn(2, 9, 32), torch.ones(1, 1, dtype=torch.int32)
    wrong = [(voters.double(), k, edges), (voters, k[..., :16], edges), (voters, k, edges[0])]
    for (x, keys, ends), name in zip(wrong, ("voters", "voters", "edges"), strict=True):
        with pytest.raises(BadArgument, match=name):
            turned_votes(x, keys, 0, ends, speeds(16), 1.0)
    with pytest.raises(BadArgument, match="frequencies"):
        turned_votes(voters, k, 0, edges, speeds(20), 1.0)
    with pytest.raises(BadArgument, match="q"):
        newest_voter(torch.randn(1, 2, 2, 32), edges[0], Angles(speeds(16)), Rule(0, 1, 1, 0.5), None)
    lists = torch.zeros(2, 3, dtype=torch.int32)
    with pytest.raises(BadArgument, match="lists"):
        decode_framed(torch.randn(2, 2, 1, 32), k, k, lists, lists.long(), edges, speeds(16), scale=1.0)
