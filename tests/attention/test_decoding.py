"""The decoding backend against the reference: reads of one query, in Triton's interpreter on a CPU."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.attention.reads import Read, random_lists, tensors
from tests.closeness import LIMIT, assert_close

from foveate.attention import Geometry, Selection, Span, decoding
from foveate.attention.backends import choose
from foveate.attention.request import normal
from foveate.cache import Blocks, Store, StoreSpec, View
from foveate.cache.fixed_store import FixedStore
from foveate.errors import BadArgument
from foveate.methods.policies.lists import top_lists
from foveate.methods.policies.summaries import minmax, page_scores

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(not decoding._interpreted(), reason="kernels run here in Triton's interpreter")


def check(read: Read, dtype: torch.dtype) -> None:
    want = read.truth(dtype)
    got = read.attend(dtype, backend="decode")
    assert_close(got.out, want.out, LIMIT[dtype])
    assert_close(got.lse, want.lse, min(LIMIT[dtype], 1e-3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group", [1, 3, 8])
def test_lengths(seed: int, group: int, dtype: torch.dtype) -> None:
    torch.manual_seed(seed)
    stores = {1: 4, 3: 2, 8: 1}[group]
    q, k, v = tensors(2, group * stores, stores, 1, 97, 16, 24)
    lengths = torch.randint(1, 98, (2, stores), dtype=torch.int32)
    check(Read(q, k, v, geometry=Geometry(2, 1, 97, lengths)), dtype)
    check(Read(q, k, v), dtype)


@pytest.mark.parametrize("near", [None, Span(3, 20)])
@pytest.mark.parametrize("heads", [1, 2, 6])
@pytest.mark.parametrize("page", [1, 16])
def test_lists(seed: int, page: int, heads: int, near: Span | None) -> None:
    torch.manual_seed(seed)
    q, k, v = tensors(2, 6, 2, 1, 91, 16)
    lists = random_lists(random.Random(seed), (2, heads, 1), -(-91 // page), 4 if page > 1 else 23)
    check(Read(q, k, v, Selection(lists=lists, q_block=1, k_block=page, span=near)), torch.float32)


@pytest.mark.parametrize("heads", [1, 2, 6])
def test_counts_that_are_known_are_not_counted(seed: int, heads: int) -> None:
    """The entries of lists may be handed on, also where each store head is read by heads of its own (v_map)."""
    torch.manual_seed(seed)
    q, k, v = tensors(2, 6, 2, 1, 91, 16)
    lists = random_lists(random.Random(seed), (2, heads, 1), 12, 5)
    counts = (lists >= 0).sum(-1, dtype=torch.int32)
    known = Selection(lists=lists, q_block=1, k_block=8, counts=counts)
    check(Read(q, k, v, known), torch.float32)
    assert torch.equal(known.rows(0, 1).counts, counts)
    fewer = counts // 2
    want = Read(q, k, v, replace(known, lists=lists.masked_fill(torch.arange(5) >= fewer.unsqueeze(-1), -1))).truth()
    told = Read(q, k, v, replace(known, counts=fewer)).attend(torch.float32, backend="decode")
    assert_close(told.out, want.out, LIMIT[torch.float32])
    if heads != 1:
        more = torch.cat([v, v], dim=1)
        check(Read(q, k, more, known, options={"v_map": (0, 0, 1, 1, 2, 3)}), torch.float32)
    with pytest.raises(BadArgument, match="counts"):
        Read(q, k, v, replace(known, counts=counts[..., 0])).attend(torch.float32)


def test_it_says_what_it_does_not_serve(seed: int) -> None:
    q, k, v = tensors(1, 4, 2, 3, 40, 16)
    for read, why in (
        (Read(q, k, v), "one query"),
        (Read(q[:, :, :1].double(), k.double(), v.double()), "float64"),
        (Read(q[:, :, :1], k, v, visible=(Span(0, 5),)), "positions"),
    ):
        dtype = torch.float64 if why == "float64" else torch.float32
        request = normal(
            *(x.to(dtype) for x in (read.q, read.k, read.v)), read.selection, read.places(), read.visible, None, None,
            0.25, None, None, True, True,
        )  # fmt: skip
        able, reason = decoding.can_run(request)
        assert not able and why in reason
        assert choose(replace(request, forced=False)).name != "decode"


def two_bands() -> tuple[Store, torch.Tensor, torch.Tensor]:
    """A store of two rows, of whose heads one promises a window, which is full."""
    store = Store(StoreSpec(heads=2, spans=(WINDOW,)))
    k, v = torch.randn(2, 2, 2, 50, 16).unbind(0)
    store.append(k, v, None)
    store.settle(store.seen)
    return store, k, v


WINDOW = Span(2, torch.tensor([1 << 30, 9]))


def test_bands_in_one_launch(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernels take in and read is attention over what each head holds, and what PyTorch takes in."""
    torch.manual_seed(seed)
    store, past_k, past_v = two_bands()
    twin = FixedStore(store.fork(), room=30)
    monkeypatch.setattr(decoding, "serves", lambda q, forced=False: (False, ""))
    assert twin.kernels is None
    monkeypatch.setattr(decoding, "serves", lambda q, forced=False: (True, ""))
    fixed = FixedStore(store, room=30)
    assert fixed.kernels is not None
    for _ in range(25):
        new_k, new_v, q = (torch.randn(2, h, 1, 16) for h in (2, 2, 6))
        fixed.append(new_k, new_v)
        with monkeypatch.context() as patch:
            patch.setattr(decoding, "serves", lambda q, forced=False: (False, ""))
            twin.append(new_k, new_v)
        past_k, past_v = torch.cat([past_k, new_k], 2), torch.cat([past_v, new_v], 2)
        got = fixed.attend(q, 0.25, None, None)
        want = Read(q, past_k, past_v, visible=(WINDOW,), options={"scale": 0.25}).truth()
        assert got is not None
        assert_close(got, want.out, LIMIT[torch.float32])
        for a, b in zip(fixed.bands, twin.bands, strict=True):
            used = int(a.lengths.max())
            assert torch.equal(a.lengths, b.lengths) and torch.equal(a.seen, b.seen) and torch.equal(a.turn, b.turn)
            assert torch.equal(a.keys()[:, :used], b.keys()[:, :used])
            assert torch.equal(a.values()[:, :used], b.values()[:, :used])
            assert torch.equal(a.slot_positions()[:, :used], b.slot_positions()[:, :used])


@pytest.mark.parametrize(
    ("dtype", "dim", "size"), [(torch.float32, 16, 5), (torch.bfloat16, 128, 16), (torch.float16, 80, 40)]
)
def test_extremes_of_blocks_arrive_with_the_tokens(
    seed: int, dtype: torch.dtype, dim: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit what is folded anew, by rows of different lengths, also when a step is made twice."""
    torch.manual_seed(seed)
    blocks = {"sums": Blocks(3, lambda k, v, valid: k.masked_fill(~valid.unsqueeze(-1), 0.0).sum(2))}
    store = Store(StoreSpec(heads=2, blocks={**blocks, "ends": Blocks(size, minmax)}))
    k, v = torch.randn(2, 3, 2, 44, dim).to(dtype).unbind(0)
    store.append(k, v, np.array([44, 40, 9]))
    twin = store.fork()
    monkeypatch.setattr(decoding, "serves", lambda q, forced=False: (True, ""))
    fixed = FixedStore(store, room=45)
    assert fixed.kernels is not None
    (band,) = fixed.bands
    for i in range(2 * size + 1 if size < 40 else 7):
        new_k, new_v = torch.randn(2, 3, 2, 1, dim).to(dtype).unbind(0)
        twin.append(new_k, new_v, None)
        counted = [t.clone() for t in fixed.counters()]
        fixed.append(torch.randn_like(new_k), new_v)
        for t, before in zip(fixed.counters(), counted, strict=True):
            t.copy_(before)
        fixed.append(new_k, new_v)
        for name, want in twin.bands[0].summaries.items():
            for pair, length in enumerate(band.lengths.tolist()):
                used = -(-length // store.spec.blocks[name].size)
                assert torch.equal(band.summaries[name][pair, :used], want[pair, :used]), (name, i, pair)


@pytest.mark.parametrize("group", [False, True])
def test_pages_and_lists_as_pytorch_chooses_them(seed: int, group: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bounds and best pages of the kernels are those of the plain path."""
    torch.manual_seed(seed)
    store = Store(StoreSpec(heads=2, blocks={"pages": Blocks(8, minmax)}))
    k, v = torch.randn(2, 3, 2, 77, 16).unbind(0)
    store.append(k, v, np.array([77, 64, 9]))
    view, q = View(store, np.ones(3, dtype=np.int64)), torch.randn(3, 6, 1, 16)
    monkeypatch.setattr(decoding, "serves", lambda x, forced=False: (False, ""))
    want = page_scores(q, view, "pages", 8, group=group)
    listed, everything = top_lists(want, 4), top_lists(want, 99)
    monkeypatch.setattr(decoding, "serves", lambda x, forced=False: (True, ""))
    got = page_scores(q, view, "pages", 8, group=group)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert torch.equal(top_lists(want, 4), listed)
    assert torch.equal(top_lists(want, 99), everything) and everything.shape[-1] == want.shape[-1] == 10
