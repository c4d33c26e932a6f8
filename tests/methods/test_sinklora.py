"""SinkLoRA: must-hold tests of its card."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.closeness import assert_close
from tests.methods.runs import TOLERANCE, applied, llama, logits, prompt, stores, watching
from torch import Tensor

import foveate
from foveate.attention import Geometry
from foveate.methods import H2O, SinkLoRA
from foveate.models import tiny

SMALL = {"group": 16, "sink": 2}
FULL = {"group": 4096}


def masks(length: int, chunks: int | None = None, heads: int = 6, kv_heads: int = 2, **kwargs: Any) -> Tensor:
    """Pairs that one layer reads: bool [H, N, N]."""
    with watching() as seen:
        model = llama(layers=1, heads=heads, kv_heads=kv_heads)
        applied(model, SinkLoRA(**{**SMALL, **kwargs}), prompt(1, length), chunks=chunks)
    out = torch.zeros(heads, length, length, dtype=torch.bool)
    start = 0
    for read in seen:
        n = read["q"].shape[2]
        mask = read["parts"].mask(Geometry(1, n, start + n), heads)[0]
        out[:, start : start + n, : start + n] = mask
        start += n
    return out


def rolled(length: int, group: int, sink: int) -> Tensor:
    """The released way, for lengths of whole groups: roll back by half a group, causal inside groups, roll forth; and
    its leak taken out. bool [N, N]."""
    place = torch.arange(length).roll(-group // 2)
    out = torch.zeros(length, length, dtype=torch.bool)
    for i in range(length):
        for j in range(i + 1):
            if i // group == j // group:
                out[place[i], place[j]] = True
    leak = out & torch.ones(length, length).triu(1).bool()
    assert leak.any(), "the released roll looks ahead"
    # The first half group shares one with the last: what is left of it is causal inside each half.
    out &= ~leak
    out[-(group // 2) :, : group // 2] = False
    out[: group // 2, : group // 2] = torch.ones(group // 2, group // 2).tril().bool()
    return out | (torch.arange(length) < sink) & torch.ones(length, length).tril().bool()


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (8, 1)])
def test_heads_read_their_groups(heads: int, kv_heads: int) -> None:
    got = masks(80, heads=heads, kv_heads=kv_heads)
    i, j = torch.arange(80)[:, None], torch.arange(80)
    plain = (j <= i) & ((i // 16 == j // 16) | (j < 2))
    for head in range(heads):
        want = plain if head < heads // 2 else rolled(80, 16, 2)
        assert torch.equal(got[head], want)


@pytest.mark.parametrize("length", [73, 80])
def test_nobody_sees_the_future_and_everyone_the_sinks(length: int) -> None:
    got = masks(length)
    assert not got.triu(1).any()
    assert got.diagonal(dim1=-2, dim2=-1).all()
    assert got[:, 2:, :2].all()


def test_no_future_reaches_the_first_tokens() -> None:
    """What the released roll gets wrong: the last tokens change, and the first ones notice."""
    model, ids = llama(), prompt(1, 64)
    changed = ids.clone()
    changed[0, 60:] = 5
    with foveate.apply(model, SinkLoRA(**SMALL)), torch.no_grad():
        one, other = (model(x).logits for x in (ids, changed))
    assert torch.equal(one[:, :60], other[:, :60])


@pytest.mark.parametrize(("shifted", "count"), [(0.0, 0), (0.34, 1), (1.0, 3)])
def test_a_share_of_the_shifted_heads_returns(shifted: float, count: int) -> None:
    got = masks(80, shifted=shifted)
    assert sum(not torch.equal(mask, got[0]) for mask in got) == count
    assert all(torch.equal(mask, got[-1]) for mask in got[6 - count :])


@pytest.mark.parametrize("chunks", [1, 7, 16, 50])
def test_pieces_have_the_same_groups(chunks: int) -> None:
    assert torch.equal(masks(75, chunks=chunks), masks(75))


@pytest.mark.parametrize("family", ["llama", "gemma3", "deepseek-v3"])
def test_one_group_is_dense(family: str) -> None:
    model = tiny(family, heads=4, kv_heads=2)
    ids, steps = prompt(2, 61), prompt(2, 4, seed=1)
    want, _ = logits(model, ids, steps)
    for kwargs in ({"group": 122}, {"group": 62, "shifted": 0.0}):
        got, _ = applied(model, SinkLoRA(**kwargs), ids, steps)
        assert_close(got, want, TOLERANCE)


def test_a_quarter_of_the_prompt_is_the_default() -> None:
    got = masks(80, group=None, sink=0)
    assert int(got[0].sum(-1).max()) == 20
    assert int(got[0].sum()) == 4 * 20 * 21 // 2


def test_decode_is_dense_and_eviction_composes() -> None:
    model, ids, steps = llama(), prompt(1, 64), prompt(1, 3, seed=1)
    with watching() as seen:
        applied(model, SinkLoRA(**SMALL), ids, steps)
    assert [r["parts"].dense for r in seen] == [False] * 3 + [True] * 9
    want, _ = applied(model, SinkLoRA(**SMALL), ids, steps)
    got, _ = applied(model, SinkLoRA(**SMALL) | H2O(budget=1.0), ids, steps)
    assert_close(got, want, TOLERANCE)
    _, cache = applied(model, SinkLoRA(**SMALL) | H2O(budget=24), ids, steps)
    assert {int(n) for store in stores(cache) for band in store.bands for n in band.lengths} == {24}


@pytest.mark.parametrize("bad", [{"group": 7}, {"group": 0}, {"shifted": 1.5}, {"sink": -1}])
def test_bad_parameters(bad: dict) -> None:
    with pytest.raises(foveate.BadArgument, match=next(iter(bad))):
        SinkLoRA(**bad)
