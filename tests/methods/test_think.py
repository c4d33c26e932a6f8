"""ThinK: must-hold tests of its card."""

from __future__ import annotations

import os

import pytest
import torch
from tests.closeness import assert_close, relative_rms
from tests.contract.recorded import steps, steps_in_place
from tests.contract.runs import left_padded, tokens
from tests.methods.runs import TOLERANCE, applied, held, llama, logits, prompt, stores, watching
from torch import Tensor

import foveate
from foveate.cache import Observed, PackedColumn
from foveate.methods import KIVI, SnapKV, StreamingLLM, ThinK
from foveate.methods.policies.channels import Thinned
from foveate.models.shape import ModelShape

SMALL = {"ratio": 0.9, "recent": 5, "window": 7}


def whole(length: int) -> Tensor:
    """All of P=1 pair's tokens are real."""
    return torch.tensor([length], dtype=torch.int32)


def seen(q: Tensor) -> Observed:
    """Queries [P, G, W, D], all real."""
    return Observed(q, torch.ones(q.shape[0], q.shape[2], dtype=torch.bool))


def bodies(cache) -> list[PackedColumn]:
    columns = [band.k for store in stores(cache) for band in store.bands]
    assert all(isinstance(c, PackedColumn) for c in columns)
    return columns  # type: ignore[return-value]


def test_nothing_dropped_is_dense() -> None:
    model, ids, steps = llama(), prompt(2, 61), prompt(2, 7, seed=1)
    want, _ = logits(model, ids, steps)
    got, cache = applied(model, ThinK(ratio=0.0), ids, steps)
    assert_close(got, want, TOLERANCE)
    assert not any(isinstance(band.k, PackedColumn) for store in stores(cache) for band in store.bands)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (8, 1)])
def test_channels_are_ranked_by_their_share_of_the_logits(heads: int, kv_heads: int) -> None:
    """The kept channels are those whose rank-one parts of Q K^T, over all heads of the group, weigh most."""
    model, ids = llama(heads=heads, kv_heads=kv_heads, layers=1), prompt(2, 61)
    with watching() as reads:
        applied(model, "dense", ids)
    q = reads[0]["q"][:, :, -9:].unflatten(1, (kv_heads, -1))
    k = reads[0]["store"].bands[0].keys().unflatten(0, (2, kv_heads))
    part = torch.einsum("bsgwd,bsmd->bsdgwm", q, k).square().sum((3, 4, 5)).flatten(0, 1)
    _, cache = applied(model, ThinK(ratio=0.6, window=9), ids)
    (column,) = bodies(cache)
    want = part.topk(16 - 9).indices.sort().values  # floor(0.6 * 16) = 9 go
    assert torch.equal(column.fitted[0].long(), want)


def test_the_greedy_choice_is_best_for_one_channel() -> None:
    """Frobenius order: dropping the lowest channel costs no more than dropping any other one."""
    q, k = torch.randn(1, 3, 5, 8, dtype=torch.float64), torch.randn(1, 40, 8, dtype=torch.float64)
    side = Thinned(7, 8, 5, 0)
    (kept,) = side.fit(k, whole(40), seen(q))
    gone = (set(range(8)) - set(kept[0].tolist())).pop()
    cost = [(q[0, :, :, i, None] * k[0, :, i]).square().sum() for i in range(8)]
    assert min(range(8), key=lambda i: cost[i]) == gone


def test_a_channel_no_query_uses_goes_first_and_is_not_missed() -> None:
    q, k = torch.randn(1, 2, 6, 8), torch.randn(1, 40, 8)
    q[..., 3] = 0
    side = Thinned(7, 8, 6, 4)
    fitted = side.fit(k, whole(40), seen(q))
    back = side.unpack(side.pack(k, *fitted), k.dtype, *fitted)
    assert 3 not in fitted[0]
    assert not torch.equal(back, k)
    assert torch.equal(q @ back.unsqueeze(1).transpose(2, 3), q @ k.unsqueeze(1).transpose(2, 3))


def test_padding_slots_and_missing_queries_have_no_say() -> None:
    q, k = torch.randn(1, 2, 6, 8), torch.randn(1, 40, 8)
    side = Thinned(4, 8, 6, 0)
    (want,) = side.fit(k[:, :30], whole(30), seen(q[:, :, -3:]))
    dirty = torch.cat([k[:, :30], torch.full((1, 10, 8), 1e6) * torch.arange(8)], dim=1)
    noisy = torch.cat([1e6 * torch.randn(1, 2, 3, 8), q[:, :, -3:]], dim=2)
    (got,) = side.fit(dirty, whole(30), Observed(noisy, torch.arange(6)[None] >= 3))
    assert torch.equal(got, want)


def test_sliced_queries_equal_filling_up_with_zeros() -> None:
    """Two segments of different width with the whole head's scale, merged by one softmax, are what is read here."""
    model, ids, steps = llama(layers=1), prompt(2, 61), prompt(2, 1, seed=1)
    with watching() as reads:
        _, cache = applied(model, ThinK(**SMALL), ids, steps)
    q, result = reads[-1]["q"], reads[-1]["result"]
    (column,) = bodies(cache)
    (band,) = stores(cache)[0].bands
    rows = q.flatten(0, 1).unflatten(0, (4, 3)).squeeze(2)  # [P, G, D]
    (old,) = column.body
    index = column.fitted[0].long()
    sliced = rows.gather(2, index[:, None].expand(-1, 3, -1))
    far = torch.einsum("pgd,pnd->pgn", sliced, old[:, :56])
    near = torch.einsum("pgd,pnd->pgn", rows, column.tail.data[:, :6])
    weights = (torch.cat([far, near], dim=-1) * 16**-0.5).softmax(-1)
    want = torch.einsum("pgn,pnd->pgd", weights, band.values()).flatten(0, 1).view(2, 6, 1, -1)
    assert_close(result.out, want, TOLERANCE)
    scaled = torch.einsum("pgn,pnd->pgd", (torch.cat([far, near], -1) * 4**-0.5).softmax(-1), band.values())
    assert relative_rms(scaled.flatten(0, 1).view_as(want), want) > 0.01, "the scale of the kept width is another"


@pytest.mark.parametrize("recent", [0, 7, 32])
def test_bytes_of_the_keys(recent: int) -> None:
    """(M - recent) (D - k) + recent D elements a head, and a name for each kept channel."""
    _, cache = applied(llama(layers=1, head_dim=32), ThinK(ratio=0.4, recent=recent), prompt(1, 61))
    (column,) = bodies(cache)
    kept = 32 - 12
    assert sum(t.numel() for t in column.body) == 2 * (61 - recent) * kept
    assert sum(t.numel() * t.element_size() for t in column.fitted) == 2 * kept * 2
    assert column.tail.data.shape[1] <= recent + 16
    assert (column.packed == 61 - recent).all()


@pytest.mark.parametrize("ratio", [0.25, 0.5])
def test_what_is_saved_is_the_papers(ratio: float) -> None:
    """ratio / 2 of keys and values, of all tokens but the newest; less the names of the channels."""
    shape = ModelShape.of(llama(head_dim=32, dtype=torch.bfloat16))
    for length, recent in ((300, 32), (1000, 0)):
        saved = 1 - ThinK(recent=recent).share(shape, length, ratio)
        assert ratio / 2 * (1 - recent / length) - 1 / length < saved < ratio / 2 * (1 - recent / length)


def test_what_is_generated_keeps_all_channels() -> None:
    model, ids, steps = llama(), prompt(1, 61), prompt(1, 40, seed=1)
    with watching() as reads:
        _, cache = applied(model, ThinK(ratio=0.5, recent=4), ids, steps)
    for column in bodies(cache):
        assert (column.packed == 57).all()
        assert column.tail.data.shape[1] >= 44
        assert (column.read(101)[:, 57:] != 0).all()
        assert ((column.read(101)[:, :57] != 0).sum(-1) == 8).all()
    assert len(reads) == 3 * 41


def test_the_prompt_is_exact_and_decode_is_not() -> None:
    model, ids, steps = llama(), prompt(1, 61), prompt(1, 4, seed=1)
    want, _ = logits(model, ids, steps)
    errors = []
    for ratio in (0.25, 0.5, 0.75):
        got, _ = applied(model, ThinK(ratio=ratio, recent=4, window=8), ids, steps)
        assert_close(got[:, :1], want[:, :1], TOLERANCE)
        errors.append(relative_rms(got[:, 1:], want[:, 1:]))
    assert TOLERANCE < errors[0] < errors[1] < errors[2]


def test_a_group_holds_one_pruned_copy() -> None:
    """The released code repeats kv heads before it prunes; here the cache is as wide as before."""
    for heads, kv_heads in ((6, 2), (8, 1)):
        _, cache = applied(llama(heads=heads, kv_heads=kv_heads, layers=1), ThinK(**SMALL), prompt(2, 61))
        (column,) = bodies(cache)
        assert column.body[0].shape[0] == 2 * kv_heads


def test_rows_of_different_length_are_pruned_as_alone() -> None:
    model = llama()
    ids, mask = prompt(2, 61), torch.ones(2, 61, dtype=torch.long)
    mask[0, :50] = 0
    with foveate.apply(model, ThinK(ratio=0.5, recent=4, window=16)), torch.no_grad():
        kwargs = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, "output_logits": True}
        both = model.generate(ids, attention_mask=mask, return_dict_in_generate=True, **kwargs)
        alone = model.generate(ids[:1, 50:], return_dict_in_generate=True, **kwargs)
    assert_close(torch.stack(both.logits)[:, :1], torch.stack(alone.logits), 1e-4)
    for column in bodies(both.past_key_values):
        assert column.tail.data.shape[1] < 60, "a short row must not make the exact tail as long as the prompt"


@pytest.mark.parametrize("chunks", [1, 5, 40])
def test_chunks_prune_the_same(chunks: int) -> None:
    model, ids = llama(), prompt(1, 61)
    _, once = applied(model, ThinK(**SMALL), ids)
    _, pieces = applied(model, ThinK(**SMALL), ids, chunks=chunks)
    for a, b in zip(bodies(once), bodies(pieces), strict=True):
        assert torch.equal(a.fitted[0], b.fitted[0])


def test_eviction_comes_first() -> None:
    """Channels are weighed over the tokens that are left, and only those are held."""
    model, ids = llama(layers=1), prompt(1, 61)
    keeper = SnapKV(budget=30, window=7, kernel=1)
    _, plain = applied(model, keeper, ids)
    _, both = applied(model, keeper | ThinK(**SMALL), ids)
    assert held(stores(plain)[0]) == held(stores(both)[0])
    (band,) = stores(plain)[0].bands
    (column,) = bodies(both)
    with watching() as reads:
        applied(model, "dense", ids)
    q = reads[0]["q"][:, :, -7:].unflatten(1, (2, 3))[0]
    energy = q.square().sum((1, 2)) * band.keys()[:, :30].square().sum(1)
    assert torch.equal(column.fitted[0].long(), energy.topk(2).indices.sort().values)
    assert (column.packed == 25).all()


@pytest.mark.parametrize("bits", [2, 8])
def test_a_chain_with_quantisation(bits: int) -> None:
    """The kept channels are what is quantised; later groups lose the same channels; the newest keys stay whole."""
    model, ids, steps = llama(), prompt(1, 61), prompt(1, 9, seed=1)
    thin, codes = ThinK(ratio=0.7, recent=4, window=7), KIVI(bits=bits, group=4, residual=8)
    chain, cache = applied(model, thin | codes, ids, steps)
    other, _ = applied(model, codes | thin, ids, steps)
    assert torch.equal(chain, other)
    for column in bodies(cache):
        assert (column.packed == (70 - 4) // 8 * 8).all()
        kept = column.read(70)[:, :64] != 0
        assert (kept.any(1).sum(-1) == 16 - 11).all()
        assert column.body[0].shape[-1] == -(-5 * bits // 8)
    _, alone = applied(model, thin, ids)
    for column, exact in zip(bodies(cache), bodies(alone), strict=True):
        assert relative_rms(column.read(70)[:, :56], exact.read(61)[:, :56]) < (0.005 if bits == 8 else 0.5)


@pytest.mark.parametrize(("heads", "kv_heads", "evicted"), [(8, 1, False), (6, 2, True)])
def test_kernels_read_the_channels_that_are_left(heads: int, kv_heads: int, evicted: bool, seed: int) -> None:
    """Recorded steps of rows of different length, as on a GPU but in Triton's interpreter: nothing is filled up."""
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("kernels run here in Triton's interpreter")
    net, thin = llama(heads=heads, kv_heads=kv_heads, layers=1), ThinK(ratio=0.7, recent=4, window=7)
    ids, mask = left_padded([tokens(seed, 33), tokens(seed + 1, 61)])
    new = torch.stack([tokens(seed + 2, 4), tokens(seed + 3, 4)])
    with foveate.apply(net, SnapKV(budget=30, window=7) | thin if evicted else thin) as handle:
        _, want = steps(net, handle, ids, mask, new)
        cache, got = steps_in_place(net, handle, ids, mask, new)
        assert cache.step is not None
    assert_close(got, want, TOLERANCE)


def test_two_formats_of_one_kind_are_refused() -> None:
    for one, other in ((ThinK(), ThinK(ratio=0.5)), (KIVI(), KIVI(bits=8))):
        with pytest.raises(foveate.BadArgument, match="'format'"):
            foveate.methods.Composition((one, other))


def test_latent_attention_is_refused() -> None:
    with pytest.raises(foveate.Refused, match="latent"):
        foveate.apply(foveate.models.tiny("deepseek-v3"), ThinK())


def test_windowed_heads_stay_whole() -> None:
    _, cache = applied(llama(), StreamingLLM(sink=2, recent=9) | ThinK(**SMALL), prompt(1, 41))
    assert not any(isinstance(band.k, PackedColumn) for store in stores(cache) for band in store.bands)


def test_a_budget_drops_as_little_as_it_can() -> None:
    model = llama(head_dim=32)
    with foveate.apply(model, "dense") as handle:
        kept = {
            share: handle.bind(ThinK(recent=16), budget=share).transient_plan(512)[0].roles["think"].extra["kept"]
            for share in (0.6, 0.75, 0.9, 1.0)
        }
        for share, channels in kept.items():
            held_bytes = (512 - 16) * channels + 16 * 32 + 512 * 32 + channels / 2 + 4
            assert held_bytes <= share * 2 * 512 * 32 or share == 1.0
            assert channels == 32 or held_bytes + 496 > share * 2 * 512 * 32
        with pytest.raises(foveate.Infeasible, match="values") as refusal:
            handle.bind(ThinK(recent=16), budget=0.4).check(512)
        assert 0.5 < refusal.value.floor < 0.6


def test_defaults_are_the_papers() -> None:
    method = ThinK()
    assert (method.ratio, method.recent, method.window) == (0.4, 32, 32)


@pytest.mark.parametrize("bad", [{"ratio": 1.0}, {"ratio": -0.1}, {"recent": -1}, {"window": 0}])
def test_bad_parameters(bad: dict) -> None:
    with pytest.raises(foveate.BadArgument, match=next(iter(bad))):
        ThinK(**bad)
