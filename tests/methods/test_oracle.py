"""Oracle: what makes it a bound."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.closeness import assert_close
from tests.contract.runs import left_padded, run
from tests.methods.runs import TOLERANCE, applied, llama, logits, prompt, watching

import foveate
from foveate.methods import Oracle, Quest, SnapKV
from foveate.models import tiny

SMALL = {"budget": 24}


def weights(read: dict[str, Any], length: int) -> torch.Tensor:
    """The softmax [B, H, N, length] of one read of a store with one band, by the plain formula, in double precision.

    The store may have grown since: `length` is how many tokens it held.
    """
    q = read["q"].double()
    k = read["store"].bands[0].keys().unflatten(0, (q.shape[0], -1)).double()[:, :, :length]
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    n = q.shape[2]
    logit = q @ k.transpose(-1, -2) * read["how"].scale
    return logit.masked_fill(torch.ones(n, length).triu(length - n + 1).bool(), -torch.inf).softmax(-1)


def listed(read: dict[str, Any], slots: int) -> torch.Tensor:
    """The lists of a read as a mask [B, h, N, slots]."""
    lists = read["parts"].lists.long()
    flags = torch.zeros(*lists.shape[:-1], slots + 1, dtype=torch.bool)
    return flags.scatter(-1, lists.where(lists >= 0, torch.tensor(slots)), True)[..., :slots]


def truth(mass: torch.Tensor, heads: int, share: str, k: int) -> torch.Tensor:
    """Which keys each list should hold, by sorting in Python."""
    batch, all_heads, n, m = mass.shape
    group = mass.view(batch, heads, all_heads // heads, n, m)
    chosen = torch.zeros(batch, heads, n, m, dtype=torch.bool)
    for b in range(batch):
        for h in range(heads):
            for i in range(n):
                rows = group[b, h, :, i]
                there = [j for j in range(m) if rows[0, j] > 0]
                if share == "mean":
                    order = sorted(there, key=lambda j: -float(rows[:, j].mean()))
                elif share == "max":
                    order = sorted(there, key=lambda j: -float(rows[:, j].max()))
                else:  # the heads' lists, one depth after the other
                    tops = [sorted(there, key=lambda j: -float(row[j])) for row in rows]
                    order = list(dict.fromkeys(j for depth in zip(*tops, strict=True) for j in sorted(depth)))
                chosen[b, h, i, order[:k]] = True
    return chosen


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (8, 1)])
@pytest.mark.parametrize("part", ["decode", "prefill"])
def test_each_query_reads_its_own_largest_weights(part: str, heads: int, kv_heads: int) -> None:
    model = llama(layers=2, heads=heads, kv_heads=kv_heads)
    with watching() as seen:
        applied(model, Oracle(part=part, tokens=9), prompt(2, 41), prompt(2, 2, seed=1))
    reads = [r for r in seen if not r["parts"].dense]
    assert [r["q"].shape[2] for r in reads] == ([1] * 4 if part == "decode" else [41] * 2)
    for i, read in enumerate(reads):
        length = 41 if part == "prefill" else 42 + i // 2
        mass = weights(read, length)
        assert read["parts"].lists.shape[1] == heads
        assert torch.equal(listed(read, length), truth(mass, heads, "mean", 9))


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (8, 1)])
@pytest.mark.parametrize("share", ["mean", "max", "union"])
def test_a_group_agrees_on_one_list(share: str, heads: int, kv_heads: int) -> None:
    """By the mean or the largest of its probabilities, or depth by depth; always as many as the budget says."""
    model = llama(layers=1, heads=heads, kv_heads=kv_heads)
    with watching() as seen:
        applied(model, Oracle(share=share, tokens=9), prompt(2, 41), prompt(2, 1, seed=1))
    mass = weights(seen[-1], 42)
    mask = listed(seen[-1], 42)
    assert seen[-1]["parts"].lists.shape == (2, kv_heads, 1, 9)
    assert (mask.sum(-1) == 9).all()
    if share == "union":
        # ties between heads at the last depth go to earlier keys, so only the depths before it are the same for sure
        ranks = mass.argsort(-1, descending=True).argsort(-1).unflatten(1, (kv_heads, -1)).amin(2)
        assert (ranks.masked_fill(~mask, -1).amax(-1) <= ranks.masked_fill(mask, 99).amin(-1)).all()
    assert torch.equal(mask, truth(mass, kv_heads, share, 9))


def test_no_selection_of_this_size_holds_more_mass() -> None:
    """Beside pages that are found by bounds: at equal numbers of tokens the exact list covers at least as much."""
    model, ids, steps = llama(layers=1), prompt(1, 63), prompt(1, 1, seed=1)
    covered = {}
    for method in (Oracle(tokens=12), Quest(page=4, dense_layers=0, tokens=12)):
        with watching() as seen:
            applied(model, method, ids, steps)
        mass, lists = weights(seen[-1], 64), seen[-1]["parts"].lists.long()
        slots = (lists.unsqueeze(-1) * seen[-1]["parts"].k_block + torch.arange(seen[-1]["parts"].k_block)).flatten(-2)
        covered[method.id] = mass.gather(-1, slots).sum(-1)
    assert (covered["oracle"] >= covered["quest"]).all()
    assert (covered["oracle"] > covered["quest"]).any()


@pytest.mark.parametrize("part", ["decode", "prefill", "both"])
@pytest.mark.parametrize("family", ["llama", "deepseek-v3", "gemma3"])
def test_reading_all_is_dense(part: str, family: str) -> None:
    model = tiny(family, heads=4, kv_heads=2)
    ids, steps = prompt(2, 41), prompt(2, 7, seed=1)
    want, _ = logits(model, ids, steps)
    for settings in ({"tokens": 48}, {"budget": 1.0}):
        for share in ("head", "union"):
            got, _ = applied(model, Oracle(part=part, share=share, **settings), ids, steps)
            assert_close(got, want, TOLERANCE)


def test_one_token_is_the_largest() -> None:
    """The least budget: attention becomes the value of the best key."""
    model = llama(layers=1)
    with watching() as seen:
        applied(model, Oracle(tokens=1), prompt(1, 41), prompt(1, 1, seed=1))
    read = seen[-1]
    best = weights(read, 42).argmax(-1).squeeze(-1)[0]
    v = read["store"].bands[0].values().repeat_interleave(3, 0)
    assert_close(read["result"].out[0, :, 0], v[torch.arange(6), best], TOLERANCE)


@pytest.mark.parametrize("chunks", [1, 7, 40])
def test_pieces_and_padding_change_no_list_of_a_prompt(chunks: int) -> None:
    model = llama(dtype=torch.float64)
    method = Oracle(part="both", tokens=9)
    ids, steps = prompt(1, 41), prompt(1, 3, seed=1)
    want, _ = applied(model, method, ids, steps)
    got, _ = applied(model, method, ids, steps, chunks=chunks)
    assert_close(got, want, 1e-12)
    batch, mask = left_padded([prompt(1, 5, seed=4)[0], ids[0]])
    with foveate.apply(model, method) as handle:
        padded = run(model, handle.cache(), batch, steps.expand(2, -1), mask)
    assert_close(padded.steps[1:], want[:, 1:], 1e-12)


def test_a_prompt_is_read_to_its_share() -> None:
    """A share of all the prompt's pairs, not of those of its last query."""
    model, ids = llama(layers=2), prompt(1, 151)
    dense = 2 * 6 * 151 * 152 / 2
    for share in (0.1, 0.4, 0.9):
        with foveate.apply(model, Oracle(part="prefill", budget=share)) as handle, torch.no_grad():
            cache = handle.cache()
            cache.meter = {}
            model(ids, past_key_values=cache)
        assert share * dense - 2 * 6 * 151 < cache.meter["prompt_read"] <= share * dense
    with foveate.apply(model, "dense") as handle, pytest.raises(foveate.Infeasible) as error:
        handle.bind(Oracle(part="both", budget=0.013)).check(151)
    assert error.value.floor == pytest.approx(2 / 152)


def test_over_a_kept_set_it_chooses_among_what_is_held() -> None:
    model, ids, steps = llama(), prompt(1, 61), prompt(1, 4, seed=1)
    with watching() as seen:
        applied(model, SnapKV(budget=20, window=5) | Oracle(tokens=6), ids, steps)
    assert all(r["parts"].lists.max() < r["store"].bands[0].used for r in seen if not r["parts"].dense)
    got, _ = applied(model, SnapKV(budget=20, window=5) | Oracle(tokens=24), ids, steps)
    want, _ = applied(model, SnapKV(budget=20, window=5), ids, steps)
    assert_close(got, want, TOLERANCE)


@pytest.mark.parametrize("bad", [{"part": "keep"}, {"share": "layer"}, {"tokens": 0}])
def test_bad_parameters(bad: dict) -> None:
    with pytest.raises(foveate.BadArgument, match=next(iter(bad))):
        Oracle(**bad)
