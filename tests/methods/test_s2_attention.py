"""S2-Attention: must-hold tests of its card."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.closeness import assert_close
from tests.contract.runs import left_padded, run, tokens
from tests.methods.runs import TOLERANCE, applied, llama, logits, prompt, watching
from torch import Tensor

import foveate
from foveate.attention import Geometry
from foveate.methods import S2Attention
from foveate.models import tiny

# A stride with which the heads of the tiny models leave something out between them, where they share what is held.
SMALL = {"block": 4, "local": 2, "stride": 16}
FULL = {"stride": 1}
PATTERN = {**SMALL, "stride": 4}


def masks(length: int, steps: int = 0, chunks: int | None = None, heads: int = 6, kv_heads: int = 2, **kwargs: Any):
    """Pairs that one layer reads, prompt and steps: bool [H, N, N]."""
    total = length + steps
    with watching() as seen:
        applied(
            llama(layers=1, heads=heads, kv_heads=kv_heads),
            S2Attention(**{**PATTERN, **kwargs}),
            prompt(1, length),
            prompt(1, steps, seed=1) if steps else None,
            chunks=chunks,
        )
    out = torch.zeros(heads, total, total, dtype=torch.bool)
    start = 0
    for read in seen:
        n = read["q"].shape[2]
        out[:, start : start + n, : start + n] = read["parts"].mask(Geometry(1, n, start + n), heads)[0]
        start += n
    return out


def truth(length: int, kv_head: int, kv_heads: int, block: int = 4, local: int = 2, stride: int = 4) -> Tensor:
    """The pattern by its definition, pair by pair."""
    out = torch.zeros(length, length, dtype=torch.bool)
    step = max(1, stride // kv_heads)
    for i in range(length):
        for j in range(i + 1):
            a, b = i // block, j // block
            out[i, j] = a - b < local or (b + kv_head * step) % stride == 0
    return out


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (8, 1)])
def test_each_kv_head_reads_its_shard(heads: int, kv_heads: int) -> None:
    """Shared by the query heads of a group; the same in prompt and decode."""
    got = masks(61, 5, heads=heads, kv_heads=kv_heads)
    for head in range(heads):
        assert torch.equal(got[head], truth(66, head // (heads // kv_heads), kv_heads))


def test_heads_together_read_everything() -> None:
    """With as many shifts as the stride; with fewer, some block is read by nobody."""
    causal = torch.ones(61, 61).tril().bool()
    assert torch.equal(masks(61, heads=4, kv_heads=4).any(0), causal)
    assert not torch.equal(masks(61, heads=8, kv_heads=1).any(0), causal)


def test_what_is_left_behind_is_never_read_again() -> None:
    for mask in masks(93, heads=8, kv_heads=4):
        for j in range(93):
            column = mask[j:, j]
            assert not (column[1:] & ~column[:-1]).any()


def test_shares_of_a_random_pattern_would_come_back() -> None:
    """The check above is one: a pattern by distance fails it."""
    i, j = torch.arange(93)[:, None] // 4, torch.arange(93) // 4
    mask = (j <= i) & ((i - j < 2) | ((i - j) % 4 == 0))
    assert any((mask[k:, k][1:] & ~mask[k:, k][:-1]).any() for k in range(93))


@pytest.mark.parametrize("chunks", [1, 6, 16])
def test_pieces_read_the_same(chunks: int) -> None:
    assert torch.equal(masks(61, chunks=chunks), masks(61))


def test_density_follows_the_formula() -> None:
    """Blocks of a row: the local ones, and one in `stride` of those behind."""
    for head, mask in enumerate(masks(64, heads=4, kv_heads=4)):
        for i in range(64):
            own = i // 4
            behind = sum((b + head) % 4 == 0 for b in range(max(0, own - 1)))
            assert int(mask[i].sum()) == 4 * (min(own, 1) + behind) + i % 4 + 1


@pytest.mark.parametrize("family", ["llama", "gemma3", "deepseek-v3"])
def test_no_stride_or_room_for_all_is_dense(family: str) -> None:
    model = tiny(family, heads=4, kv_heads=2)
    ids, steps = prompt(2, 61), prompt(2, 5, seed=1)
    want, _ = logits(model, ids, steps)
    for kwargs in ({"stride": 1}, {"local": 17}, {"dense_heads": 4}):
        got, _ = applied(model, S2Attention(**{**PATTERN, **kwargs}), ids, steps)
        assert_close(got, want, TOLERANCE)


def test_last_heads_may_be_dense() -> None:
    got = masks(61, heads=6, kv_heads=2, dense_heads=1)
    assert torch.equal(got[3:], torch.ones(61, 61).tril().bool().expand(3, -1, -1))
    assert torch.equal(got[0], truth(61, 0, 2))


def test_decode_continues_the_prompt_under_latent_attention() -> None:
    """Logits of steps equal those of one prompt over all tokens: the shards are the same."""
    model, ids = tiny("deepseek-v3", heads=4), prompt(1, 66)
    with foveate.apply(model, S2Attention(**PATTERN)), torch.no_grad():
        want = model(ids).logits[:, 60:]
    got, _ = applied(model, S2Attention(**PATTERN), ids[:, :61], ids[:, 61:])
    assert_close(got, want, TOLERANCE)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2)])
def test_prompt_and_steps_are_dense_attention_under_the_mask(heads: int, kv_heads: int, seed: int) -> None:
    """Rows of different length, each by blocks that are counted from its own first token."""
    lengths = (29, 61)
    model = llama(layers=1, heads=heads, kv_heads=kv_heads)
    ids, mask = left_padded([tokens(seed + n, n) for n in lengths])
    with foveate.apply(model, S2Attention(**PATTERN)) as handle, watching() as seen:
        run(model, handle.cache(), ids, tokens(seed, 2, 5), mask)
    assert not seen[0]["parts"].dense
    (band,) = seen[0]["store"].bands
    k, v = (x.unflatten(0, (2, kv_heads)).repeat_interleave(heads // kv_heads, 1) for x in (band.keys(), band.values()))
    for step, read in enumerate(seen):
        for row, length in enumerate(lengths):
            length += step
            new = length if step == 0 else 1
            shards = torch.stack([truth(length, h * kv_heads // heads, kv_heads)[-new:] for h in range(heads)])
            logit = read["q"][row, :, :new] @ k[row, :, :length].mT * read["how"].scale
            want = logit.masked_fill(~shards, -torch.inf).softmax(-1) @ v[row, :, :length]
            assert_close(read["result"].out[row, :, :new], want, TOLERANCE)


def test_defaults_are_those_of_the_example() -> None:
    method = S2Attention()
    assert (method.block, method.local, method.stride, method.dense_heads) == (64, 32, 8, 0)


@pytest.mark.parametrize("bad", [{"block": 0}, {"local": 0}, {"stride": 0}, {"dense_heads": -1}])
def test_bad_parameters(bad: dict) -> None:
    with pytest.raises(foveate.BadArgument, match=next(iter(bad))):
        S2Attention(**bad)
