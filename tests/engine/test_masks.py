"""Masks that say more than causality: packed sequences, 4-D masks, padding on every side."""

from __future__ import annotations

import pytest
import torch
from tests.closeness import assert_close, relative_rms
from tests.contract.runs import EXACT, assert_used, decode, forward, held, left_padded, prompt, tokens
from tests.contract.subjects import CASES, applied, assert_refusal, model

from foveate.errors import Refused

FAMILIES = ["llama", "gemma3", "deepseek-v3"]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_packed_sequences(family: str, seed: int) -> None:
    """Positions that restart, no mask, no cache: tokens of one text do not see the other."""
    net = model(family)
    ids = tokens(seed, 1, 50)
    positions = torch.cat([torch.arange(30), torch.arange(20)])[None]
    want = net(ids, position_ids=positions, use_cache=False).logits
    with applied(net, CASES["dense"]):
        got = net(ids, position_ids=positions, use_cache=False).logits
        whole = net(ids, use_cache=False).logits
    assert_close(got, want, EXACT)
    assert relative_rms(whole[:, 30:], want[:, 30:]) > 1e-2


@pytest.mark.parametrize("form", ["boolean", "additive"])
@pytest.mark.parametrize("cached", [False, True], ids=["no cache", "our cache"])
@pytest.mark.parametrize("family", ["llama", "mistral", "deepseek-v3"])
@torch.no_grad()
def test_a_mask_of_four_dimensions(family: str, cached: bool, form: str, seed: int) -> None:
    """The user's own mask is what is seen, at the prompt and in a step behind it."""
    net = model(family)
    ids, then = tokens(seed, 2, 41), tokens(seed + 1, 2, 1)
    seen = torch.ones(42, 42).tril().bool() & (torch.rand(42, 42, generator=torch.Generator().manual_seed(seed)) < 0.5)
    seen |= torch.eye(42).bool()
    mask = seen.expand(2, 1, 42, 42)
    if form == "additive":
        mask = torch.zeros(2, 1, 42, 42).masked_fill(~mask, torch.finfo(torch.float32).min)
    want = net(torch.cat([ids, then], dim=1), attention_mask=mask, use_cache=False).logits
    with applied(net, CASES["dense"]) as handle:
        if not cached:
            got = net(torch.cat([ids, then], dim=1), attention_mask=mask, use_cache=False).logits
        else:
            cache = handle.cache()
            first = net(ids, attention_mask=mask[:, :, :41, :41], past_key_values=cache).logits
            last = net(then, attention_mask=mask[:, :, 41:], past_key_values=cache).logits
            got = torch.cat([first, last], dim=1)
            assert_used(net, cache, less=False)
            assert cache.get_seq_length() == 42
    assert_close(got, want, EXACT)


def test_a_mask_of_four_dimensions_over_a_compressed_cache_is_refused(seed: int) -> None:
    net = model()
    with applied(net, CASES["snapkv"]) as handle, torch.no_grad():
        cache = handle.cache()
        prompt(net, cache, tokens(seed, 1, 61))
        assert_used(net, cache, less=True)
        with pytest.raises(Refused) as refusal:
            net(tokens(seed, 1, 1), attention_mask=torch.ones(1, 1, 1, 62).bool(), past_key_values=cache)
    assert_refusal(refusal.value)


@pytest.mark.parametrize("name", ["dense", "snapkv", "quest"])
def test_pads_longer_than_what_the_window_leaves(name: str, seed: int) -> None:
    """A hybrid model whose sliding layers would still see padding at decode, if anybody looked at slots for it."""
    net = model("gemma3")
    rows = [tokens(seed, 61), tokens(seed + 1, 3)]
    ids, mask = left_padded(rows)
    then = tokens(seed + 2, 2, 12)
    with applied(net, CASES[name]) as handle:
        cache = handle.cache()
        first = prompt(net, cache, ids, mask)
        got = decode(net, cache, then, mask)
        assert_used(net, cache, less=CASES[name].holds_less)
        for b, row in enumerate(rows):
            alone = handle.cache()
            handle.binding.plan_cache(alone, 61)
            want = prompt(net, alone, row[None])
            assert_close(first[b : b + 1, -len(row) :], want, EXACT)
            assert_close(got[b : b + 1], decode(net, alone, then[b : b + 1]), EXACT)
            assert held(cache, b) == held(alone, 0)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_right_padding_leaves_real_tokens_exact(family: str, seed: int) -> None:
    net = model(family)
    ids = tokens(seed, 2, 41)
    mask = torch.ones_like(ids)
    mask[0, 25:] = 0
    want = net(ids[:1, :25], use_cache=False).logits
    with applied(net, CASES["dense"]) as handle:
        cache = handle.cache()
        got = forward(net, cache, ids, mask)
        assert next(cache.couriers()).store.seen.tolist() == [25, 41]
    assert_close(got[:1, :25], want, EXACT)


@torch.no_grad()
def test_padding_rows_are_finite(seed: int) -> None:
    """A padded query reads nothing; its output must not be NaN, which norms and experts would spread."""
    net = model()
    ids, mask = left_padded([tokens(seed, 3), tokens(seed + 1, 41)])
    for name in ("dense", "streaming-llm", "flexprefill"):
        with applied(net, CASES[name]) as handle:
            assert forward(net, handle.cache(), ids, mask).isfinite().all()
