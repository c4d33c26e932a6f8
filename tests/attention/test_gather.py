"""The gathering backend reads what is selected and nothing else."""

from __future__ import annotations

import random

import pytest
import torch
from tests.attention.reads import Read, random_lists, random_read, tensors
from tests.closeness import LIMIT, assert_close

from foveate.attention import ALL, Geometry, Selection, Span, attend, gather, pieces
from foveate.attention.request import Request


def unread(read: Read) -> torch.Tensor:
    """Slots that no query reads: bool [B, Hk, M]."""
    mask = read.selection.mask(read.places(), read.heads, read.visible)
    return ~mask.any(2).unflatten(1, (read.k.shape[1], -1)).any(2)


def poisoned(read: Read) -> Read:
    hole = unread(read).unsqueeze(-1)
    k = read.k.masked_fill(hole, torch.nan)
    shared = read.v.untyped_storage().data_ptr() == read.k.untyped_storage().data_ptr()
    v = k[..., : read.v.shape[-1]] if shared else read.v.masked_fill(hole, torch.inf)
    return Read(read.q, k, v, read.selection, read.geometry, read.visible, read.options)


@pytest.mark.parametrize("number", range(40))
def test_slots_that_nobody_reads_may_hold_nan(seed: int, number: int) -> None:
    read = random_read(seed)
    while not unread(read).any():
        seed += 1
        read = random_read(seed)
    clean, got = read.attend(backend="gather"), poisoned(read).attend(backend="gather")
    assert got.out.isfinite().all()
    # The very same numbers, not merely close ones: the poison was never touched.
    assert torch.equal(got.out, clean.out)
    assert torch.equal(got.lse, clean.lse)


@pytest.mark.parametrize("turned", ["k", "v", "kv"])
@pytest.mark.parametrize("queries", [1, 70])
def test_keys_and_values_may_lie_in_any_order(seed: int, queries: int, turned: str) -> None:
    """As projections leave them, heads inside tokens: no table of rows that heads could be found in."""
    torch.manual_seed(seed)
    q, k, v = tensors(2, 6, 2, queries, 100, 16)
    lists = torch.tensor([0, 3, 4, 9, -1], dtype=torch.int32).expand(2, 2, 1, 5)
    want = attend(q, k, v, Selection(lists, None, 10), backend="gather")
    k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) if n in turned else x for n, x in (("k", k), ("v", v)))
    got = attend(q, k, v, Selection(lists, None, 10), backend="gather")
    assert_close(got.out, want.out, LIMIT[torch.float64])


@pytest.mark.parametrize("queries", [1, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_that_was_never_written_may_be_listed(seed: int, queries: int, dtype: torch.dtype) -> None:
    """The last block of a cache is half full, and a list that names it names slots beyond the length."""
    torch.manual_seed(seed)
    q, k, v = (x.to(dtype) for x in tensors(2, 6, 2, queries, 100, 16))
    lengths = torch.tensor([[90, 85], [75, 83]])
    for b in range(2):
        for h in range(2):
            k[b, h, lengths[b, h] :] = torch.nan
            v[b, h, lengths[b, h] :] = torch.nan
    lists = torch.tensor([0, 3, 4, 5, 6, -1], dtype=torch.int32).expand(2, 6, 1, 6)
    geometry = Geometry(2, queries, 100, lengths, lengths - queries, torch.arange(queries).expand(2, -1) + 90)
    got = attend(q, k, v, Selection(lists, None, 16), geometry, backend="gather")
    want = Read(q, k.nan_to_num(0.0), v.nan_to_num(0.0), Selection(lists, None, 16), geometry).truth()
    assert_close(got.out, want.out, LIMIT[dtype])
    assert_close(got.lse, want.lse, min(LIMIT[dtype], 1e-3))


def fetched(q: torch.Tensor, k: torch.Tensor, selection: Selection, visible: tuple[Span, ...] = ()) -> int:
    """Slots fetched in all, per store head."""
    request = Request(
        q,
        k,
        k,
        Geometry(q.shape[0], q.shape[2], k.shape[2]),
        1.0,
        visible,
        selection.lists,
        selection.q_block,
        selection.k_block,
    )
    return sum(piece.slots.shape[0] * piece.slots.shape[-1] for piece in pieces.pieces(request))


def test_spans_cost_their_width_not_the_length() -> None:
    costs = []
    for length in (1000, 2000, 4000):
        q = torch.zeros(1, 2, length, 4)
        costs.append(fetched(q, q, ALL, (Span(16, 100),)) * 1.0)
    # Linear: doubling the length doubles the cost; per query block it is the sinks, the window and the block itself.
    assert 1.9 < costs[1] / costs[0] < 2.1
    assert 1.9 < costs[2] / costs[1] < 2.1
    rows = 64
    assert costs[2] <= 4000 / rows * (16 + 100 + rows) * 1.05


def test_lists_cost_the_longest_in_use_not_their_padding() -> None:
    q = torch.zeros(1, 2, 640, 4)
    lists = torch.full((1, 1, 10, 80), -1, dtype=torch.int32)
    lists[..., 0] = 0
    lists[0, 0, 7, :3] = torch.tensor([0, 1, 5])
    assert (9 + 3) * 8 <= fetched(q, q, Selection(lists, 64, 8)) <= 10 * 3 * 8


def test_heads_of_different_length_do_not_wait_for_each_other(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(seed)
    q, k, v = (x.float() for x in tensors(2, 4, 2, 128, 128, 8))
    lists = torch.full((2, 4, 8, 16), -1, dtype=torch.int32)
    lists[..., 0] = 0
    lists[0, 1] = torch.arange(16)
    widths = []
    inner = gather._run

    def watched(request: Request) -> object:
        widths.append(int((request.lists >= 0).sum(-1).max()))
        return inner(request)

    monkeypatch.setattr(gather, "_run", watched)
    read = Read(q, k, v, Selection(lists, 16, 8))
    got = read.attend(backend="gather")
    assert sorted(widths) == [1] * 7 + [16]
    assert_close(got.out, read.truth().out, 1e-6)


@pytest.mark.parametrize("number", range(6))
def test_uneven_lists_with_everything_else(seed: int, number: int) -> None:
    """Rows and heads of their own length, spans per head and a bias survive being taken apart."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    q, k, v = tensors(3, 6, 3, 40, 96, 8)
    lists = random_lists(rng, (3, rng.choice([3, 6]), 5), 12, 12)
    lists[0, 0] = torch.arange(12)
    lists[1:, :, :, 2:] = -1
    lengths = torch.randint(50, 97, (3, 3))
    geometry = Geometry(3, 40, 96, lengths, lengths - 40, torch.arange(40).expand(3, -1) + 90)
    span = Span(torch.tensor([0, 2, 5]), torch.tensor([3, 9, 30]), torch.tensor([0, 1, 2]))
    read = Read(q, k, v, Selection(lists, 8, 8, span), geometry, (Span(torch.tensor([9, 20, 40]), 50),))
    read.options = {"bias": torch.randn(3, 6, 40, 96, dtype=torch.float64), "softcap": 4.0}
    got, want = read.attend(backend="gather"), read.truth()
    assert_close(got.out, want.out, 1e-12)
    assert_close(got.lse, want.lse, 1e-12)


@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}])
@pytest.mark.parametrize("backend", ["sdpa", "gather"])
def test_gradients_reach_the_inputs(seed: int, backend: str, options: dict[str, float]) -> None:
    torch.manual_seed(seed)
    lists = torch.tensor([[0, 3], [1, 4]], dtype=torch.int32).view(1, 1, 2, 2)
    for selection in (ALL, Selection(span=Span(1, 6)), Selection(lists, 4, 4)):
        read = Read(*(x.requires_grad_() for x in tensors(1, 4, 2, 8, 20, 6)), selection, options=dict(options))
        weight = torch.randn_like(read.q)
        inputs = (read.q, read.k, read.v)
        want = torch.autograd.grad((read.truth().out * weight).sum(), inputs)
        got = torch.autograd.grad((read.attend(backend=backend).out * weight).sum(), inputs)
        for one, other in zip(got, want, strict=True):
            assert_close(one, other, 1e-10)
