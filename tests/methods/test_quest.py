"""Quest: must-hold tests of its card."""

from __future__ import annotations

import pytest
import torch
from tests.closeness import assert_close
from tests.methods.runs import TOLERANCE, applied, llama, logits, prompt, stores, watching

import foveate
from foveate.methods import Quest
from foveate.methods.policies.summaries import bound_scores, minmax
from foveate.models import tiny

SMALL = {"budget": 24, "page": 4, "dense_layers": 1}


@pytest.mark.parametrize("seed", range(3))
def test_bound_is_never_below_the_truth(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    k, q = torch.randn(2, 5, 4, 16, generator=g), torch.randn(1, 6, 3, 16, generator=g)
    valid = torch.ones(2, 5, 4, dtype=torch.bool)
    valid[:, 4, 1:] = False
    summary = minmax(k, k, valid).unsqueeze(0)
    bound = bound_scores(q, summary)
    logit = torch.einsum("bhnd,hpsd->bhnps", q, k.repeat_interleave(3, 0))
    best = logit.masked_fill(~valid.repeat_interleave(3, 0)[None, :, None], -torch.inf).amax(-1)
    assert (bound >= best - 1e-4).all()
    assert (bound - best).max() > 0.1
    assert_close(bound[..., 4], best[..., 4], 1e-5)  # what lies behind the one token of a page says nothing


def test_one_token_pages_are_exact() -> None:
    """page = 1: the bound of a page is its only logit, so the list is the exact top-k."""
    model, ids, steps = llama(layers=2), prompt(1, 41), prompt(1, 1, seed=1)
    with watching() as seen:
        applied(model, Quest(page=1, dense_layers=1, tokens=9), ids, steps)
    read = seen[-1]
    lists = read["parts"].lists[0, :, 0]
    q, k = read["q"][0, :, 0], read["store"].bands[0].keys()
    logit = torch.einsum("hd,hmd->hm", q, k.repeat_interleave(3, 0))
    logit[:, 41] = torch.inf
    want = logit.topk(9).indices.sort(-1).values
    assert torch.equal(lists.long(), want)


@pytest.mark.parametrize("share", ["head", "group"])
def test_pages_with_the_largest_bounds_are_read(share: str, seed: int) -> None:
    """By the keys that are held, channel by channel; pages that decoding opened and filled are among them."""
    steps = 9
    with watching() as seen:
        method = Quest(page=4, dense_layers=1, tokens=20, share=share)
        applied(llama(layers=2), method, prompt(1, 61, seed), prompt(1, steps, seed + 1))
    for step, read in enumerate(seen[3::2]):
        q, keys = read["q"][0, :, 0].double(), read["store"].bands[0].keys()[:, : 62 + step].double()
        # kv head of query head h is h // group
        bound = torch.tensor(
            [[float(torch.maximum(q[h] * p.amin(0), q[h] * p.amax(0)).sum()) for p in keys[h // 3].split(4)]
             for h in range(6)]
        )  # fmt: skip
        bound = bound.unflatten(0, (2, 3)).amax(1) if share == "group" else bound
        bound[:, -1] = torch.inf
        assert torch.equal(read["parts"].lists[0, :, 0].long(), bound.topk(5).indices.sort(-1).values)
    assert step == steps - 1


@pytest.mark.parametrize("share", ["head", "group"])
@pytest.mark.parametrize("family", ["llama", "deepseek-v3"])
def test_reading_all_pages_is_dense(share: str, family: str) -> None:
    model = tiny(family, heads=6, kv_heads=2)
    ids, steps = prompt(2, 41), prompt(2, 7, seed=1)
    want, _ = logits(model, ids, steps)
    for kwargs in ({"tokens": 64}, {"budget": 1.0}):
        got, cache = applied(model, Quest(page=4, share=share, **kwargs), ids, steps)
        assert_close(got, want, TOLERANCE)
        assert stores(cache)[-1].bands[0].summaries


def test_first_layers_and_prompt_are_dense() -> None:
    model, ids, steps = llama(layers=3), prompt(1, 61), prompt(1, 1, seed=1)
    want, _ = logits(model, ids)
    with watching() as seen:
        got, _ = applied(model, Quest(page=4, dense_layers=2, tokens=12), ids, steps)
    assert_close(got[:, :1], want, TOLERANCE)
    assert [r["parts"].dense for r in seen] == [True] * 5 + [False]


@pytest.mark.parametrize(("share", "lists"), [("head", 6), ("group", 2)])
def test_lists_hold_the_newest_page_and_the_budget(share: str, lists: int) -> None:
    model, ids, steps = llama(layers=3), prompt(2, 61), prompt(2, 5, seed=1)
    with watching() as seen:
        applied(model, Quest(page=4, dense_layers=1, tokens=20, share=share), ids, steps)
    selective = [r["parts"] for r in seen if not r["parts"].dense]
    assert len(selective) == 5 * 2
    for step, selection in enumerate(selective):
        newest = (61 + step // 2) // 4
        assert selection.lists.shape == (2, lists, 1, 5)
        assert (selection.lists.amax(-1) == newest).all()
        assert (selection.lists.diff(dim=-1) > 0).all()


@pytest.mark.parametrize("length", [61, 64])
def test_summary_bytes_are_counted(length: int) -> None:
    """2 * ceil(M / P) * Hkv * D numbers per sparse layer."""
    model, ids = llama(layers=3), prompt(1, length)
    _, cache = applied(model, Quest(page=4, dense_layers=1, tokens=20), ids)
    summaries = [t for store in stores(cache) for band in store.bands for t in band.summaries.values()]
    assert sum(t.numel() for t in summaries) == 2 * (2 * 16 * 2 * 16)
    _, plain = applied(model, "dense", ids)
    assert cache.nbytes - plain.nbytes >= sum(t.numel() * t.element_size() for t in summaries)


def test_read_share_is_what_was_asked() -> None:
    model, ids = llama(layers=4), prompt(1, 200)
    with foveate.apply(model, Quest(page=4, dense_layers=2), budget=0.6) as handle, torch.no_grad():
        cache = handle.cache()
        model(ids, past_key_values=cache)
        cache.meter = {}
        model(prompt(1, 1, seed=1), past_key_values=cache)
    dense = 4 * 6 * 201
    # 2 of 4 layers are dense, so the others read 0.2 of theirs: 40 of 200 tokens
    assert cache.meter["decode_read"] <= 0.6 * dense
    assert cache.meter["decode_read"] > 0.6 * dense - 2 * 6 * 2 * 4


def test_below_the_floor_is_refused_with_it() -> None:
    with foveate.apply(llama(layers=4), "dense") as handle:
        with pytest.raises(foveate.Infeasible) as error:
            handle.bind(Quest(page=4, dense_layers=2), budget=0.52).check(200)
        assert error.value.floor == pytest.approx((2 * 200 + 2 * 12) / (4 * 200))


@pytest.mark.parametrize("bad", [{"page": 0}, {"dense_layers": -1}, {"share": "layer"}])
def test_bad_parameters(bad: dict) -> None:
    with pytest.raises(foveate.BadArgument, match=next(iter(bad))):
        Quest(**bad)


def test_defaults_are_the_papers() -> None:
    method = Quest()
    assert (method.page, method.dense_layers, method.share, method.tokens) == (16, 2, "head", 2048)
