"""StreamingLLM: must-hold tests of its card."""

from __future__ import annotations

import random

import pytest
import torch
from tests.closeness import assert_close
from tests.methods.runs import TOLERANCE, applied, held, llama, logits, prompt, stores, watching

import foveate
from foveate.attention import Geometry, Selection, Span, reference
from foveate.methods import Quest, StreamingLLM
from foveate.models import load
from foveate.tasks.corpora import corpus

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


def test_any_stream_holds_sinks_and_recent_only(seed: int) -> None:
    """Pieces of any length, and never more after one of them than there is room for."""
    chance, fed = random.Random(seed), 0
    with foveate.apply(model := llama(layers=2), StreamingLLM(sink=3, recent=17)) as handle, torch.no_grad():
        cache = handle.cache()
        for _ in range(12):
            more = chance.choice((1, 1, 2, 9, 30))
            model(prompt(2, more, seed=seed % 10**6 + fed), past_key_values=cache)
            fed += more
            want = sorted({*range(min(3, fed)), *range(max(0, fed - 16), fed)})
            assert all(x == want for store in stores(cache) for x in held(store))


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


def test_a_step_depends_on_what_is_held_alone(seed: int) -> None:
    """One layer, whose keys and values know their own token only: a text of the held tokens gives the same logits."""
    model, ids, steps = llama(layers=1), prompt(2, 61, seed % 10**6), prompt(2, 5, seed % 10**6 + 1)
    got, _ = applied(model, StreamingLLM(sink=3, recent=17), ids, steps)
    text = torch.cat([ids, steps], dim=1)
    for step in range(6):
        kept = [*range(3), *range(61 + step - 17, 61 + step)]
        want, _ = logits(model, text[:, kept])
        assert_close(got[:, step], want[:, 0], TOLERANCE)


def test_without_sinks_a_real_model_loses_its_way(seed: int) -> None:
    """A window alone costs far more than a window and four sinks."""
    loaded, sentences = load("smollm2", dtype="float32", device="cpu"), corpus().sentences
    first = seed % (len(sentences) - 60)
    ids = loaded.tokenizer(" ".join(sentences[first : first + 60]), return_tensors="pt").input_ids[:, :192]
    loss = {}
    for name, method in {
        "dense": "dense",
        "window": StreamingLLM(sink=0, recent=48),
        "sinks": StreamingLLM(sink=4, recent=44),
    }.items():
        with foveate.apply(loaded.model, method), torch.no_grad():
            out = loaded.model(ids).logits[0, 64:-1]
        loss[name] = float(torch.nn.functional.cross_entropy(out, ids[0, 65:]))
    assert loss["window"] > loss["dense"] + 0.5
    assert loss["sinks"] - loss["dense"] < 0.5 * (loss["window"] - loss["dense"])


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


def test_defaults_are_the_papers() -> None:
    assert (StreamingLLM().sink, StreamingLLM().recent, StreamingLLM().positions) == (4, 512, "cache")


@pytest.mark.parametrize("bad", [{"sink": -1}, {"recent": 0}, {"positions": "relative"}])
def test_bad_parameters(bad: dict) -> None:
    with pytest.raises(foveate.BadArgument, match=next(iter(bad))):
        StreamingLLM(**bad)
