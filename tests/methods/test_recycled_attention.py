"""Recycled Attention: must-hold tests of its card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.closeness import assert_close
from tests.contract.recorded import recording
from tests.contract.recorded import steps as decoded
from tests.methods.runs import TOLERANCE, applied, llama, logits, prompt, watching
from torch import Tensor

import foveate
from foveate.attention import Selection, decoding
from foveate.engine import captured
from foveate.methods import H2O, RecycledAttention
from foveate.models import tiny

SMALL = {"budget": 13, "stride": 4}


def sets(parts: Selection, held: int) -> list[list[set[int]]]:
    """What one decode step reads, by row and list."""
    if parts.lists is None:
        return [[set(range(held))]]
    return [[set(x[x >= 0].tolist()) for x in row[:, 0]] for row in parts.lists]


def truth(reads: list[dict[str, Any]], method: RecycledAttention, keep: int, kv_heads: int) -> list[list[set[int]]]:
    """By step and kv head, what a layer of one row must read: the paper's rule, one token and head at a time.

    A full step when due. A recycled one reads the list and itself; the least attended then makes room.
    """
    state: list[set[int]] = [set() for _ in range(kv_heads)]
    since, last, out = 0, None, []
    for read in reads:
        q, k = read["q"][0, :, 0], read["store"].bands[0].keys().double()
        now = read["now"]
        full = since % method.period == 0
        if full and method.similarity is not None and last is not None:
            cosines = [float(torch.dot(a, b) / (a.norm() * b.norm())) for a, b in zip(q, last, strict=True)]
            full = sum(cosines) / len(cosines) < method.similarity
        step = []
        for head in range(kv_heads):
            seen = sorted(set(range(now + 1)) if full else state[head] | {now})
            mass = []
            for query in q.unflatten(0, (kv_heads, -1))[head].double():
                logit = torch.stack([query @ k[head, j] for j in seen]) * read["how"].scale
                mass.append(logit.softmax(0))
            score = torch.stack(mass).amax(0) if method.reduce == "max" else torch.stack(mass).mean(0)
            order = sorted(range(len(seen)), key=lambda j: -float(score[j]))
            if full:
                state[head] = {seen[j] for j in order[:keep]}
            else:
                state[head] = set(seen)
                if len(seen) > keep:
                    state[head].remove(seen[order[-1]])
            step.append(set(seen))
        since, last = (1, q) if full else (since + 1, last)
        out.append(step)
    return out


def decode_reads(seen: list[dict[str, Any]], layer: int, layers: int, first: int) -> list[dict[str, Any]]:
    """The reads of one layer, a step each, with the position `now` of the token."""
    mine = [read for read in seen if read["q"].shape[2] == 1][layer::layers]
    return [{**read, "now": first + i} for i, read in enumerate(mine)]


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (8, 1)])
@pytest.mark.parametrize("reduce", ["max", "mean"])
@pytest.mark.parametrize("similarity", [None, 0.35])
def test_reads_what_the_paper_says(heads: int, kv_heads: int, reduce: str, similarity: float | None) -> None:
    model, ids, steps = llama(heads=heads, kv_heads=kv_heads, layers=2), prompt(1, 41), prompt(1, 17, seed=1)
    method = RecycledAttention(tokens=9, stride=5, every=3, reduce=reduce, similarity=similarity)
    with watching() as seen:
        applied(model, method, ids, steps)
    for layer in range(2):
        reads = decode_reads(seen, layer, 2, 41)
        for read, want in zip(reads, truth(reads, method, 9, kv_heads), strict=True):
            got = sets(read["parts"], read["now"] + 1)[0]
            assert got == want[: len(got)]


def test_every_step_full_is_dense() -> None:
    model, ids, steps = llama(), prompt(2, 41), prompt(2, 7, seed=1)
    want, _ = logits(model, ids, steps)
    got, _ = applied(model, RecycledAttention(tokens=5, stride=1), ids, steps)
    assert_close(got, want, TOLERANCE)


@pytest.mark.parametrize("family", ["llama", "deepseek-v3"])
def test_room_for_all_is_dense(family: str) -> None:
    model = tiny(family, heads=6, kv_heads=2)
    ids, steps = prompt(2, 41), prompt(2, 7, seed=1)
    want, _ = logits(model, ids, steps)
    for kwargs in ({"tokens": 48}, {"budget": 1.0}, {}):
        got, _ = applied(model, RecycledAttention(stride=4, **kwargs), ids, steps)
        assert_close(got, want, TOLERANCE)


@pytest.mark.parametrize("length", [41, 6])
def test_between_full_steps_the_list_and_the_token_are_read(length: int) -> None:
    """K + 1 keys; a text that is shorter is read whole until it has more."""
    model, keep, steps = llama(layers=1), 9, 11
    with watching() as seen:
        _, cache = applied(model, RecycledAttention(tokens=keep, stride=4), prompt(2, length), prompt(2, steps, seed=1))
    for read in decode_reads(seen, 0, 1, length):
        full = (read["now"] - length) % 4 == 0
        assert read["parts"].dense == (full or read["now"] <= keep)
        if not read["parts"].dense:
            assert all(len(x) == keep + 1 and read["now"] in x for row in sets(read["parts"], 0) for x in row)
    (layer,) = cache.couriers()
    assert (layer.mine["recycled-attention"]["list"] >= 0).sum(-1).eq(min(keep, length + steps)).all()


def test_a_full_step_sees_what_recycled_steps_wrote() -> None:
    """All tokens are held, and tokens of recycled steps can be listed by a full one."""
    model, ids, steps = llama(layers=1), prompt(1, 12), prompt(1, 29, seed=1)
    with watching() as seen:
        applied(model, RecycledAttention(tokens=6, stride=7), ids, steps)
    reads = decode_reads(seen, 0, 1, 12)
    assert all(read["store"].lengths.min() == 12 + 29 for read in reads)
    assert reads[28]["parts"].dense
    late = sets(reads[22]["parts"], 0)[0]  # the first step behind the full one of token 33
    assert any(12 <= j < 33 - 6 for x in late for j in x)


@pytest.mark.parametrize(("similarity", "full"), [(1.1, [0, 3, 6, 9]), (-1.1, [0])])
def test_similarity_decides_at_each_check(similarity: float, full: list[int]) -> None:
    model = llama(layers=1)
    method = RecycledAttention(tokens=6, stride=2, every=3, similarity=similarity)
    with watching() as seen:
        applied(model, method, prompt(2, 41), prompt(2, 11, seed=1))
    dense = [i for i, read in enumerate(decode_reads(seen, 0, 1, 41)) if read["parts"].dense]
    assert dense == full


def test_rows_keep_their_own_clocks() -> None:
    """In a batch one row's query may have moved on while the other's has not; each reads as it would alone."""
    model, ids, steps = llama(layers=1), prompt(3, 41), prompt(3, 24, seed=1)
    method = RecycledAttention(tokens=6, every=2, similarity=0.3)
    with watching() as seen:
        together, cache = applied(model, method, ids, steps)
    clock = next(iter(cache.couriers())).clock
    widths = [
        {len(x) for x in (row[0] for row in sets(read["parts"], 0))}
        for read in decode_reads(seen, 0, 1, 41)
        if not read["parts"].dense
    ]
    assert any(len(w) > 1 for w in widths), "the rows never differed"
    assert clock.tolist() == [24] * 3
    for b in range(3):
        alone, _ = applied(model, method, ids[b : b + 1], steps[b : b + 1])
        assert_close(together[b : b + 1], alone, TOLERANCE)


def test_the_list_recovers_no_less_mass_than_sinks_and_window() -> None:
    """At the full step no set of K tokens holds more of the query's attention than the list that it makes."""
    model, ids, steps = llama(heads=4, kv_heads=4, layers=1), prompt(1, 61), prompt(1, 1, seed=1)
    with watching() as seen:
        _, cache = applied(model, RecycledAttention(tokens=12, stride=9), ids, steps)
    read = decode_reads(seen, 0, 1, 61)[0]
    k = read["store"].bands[0].keys()
    mass = (read["q"][0] @ k.transpose(-1, -2) * read["how"].scale).softmax(-1)[:, 0]
    listed = next(iter(cache.couriers())).mine["recycled-attention"]["list"][0].long()
    streaming = torch.tensor([*range(4), *range(54, 62)]).expand(4, -1)
    assert (mass.gather(1, listed).sum(1) >= mass.gather(1, streaming).sum(1)).all()
    assert (mass.gather(1, listed).sum(1) > mass.gather(1, streaming).sum(1) + 0.05).any()


def test_recycled_steps_recover_more_mass_than_sinks_and_window() -> None:
    """On prose and the built-in model, over steps that choose nothing anew: the paper's reason for it."""
    model, tokenizer = foveate.load("smollm2")
    text = (Path(__file__).parents[2] / "docs" / "how-we-measure.md").read_text()
    ids, keep = tokenizer(text, return_tensors="pt")["input_ids"][:, :264], 64
    with watching() as seen:
        applied(model, RecycledAttention(tokens=keep, stride=50), ids[:, :256], ids[:, 256:])
    listed, streaming = [], []
    for read in seen:
        if read["q"].shape[2] > 1 or read["parts"].dense:
            continue
        lists = read["parts"].lists[0, :, 0].long()
        now, group = int(lists.max()), read["q"].shape[1] // len(lists)
        k = read["store"].bands[0].keys()[:, : now + 1].repeat_interleave(group, 0)
        mass = (read["q"][0].float() @ k.float().transpose(-1, -2) * read["how"].scale).softmax(-1)[:, 0]
        listed.append(mass.gather(1, lists.repeat_interleave(group, 0)).sum(1).mean())
        streaming.append(torch.cat([mass[:, :4], mass[:, -(keep - 3) :]], dim=1).sum(1).mean())
    assert len(listed) == 7 * len(model.model.layers)
    assert sum(listed) > sum(streaming)


def test_a_second_prompt_makes_the_list_anew() -> None:
    """A list from before a later turn knows nothing of its tokens: the next step looks everywhere."""
    model = llama(layers=1)
    with foveate.apply(model, RecycledAttention(tokens=6, stride=50)) as handle, torch.no_grad():
        cache = handle.cache()
        for turn in range(2):
            cache.expect(30)
            model(prompt(1, 30, seed=turn), past_key_values=cache)
            with watching() as seen:
                for i in range(3):
                    model(prompt(1, 1, seed=i), past_key_values=cache)
            assert [read["parts"].dense for read in seen] == [True, False, False]


def test_follows_tokens_that_move_between_slots() -> None:
    """Under steady eviction the newest token takes a freed slot; the list means tokens, not slots."""
    model, ids, steps = llama(layers=1), prompt(1, 41), prompt(1, 14, seed=1)
    with foveate.apply(model, RecycledAttention(tokens=6, stride=50) | H2O(budget=16)) as handle, torch.no_grad():
        cache = handle.cache()
        cache.expect(41)
        model(ids, past_key_values=cache)
        (layer,) = cache.couriers()
        before: Tensor | None = None
        for i in range(14):
            with watching() as seen:
                positions = layer.store
                model(steps[:, i : i + 1], past_key_values=cache)
            listed = layer.mine["recycled-attention"]["list"]
            if before is not None:
                assert not seen[0]["parts"].dense
                # What was handed on is what was handed over, the new token, and nothing else.
                for head in range(2):
                    assert set(listed[0, head].tolist()) <= set(before[0, head].tolist()) | {41 + i, -1}
            before = listed
            assert positions.lengths.max() <= 17


def test_read_share_is_what_was_asked() -> None:
    """Over one period: a full step and S - 1 recycled ones."""
    model, ids = llama(layers=2), prompt(1, 200)
    with foveate.apply(model, RecycledAttention(stride=5), budget=0.4) as handle, torch.no_grad():
        cache = handle.cache()
        model(ids, past_key_values=cache)
        cache.meter = {}
        for i in range(5):
            model(prompt(1, 1, seed=i), past_key_values=cache)
    # (0.4 * 5 - 1) / 4 of 200 tokens in recycled steps
    assert cache.meter["decode_read"] == 2 * 6 * (201 + 4 * 50)


def test_below_the_floor_is_refused_with_it() -> None:
    with foveate.apply(llama(), "dense") as handle:
        with pytest.raises(foveate.Infeasible) as error:
            handle.bind(RecycledAttention(stride=4), budget=0.25)
        assert error.value.floor == pytest.approx((512 + 3 * 2) / 2048)  # at the model's 512 positions
        with pytest.raises(foveate.Infeasible) as error:
            handle.bind(RecycledAttention(stride=1), budget=0.9)
        assert error.value.floor == 1


@pytest.mark.parametrize("bad", [{"tokens": 0}, {"stride": 0}, {"every": 0}, {"reduce": "sum"}])
def test_bad_parameters(bad: dict) -> None:
    with pytest.raises(foveate.BadArgument, match=next(iter(bad))):
        RecycledAttention(**bad)


def test_defaults_are_the_papers() -> None:
    method = RecycledAttention()
    assert (method.tokens, method.stride, method.every, method.similarity) == (4096, 50, 5, None)


@pytest.mark.parametrize(("heads", "reduce"), [(4, "max"), (6, "mean")])
def test_kernels_keep_the_lists_that_formulas_keep(heads: int, reduce: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In recorded steps lists are in no order and change in their place. One row's list is not full at first."""
    pytest.importorskip("triton")
    if not decoding._interpreted():
        pytest.skip("kernels run here in Triton's interpreter")
    net, method = llama(heads=heads, layers=2), RecycledAttention(tokens=9, stride=6, reduce=reduce)
    ids, mask = prompt(2, 29), torch.ones(2, 29, dtype=torch.long)
    mask[1, :24] = 0
    new = prompt(2, 11, seed=1)
    lists: list[list[Tensor]] = [[], []]

    def noted(cache: Any, found: list[Tensor]) -> None:
        for layer in cache.couriers():
            found.append(layer.mine["recycled-attention"]["list"].sort(-1).values.clone())

    made: list[Any] = []
    with foveate.apply(net, method) as handle:
        plain, want = decoded(net, handle, ids, mask, new)
        noted(plain, lists[0])
        monkeypatch.setattr(decoding, "serves", lambda q, forced=False: (True, ""))
        upkeep = decoding.Held.replace_least
        monkeypatch.setattr(decoding.Held, "replace_least", lambda *a, **k: made.append(a) or upkeep(*a, **k))
        with recording(net, handle, by=captured.record):
            cache, got = decoded(net, handle, ids, mask, new)
        noted(cache, lists[1])
    assert cache.step is not None and len(made) >= 10
    assert_close(got, want, TOLERANCE)
    assert all(torch.equal(x, y) for x, y in zip(*lists, strict=True))
