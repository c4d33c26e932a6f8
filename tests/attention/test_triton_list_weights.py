"""Lists that follow from the weights of a decode step, in Triton's interpreter or on a GPU."""

from __future__ import annotations

import pytest
import torch
from tests.attention.test_triton_decode import check, made, on, spoiled, truth
from tests.attention.test_triton_decode_weights import LENGTHS, weights
from tests.closeness import assert_close
from torch import Tensor

from foveate.attention import Selection
from foveate.errors import BadArgument

pytest.importorskip("triton")

from foveate.attention.triton import list_weights
from foveate.attention.triton.decode import Stores
from foveate.attention.triton.decode_weights import decode_scored
from foveate.attention.triton.list_weights import Scored, decode_lists_scored, replace_least, token_weights

CASES = [(torch.float32, 1, 48), (torch.bfloat16, 3, 64), (torch.float32, 8, 80), (torch.bfloat16, 20, 32)]


def read_slots(lists: Tensor, windows: Tensor, lengths: Tensor) -> list[list[int]]:
    """What each pair reads, in the order in which it reads it; -1 where an entry is not read."""
    found = []
    for pair, row in enumerate(lists.flatten(0, 1).tolist()):
        length, window = int(lengths[pair]), int(windows[pair % len(windows)])
        near = list(range(max(0, length - window), length))
        listed = [] if window >= length else [x if 0 <= x < length and x not in near else -1 for x in row]
        found.append(near + listed)
    return found


@pytest.mark.parametrize(
    ("dtype", "group", "dim", "windows"),
    [(*case, ends) for case, ends in zip(CASES, [[1, 1], [0, 1 << 30], [1 << 30, 0], [7, 0]], strict=True)],
)
def test_each_head_reads_its_list_and_its_window(
    seed: int, dtype: torch.dtype, group: int, dim: int, windows: list[int]
) -> None:
    torch.manual_seed(seed)
    q, k, v = made(dtype, 2, 2 * group, 1, dim, factor=2), made(dtype, 4, 131, dim), made(dtype, 4, 131, 24)
    lists = torch.stack([torch.randperm(131)[:40] for _ in range(4)]).to(torch.int32).view(2, 2, 40)
    lists[:, :, 11] = -1
    slots = read_slots(lists, torch.tensor(windows), LENGTHS)
    plain = torch.full((2, 2, 1, 131), -1, dtype=torch.int32)
    for pair, row in enumerate(slots):
        some = torch.tensor(sorted(x for x in row if x >= 0), dtype=torch.int32)
        plain[pair // 2, pair % 2, 0, : len(some)] = some
    want = truth(q, k, v, LENGTHS, Selection(plain), scale=0.2, softcap=5.0)
    logits = (q.double().view(4, group, dim) @ k.double().transpose(1, 2) * 0.2 / 5).tanh() * 5 * 1.4426950408889634
    q, k, v, held, listed = on(q, spoiled(k, LENGTHS), spoiled(v, LENGTHS), LENGTHS, lists)
    counts, ends = torch.full((1, 1), 40, dtype=torch.int32), torch.tensor(windows, dtype=torch.int32)
    counts, ends = on(counts, ends)
    *got, scores = decode_lists_scored(q, k, v, listed, counts.expand(2, 2), held, ends, 171, 0.2, 5.0)
    check((got[0], got[1]), want, dtype)
    if group == 3:
        same = decode_lists_scored(q, k, v, listed, counts.expand(2, 2), held, ends, 0, 0.2, 5.0, scored=False)
        assert torch.equal(same.out, got[0]) and torch.equal(same.lse, got[1])
    for pair, row in enumerate(slots):
        at = torch.tensor(row, dtype=torch.long)
        mine = logits[pair][:, at.clamp_min(0)].masked_fill(at < 0, -torch.inf)
        got = scores.cpu().view(4, group, -1)[pair, :, : len(row)]
        assert torch.equal(got == -torch.inf, mine == -torch.inf)
        real = at >= 0
        torch.testing.assert_close(got[:, real].double(), mine[:, real], atol=5e-5, rtol=1e-5)


@pytest.mark.parametrize(("dtype", "group", "dim", "mean"), [(*case, bool(i % 2)) for i, case in enumerate(CASES[1:])])
def test_what_heads_looked_at(seed: int, dtype: torch.dtype, group: int, dim: int, mean: bool) -> None:
    torch.manual_seed(seed)
    q, k, v = made(dtype, 2, 2 * group, 1, dim, factor=2), made(dtype, 4, 131, dim), made(dtype, 4, 131, 24)
    p = weights(q, k, LENGTHS, 0.2).view(2, 2, group, 131)
    p = p.sum(2) if mean else p.amax(2)
    place, length = torch.arange(131), LENGTHS.view(2, 2, 1)
    p = p.masked_fill(place >= length - 9, torch.inf).masked_fill(place >= length, -torch.inf)
    q, k, v, held = on(q, spoiled(k, LENGTHS), spoiled(v, LENGTHS), LENGTHS)
    read = Scored(*decode_scored(q, Stores(k, v, held), 131, 0.2))
    for heads in ([0, 1], [1]):
        (some,) = on(torch.tensor(heads, dtype=torch.int32))
        got = token_weights(read, held, some, 9, mean=mean).cpu()
        want = p[:, heads]
        assert torch.equal(got.isinf(), want.isinf()) and torch.equal(got > 0, want > 0)
        assert_close(got[got.isfinite()], want[want.isfinite()], 1e-5)


@pytest.mark.parametrize(
    ("group", "mean", "block"), [(1, False, 16), (3, True, 4096), (8, False, 4096), (20, True, 16)]
)
def test_the_newest_takes_the_place_of_the_least(
    seed: int, group: int, mean: bool, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One pair has a free place, one a list that is better than its newest token, and of equal ones the last leaves."""
    monkeypatch.setattr(list_weights, "_BLOCK", block)
    torch.manual_seed(seed)
    lengths = torch.tensor([130, 99, 77, 51], dtype=torch.int32)
    lists = torch.stack([torch.randperm(50)[:37] for _ in range(4)]).to(torch.int32).view(2, 2, 37)
    lists[0, 1, 5] = -1
    scores = torch.randn(4, group, 1 + 37)
    scores[2, :, 0] = -20  # its newest token
    scores[3, :, [4, 20, 33]] = -5
    scores[1, :, 6] = -torch.inf
    lse = scores.double().mul(0.6931471805599453).logsumexp(-1)
    p = (scores.double() * 0.6931471805599453 - lse.unsqueeze(-1)).exp()
    p = p.mean(1) if mean else p.amax(1)
    want = lists.clone().flatten(0, 1)
    for pair in range(4):
        free = (want[pair] < 0).nonzero().flatten()
        listed = want[pair].clone()
        order = sorted(range(37), key=lambda i: (f"{float(p[pair, 1 + i]):.9f}", -int(listed[i])))
        at = int(free[0]) if len(free) else order[0]
        if len(free) or p[pair, 1 + at] < p[pair, 0]:
            want[pair, at] = lengths[pair] - 1
    room = torch.full((2, 2 * group, 1, 50), torch.nan)
    room[..., :38] = scores.view(2, 2 * group, 1, 38)
    mass = lse.float().view(2, 2 * group, 1)
    out, mass, room, held, listed = on(torch.zeros(2, 2 * group, 1, 8), mass, room, lengths, lists)
    replace_least(listed, Scored(out, mass, room[..., :38]), held, mean=mean)
    assert torch.equal(listed.cpu().flatten(0, 1), want)
    assert torch.equal(want[2], lists.flatten(0, 1)[2]) and int(want[1, 5]) == 98


def test_refusals() -> None:
    q, k = torch.zeros(1, 4, 1, 64), torch.zeros(2, 40, 64)
    lists, held = torch.zeros(1, 2, 5, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    counts = held.view(1, 2)
    for bad in (
        (lists[:, :1], counts, held, held),
        (lists, counts.long(), held, held),
        (lists, counts, held, held[:1]),
    ):
        with pytest.raises(BadArgument, match="lists"):
            decode_lists_scored(q, k, k, *bad, 40, 0.1)
    read = Scored(q, q[..., 0], torch.zeros(1, 4, 1, 5))
    with pytest.raises(BadArgument, match="K \\+ 1"):
        replace_least(lists, read, held, mean=False)
