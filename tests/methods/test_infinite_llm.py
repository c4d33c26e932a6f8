"""Infinite-LLM: must-hold tests of its card."""

from __future__ import annotations

import pytest
import torch
from tests.closeness import assert_close
from tests.contract.runs import dense_bytes, left_padded, run, tokens
from tests.methods.runs import TOLERANCE, applied, llama, logits, prompt, stores

import foveate
from foveate.attention import Geometry, Selection, attend, merge
from foveate.cache import PlacedColumn
from foveate.cache.ledger import DEVICE, HOST, ledger_of
from foveate.engine import apart
from foveate.methods import InfiniteLLM
from foveate.models import tiny

SMALL = {"block": 4, "device": 16}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("holders", [1, 2, 5])
def test_any_partition_in_any_order_is_dense(holders: int, seed: int) -> None:
    """Blocks of one request among any number of holders: partial attention of each, merged, is one softmax."""
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, h, n, 8, generator=g).double() for h, n in ((6, 1), (2, 43), (2, 43)))
    owner = torch.randint(0, holders, (11,), generator=g)
    parts = []
    for holder in torch.randperm(holders, generator=g).tolist():
        blocks = (owner == holder).nonzero().squeeze(-1).to(torch.int32)
        if len(blocks):
            lists = blocks.expand(2, 1, 1, -1)
            parts.append(attend(q, k, v, Selection(lists=lists, k_block=4), Geometry(2, 1, 43)))
    want, got = attend(q, k, v), merge(parts)
    torch.testing.assert_close(got.out, want.out, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(got.lse, want.lse, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
@pytest.mark.parametrize("chunk", [None, 7])
def test_nothing_is_lost(kv_heads: int, chunk: int | None) -> None:
    model = llama(kv_heads=kv_heads)
    rows = [tokens(i, n) for i, n in enumerate((3, 17, 61))]
    ids, mask = left_padded(rows)
    then = tokens(9, 3, 20)
    with foveate.apply(model, "dense") as handle:
        want = run(model, handle.cache(), ids, then, mask)
    with foveate.apply(model, InfiniteLLM(**SMALL)) as handle:
        cache = handle.cache()
        got = run(model, cache, ids, then, mask, chunk)
    assert_close(got.prompt[mask.bool()], want.prompt[mask.bool()], TOLERANCE)
    assert_close(got.steps, want.steps, TOLERANCE)
    for store in stores(cache):
        assert store.away[:, 0].tolist() == [8, 24, 68]  # of 23, 37 and 81 tokens, 16 at most stay


def test_whole_blocks_leave_oldest_first() -> None:
    model, ids = llama(layers=2), prompt(2, 41)
    _, dense = applied(model, "dense", ids)
    _, cache = applied(model, InfiniteLLM(**SMALL), ids)
    for store, whole in zip(stores(cache), stores(dense), strict=True):
        (band,) = store.bands
        assert isinstance(band.k, PlacedColumn) and isinstance(band.v, PlacedColumn)
        assert band.away.tolist() == [28] * 4  # 7 blocks; 13 of 16 places on the device are taken
        assert torch.equal(band.k.far.data[:, :28], whole.bands[0].keys()[:, :28])  # rotated as they were
        assert torch.equal(band.v.near.data[:, :13], whole.bands[0].values()[:, 28:])
        assert band.k.far.data.device == torch.device("cpu")


@pytest.mark.parametrize("share", [0.2, 0.5])
def test_the_device_holds_its_share(share: float) -> None:
    """The budget is what the device may hold at the prompt's length; it holds no more however long the text gets."""
    model, ids = llama(layers=3), prompt(2, 200)
    _, dense = applied(model, "dense", ids)
    _, cache = applied(model, InfiniteLLM(block=4, budget=share), ids)
    slot = 2 * 2 * 16 * 4  # kv heads, sides, head size, bytes
    spare = 3 * 2 * (16 * slot + 2 * 12)
    whole = dense_bytes(model, dense)
    assert share * whole - 4 * 6 * slot <= cache.nbytes <= share * whole + spare
    assert cache.nbytes + cache.host_nbytes <= whole + spare + 3 * 2 * 12
    before = cache.nbytes
    with foveate.apply(model, InfiniteLLM(block=4, budget=share)) as handle:
        longer = handle.cache()
        run(model, longer, ids, prompt(2, 40, seed=1))
    assert longer.nbytes <= before + 3 * 2 * 16 * slot
    assert longer.host_nbytes >= cache.host_nbytes + 3 * 2 * 36 * slot


def test_a_prompt_in_pieces_never_needs_more_than_a_piece_besides() -> None:
    model, ids = llama(layers=3), prompt(1, 200)
    slot = 2 * 2 * 16 * 4
    _, cache = applied(model, InfiniteLLM(**SMALL), ids, chunks=10)
    assert cache.peak_nbytes <= 3 * (16 + 10 + 16) * slot + 3 * 2 * 12
    assert cache.host_nbytes >= 3 * 184 * slot


def test_what_crosses_over_does_not_grow_with_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Per layer and step, one query goes out, one output and one lse come back, whatever the length."""
    model, crossed = llama(layers=2), {}
    original = apart.attend
    for length in (40, 120):
        sizes = crossed.setdefault(length, [])

        def note(q, k, *args, sizes=sizes, **kwargs):
            part = original(q, k, *args, **kwargs)
            sizes.append((q.numel(), part.out.numel(), part.lse.numel()))
            return part

        with foveate.apply(model, InfiniteLLM(**SMALL)) as handle:
            cache = handle.cache()
            run(model, cache, prompt(2, length), prompt(2, 1, seed=2))
            monkeypatch.setattr(apart, "attend", note)
            monkeypatch.setattr(PlacedColumn, "read", None)  # no token comes back
            with torch.no_grad():
                model(prompt(2, 1, seed=1), past_key_values=cache)
            monkeypatch.undo()
    # rows * heads * head size, twice per layer: on the device and on the host
    assert crossed[40] == crossed[120] == [(2 * 6 * 16, 2 * 6 * 16, 2 * 6)] * 4


def test_masses_are_merged_in_float32(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16 two parts whose masses were rounded would not add up to one softmax."""
    masses, original = [], apart.attend_apart

    def note(*args, **kwargs):
        parts = original(*args, **kwargs)
        masses.extend(part.lse for part in parts)
        return parts

    monkeypatch.setattr("foveate.engine.read.attend_apart", note)
    ids, steps = prompt(2, 61, seed % 10**6), prompt(2, 2, seed % 10**6 + 1)
    applied(llama(layers=1, dtype=torch.bfloat16), InfiniteLLM(**SMALL), ids, steps)
    assert len(masses) == 4  # two steps, device and host
    assert all(lse.dtype == torch.float32 and (lse != lse.bfloat16()).any() for lse in masses)


def test_full_memories_refuse_and_nothing_changes() -> None:
    model = llama(layers=2)
    ids, then = prompt(2, 41), prompt(2, 4, seed=1)
    want, _ = logits(model, ids, then)
    with foveate.apply(model, InfiniteLLM(**SMALL, host=28)) as handle, torch.no_grad():
        cache = handle.cache()
        cache.expect(41)
        model(ids, past_key_values=cache)
        for i in range(3):
            got = model(then[:, i : i + 1], past_key_values=cache).logits[:, -1]
            assert_close(got, want[:, i + 1], TOLERANCE)
        held = (cache.nbytes, cache.host_nbytes)
        with pytest.raises(foveate.Refused, match=r"infinite-llm: a row would have 45 tokens.*44"):
            model(then[:, 3:], past_key_values=cache)
        assert (cache.nbytes, cache.host_nbytes, cache.get_seq_length()) == (*held, 44)
        cache.crop(-1)  # room for one
        assert_close(model(then[:, 2:3], past_key_values=cache).logits[:, -1], want[:, 3], TOLERANCE)
        cache.batch_select_indices(torch.tensor([1]))
        with pytest.raises(foveate.Refused):
            model(then[:1, 3:], past_key_values=cache)
        long = handle.cache()
        with pytest.raises(foveate.Refused, match="50 tokens"):
            model(prompt(1, 50), past_key_values=long)


def test_the_books_of_a_cache_add_up() -> None:
    """Blocks, lengths and bytes tell one story, through steps, beams and crops; a row that ends gives all back."""
    model, ids = llama(layers=2), prompt(2, 41)
    with foveate.apply(model, InfiniteLLM(**SMALL, host=40)) as handle, torch.no_grad():
        cache = handle.cache()
        cache.expect(41)
        model(ids, past_key_values=cache)
        for step in range(9):
            model(prompt(len(ids), 1, seed=step), past_key_values=cache)
            if step == 4:
                cache.batch_repeat_interleave(2)
                ids = ids.repeat(2, 1)
            if step == 6:
                cache.crop(-3)
            for store in stores(cache):
                books = ledger_of(store)
                assert len(books.table) == store.rows * 2
                for (row, head), holders in books.table.items():
                    assert len(holders) == -(-int(store.lengths[row, head]) // 4)
                    assert holders == sorted(holders, reverse=True), "the oldest are away"
                assert books.lent(HOST) == books.borrowed(DEVICE) == store.away.sum() // 4
                assert books.free(DEVICE) >= 0 and books.free(HOST) >= 0
                assert store.host_nbytes >= 2 * store.away.sum() * 16 * 4
        before = ledger_of(stores(cache)[0])
        cache.batch_select_indices(torch.tensor([0]))
        after = ledger_of(stores(cache)[0])
        assert 4 * after.lent(HOST) == before.lent(HOST)
    with pytest.raises(foveate.BadArgument, match="store"):
        ledger_of(stores(applied(model, "dense", prompt(1, 9))[1])[0])


def test_windows_do_not_borrow() -> None:
    model = tiny("gemma3", layers=4, heads=4, kv_heads=2)
    _, cache = applied(model, InfiniteLLM(**SMALL), prompt(1, 61))
    kinds = {(store.spec.place is None, bool(store.away.any())) for store in stores(cache)}
    assert kinds == {(True, False), (False, True)}


def test_below_the_floor_is_refused_with_it() -> None:
    with foveate.apply(llama(layers=2), "dense") as handle:
        with pytest.raises(foveate.Infeasible) as error:
            handle.bind(InfiniteLLM(block=16), budget=0.05).check(200)
        assert error.value.floor >= 16 / 200


@pytest.mark.parametrize("bad", [{"block": 0}, {"device": 8}, {"host": -1}])
def test_bad_parameters(bad: dict) -> None:
    with pytest.raises(foveate.BadArgument, match=next(iter(bad))):
        InfiniteLLM(**bad)
