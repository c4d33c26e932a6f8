"""Scores and lists for decode steps, in Triton's interpreter or on a GPU."""

from __future__ import annotations

import pytest
import torch
from tests.attention.test_triton_decode import DEVICE, made, on
from tests.closeness import assert_close

from foveate.errors import BadArgument
from foveate.methods.policies.lists import top_lists
from foveate.methods.policies.summaries import bound_scores, minmax

pytest.importorskip("triton")

from foveate.attention.triton import topk
from foveate.attention.triton.code_scores import code_scores
from foveate.attention.triton.topk import page_bounds, select_best


@pytest.mark.parametrize(("dtype", "dim"), [(torch.float32, 64), (torch.bfloat16, 80), (torch.float16, 128)])
@pytest.mark.parametrize("group", [False, True])
def test_bounds_of_pages(seed: int, dtype: torch.dtype, dim: int, group: bool) -> None:
    torch.manual_seed(seed)
    lengths = torch.tensor([[150, 33], [1, 96]], dtype=torch.int32)
    k = made(dtype, 4, 10, 16, dim)
    valid = (torch.arange(160) < lengths.flatten()[:, None]).view(4, 10, 16)
    summary, q = minmax(k, k, valid), made(dtype, 2, 6, 1, dim)
    want = bound_scores(q.double(), summary.double().view(2, 2, 10, -1))[:, :, 0]
    newest = ((lengths - 1) // 16).repeat_interleave(3, dim=1).unsqueeze(-1)
    want = want.masked_fill(torch.arange(10) == newest, torch.inf).masked_fill(torch.arange(10) > newest, -torch.inf)
    if group:
        want = want.view(2, 2, 3, 10).amax(2)
    q, summary, lengths = on(q, summary, lengths)
    assert_close(page_bounds(q, summary, lengths, 16, group=group).cpu(), want, 1e-5)


@pytest.mark.parametrize("k", [1, 5, 64, 300])
def test_lists_are_exact_and_the_first_of_equals_wins(seed: int, k: int) -> None:
    torch.manual_seed(seed)
    scores = torch.randn(5, 200)
    scores[0] = scores[0].round()  # many ties
    scores[1] = 0.0
    scores[1, ::3] = -0.0
    scores[2, 50:] = -torch.inf
    scores[3, 7], scores[3, 100], scores[3, 9] = torch.inf, torch.inf, -3e38
    scores[4] = -torch.inf
    want = top_lists(scores, k)
    lists, counts = (x.cpu() for x in select_best(on(scores)[0], k))
    assert torch.equal(lists, want)
    assert torch.equal(counts, (want >= 0).sum(-1, dtype=torch.int32))


def test_scores_of_every_size_are_told_apart(seed: int) -> None:
    """Neighbouring numbers, the largest and the smallest that there are, and what is no number, which is not chosen."""
    torch.manual_seed(seed)
    near = torch.tensor(37.5).view(torch.int32) + torch.randint(0, 90, (150,), dtype=torch.int32)
    scores = torch.stack([
        near.view(torch.float32),
        -near.view(torch.float32),
        torch.randn(150) * 10.0 ** torch.randint(-44, 38, (150,)),
        torch.tensor([3.4028234e38, -3.4028234e38, 1e-45, -1e-45, 0.0]).repeat(30),
        torch.where(torch.rand(150) < 0.3, torch.inf, torch.randn(150)),
    ])  # fmt: skip
    for k in (1, 2, 30, 31, 61, 149):
        assert torch.equal(select_best(on(scores)[0], k)[0].cpu(), top_lists(scores, k))
    scores[:, ::3] = torch.nan
    lists, counts = (x.cpu() for x in select_best(on(scores)[0], 120))
    assert torch.equal(lists, top_lists(scores.nan_to_num(-torch.inf, torch.inf), 120)) and (counts == 100).all()


@pytest.mark.parametrize("k", [3, 20, 90])
def test_long_rows_are_ordered_in_pieces(seed: int, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(seed)
    monkeypatch.setattr(topk, "AT_ONCE", 64)
    scores = torch.randn(2, 1, 400).mul(4).round()
    scores[0, :, 30:] = -torch.inf
    want = top_lists(scores, k)
    lists, counts = (x.cpu() for x in select_best(on(scores)[0], k))
    assert torch.equal(lists, want)
    assert torch.equal(counts, (want >= 0).sum(-1, dtype=torch.int32))


def test_pieces_side_by_side(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that one program could order are split among several where lists are short."""
    torch.manual_seed(seed)
    monkeypatch.setattr(topk, "PIECE", 16)
    scores = torch.randn(3, 301).mul(2).round()
    scores[0, 40:] = -torch.inf
    scores[1] = 7.0
    for k in (1, 2, 11):
        lists, counts = (x.cpu() for x in select_best(on(scores)[0], k))
        assert torch.equal(lists, top_lists(scores, k)) and (counts == k).all()


@pytest.mark.parametrize(("at_once", "n", "k"), [(16384, 90, 20), (64, 400, 20), (64, 130, 90)])
def test_rows_have_limits_of_their_own(seed: int, at_once: int, n: int, k: int, monkeypatch) -> None:
    """None, some, more than there are, more than a list holds; of whole rows, of pieces, and where all is ordered."""
    torch.manual_seed(seed)
    monkeypatch.setattr(topk, "AT_ONCE", at_once)
    scores = torch.randn(5, n).mul(3).round()
    scores[2, 7:] = -torch.inf
    scores[3, ::9] = torch.inf
    limits = torch.tensor([0, 13, 9, 2, 1000])
    want = [
        top_lists(row, int(limit))[:k].tolist() if limit else []
        for row, limit in zip(scores, limits.clamp_max(k), strict=True)
    ]
    want = [[n for n in row if n >= 0] for row in want]
    lists, counts = (x.cpu() for x in select_best(*on(scores), k, *on(limits)))
    assert (
        [[n for n in row if n >= 0] for row in lists.tolist()]
        == want
        == [row[:count] for row, count in zip(lists.tolist(), counts.tolist(), strict=True)]
    )
    assert torch.equal(top_lists(scores, k, limits), lists)


@pytest.mark.parametrize(("stores", "group", "capacity", "shared"), [(2, 3, 1500, False), (1, 1, 40, True)])
def test_scores_of_codes(seed: int, stores: int, group: int, capacity: int, shared: bool) -> None:
    torch.manual_seed(seed)
    table = torch.randn(2, stores, group, 3, 17)
    codes = torch.randint(-1, 17, (2, stores, capacity), dtype=torch.int16)
    seen = (torch.rand(2, stores, 3, capacity) < 0.8) & (codes >= 0).unsqueeze(2)
    forced = torch.rand(2, 1 if shared else stores, 3, capacity) < 0.1
    want = table.gather(-1, codes.long().clamp_min(0)[:, :, None, None].expand(-1, -1, group, 3, -1))
    want = torch.where((seen & ~forced).unsqueeze(2), want, -torch.inf)
    assert torch.equal(code_scores(*on(table, codes, seen, forced)).cpu(), want)
    with pytest.raises(BadArgument, match="masks that fit"):
        code_scores(*on(table, codes, seen[..., 1:], forced))


def test_refusals() -> None:
    with pytest.raises(BadArgument, match="one number for each row"):
        select_best(torch.zeros(3, 4), 2, torch.ones(2))
    with pytest.raises(BadArgument, match="float32"):
        select_best(torch.zeros(3, dtype=torch.float16), 2)
    with pytest.raises(BadArgument, match="same dtype"):
        page_bounds(torch.zeros(1, 2, 1, 16), torch.zeros(1, 3, 32).half(), torch.zeros(1, 1, dtype=torch.int32), 16)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="rows of this length take the interpreter too long")
@pytest.mark.parametrize(("n", "k"), [(8192, 128), (8704, 256), (16384, 2048), (131072, 2048), (100001, 700)])
def test_lists_of_a_real_size(seed: int, n: int, k: int) -> None:
    torch.manual_seed(seed)
    scores = torch.randn(8, n)
    lists, _ = select_best(scores.to(DEVICE), k)
    assert torch.equal(lists.cpu(), top_lists(scores, k))
