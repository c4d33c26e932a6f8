"""StreamingLLM: must-hold tests of its card."""

from __future__ import annotations

import pytest
import torch
from tests.closeness import assert_close
from tests.methods.runs import TOLERANCE, applied, held, llama, logits, prompt, stores, watching

import foveate
from foveate.attention import Geometry, Selection, Span, reference
from foveate.methods import Quest, StreamingLLM

SMALL = {"sink": 3, "recent": 17}


@pytest.mark.parametrize("positions", ["cache", "absolute"])
def test_short_texts_are_dense(positions: str) -> None:
    model, ids, steps = llama(), prompt(2, 23), prompt(2, 9, seed=1)
    want, _ = logits(model, ids, steps)
    got, cache = applied(model, StreamingLLM(sink=4, recent=28, positions=positions), ids, steps)
    assert_close(got, want, TOLERANCE)
    # At 32 tokens the read was whole; the next query would see 31 of them and itself.
    assert all(len(x) == 31 for store in stores(cache) for x in held(store))


@pytest.mark.parametrize("chunks", [None, 1, 7])
def test_holds_sinks_and_recent_only(chunks: int | None) -> None:
    ids, steps = prompt(1, 61), prompt(1, 13, seed=1)
    _, cache = applied(llama(), StreamingLLM(sink=3, recent=17), ids, steps, chunks)
    seen = 61 + 13
    # The oldest of the window leaves when the next token arrives: after a forward it has one place for that token.
    want = [*range(3), *range(seen - 16, seen)]
    for store in stores(cache):
        assert all(x == want for x in held(store))
        assert all(band.capacity <= 3 + 17 for band in store.bands)


@pytest.mark.parametrize("positions", ["cache", "absolute"])
@pytest.mark.parametrize("chunks", [1, 7, 20])
def test_any_chunking_is_one_shot(positions: str, chunks: int) -> None:
    model, ids, steps = llama(), prompt(2, 61), prompt(2, 5, seed=1)
    method = StreamingLLM(sink=3, recent=17, positions=positions)
    want, _ = applied(model, method, ids, steps)
    got, _ = applied(model, method, ids, steps, chunks)
    assert_close(got, want, TOLERANCE)


def test_absolute_positions_equal_a_masked_read() -> None:
    model, ids = llama(layers=1), prompt(1, 61)
    with watching() as seen:
        applied(model, StreamingLLM(sink=3, recent=17, positions="absolute"), ids)
    (read,) = seen
    (band,) = list(read["store"].bands)
    with watching() as dense:
        applied(model, "dense", ids)
    k, v = (x.unflatten(0, (1, 2)) for x in (dense[0]["store"].bands[0].keys(), dense[0]["store"].bands[0].values()))
    want = reference(dense[0]["q"], k, v, Selection(span=Span(3, 17)), Geometry(1, 61, 61), scale=read["how"].scale)
    assert_close(read["result"].out, want.out, TOLERANCE)
    assert band.used < 61


def test_cache_positions_equal_reindexed_keys() -> None:
    """The query turned by the closed gap gives what keys re-rotated to their index in the cache would give."""
    model, ids = llama(layers=1), prompt(1, 61)
    with foveate.apply(model, "dense") as handle, torch.no_grad(), watching() as dense:
        model(ids, past_key_values=handle.cache())
        rotary = handle.binding
        q = dense[0]["q"]
        band = dense[0]["store"].bands[0]
        k, v = band.keys().unflatten(0, (1, 2)), band.values().unflatten(0, (1, 2))
        sink, recent = 3, 17
        with foveate.apply(model, StreamingLLM(sink=sink, recent=recent)), watching() as seen:
            model(ids)
        got = seen[0]["result"].out
        for i in (10, 25, 60):
            kept = [j for j in range(i + 1) if j < sink or i - j < recent]
            index = torch.arange(len(kept))
            keys = rotary.move(k[:, :, kept], (index - torch.tensor(kept))[None])
            query = rotary.move(q[:, :, i : i + 1], torch.tensor([[len(kept) - 1 - i]]))
            logit = query @ keys.repeat_interleave(3, 1).transpose(-1, -2) * seen[0]["how"].scale
            want = logit.softmax(-1) @ v[:, :, kept].repeat_interleave(3, 1)
            assert_close(got[:, :, i : i + 1], want, TOLERANCE)


def test_positions_matter() -> None:
    model, ids = llama(), prompt(1, 61)
    cached, _ = applied(model, StreamingLLM(sink=3, recent=17), ids)
    absolute, _ = applied(model, StreamingLLM(sink=3, recent=17, positions="absolute"), ids)
    assert (cached - absolute).abs().max() > 1e-2


def test_budget_counts_the_sinks() -> None:
    _, cache = applied(llama(), "streaming-llm", prompt(1, 80), budget=0.25)
    # A quarter of 80 tokens of 128 bytes is 2560 bytes: 19 tokens with their positions, one of them yet to come.
    assert all(len(x) == 19 - 1 for store in stores(cache) for x in held(store))


def test_recounted_positions_leave_no_room_for_selectors() -> None:
    with pytest.raises(foveate.BadArgument, match="decode"):
        StreamingLLM() | Quest()
    assert (StreamingLLM(positions="absolute") | Quest()).id == "streaming-llm|quest"


@pytest.mark.parametrize("bad", [{"sink": -1}, {"recent": 0}, {"positions": "relative"}])
def test_bad_parameters(bad: dict) -> None:
    with pytest.raises(foveate.BadArgument, match=next(iter(bad))):
        StreamingLLM(**bad)
