"""ActQKV: must-hold tests of its card."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tests.closeness import assert_close
from tests.contract.runs import left_padded, run
from tests.methods.runs import TOLERANCE, applied, llama, logits, prompt, watching
from tests.rotation import turn
from torch import Tensor

import foveate
from foveate.attention import Partial
from foveate.methods import ActQKV
from foveate.methods.policies.outliers import Moments, joined, moments, outlier_weights, running_weights
from foveate.methods.policies.recall import cosines, normalised_entropy, taken
from foveate.models import tiny

SMALL = {"budget": 26, "init": 3, "local": 8, "block": 4, "representatives": 2, "chunk": 16, "least": 1}
OWN = {**SMALL, "budget": None, "topk": 3}


class Truth:
    """The algorithm on one row and layer, token by token, as the card says it."""

    def __init__(self, model: Any, method: ActQKV, scale: float) -> None:
        self.model, self.m, self.scale = model, method, scale
        self.keys = self.values = torch.zeros(0)
        self.mass: list[float] = []
        self.pieces: list[tuple[Tensor, int]] = []

    def take(self, read: dict[str, Any], length: int, row: int, per: int, k: list[int] | int) -> Tensor:
        """Outputs [H, n, D] of one forward, and per piece the blocks it recalled in `chosen`."""
        kv = read["store"].spec.heads
        band = read["store"].bands[0]
        group = read["q"].shape[1] // kv
        keys, values = (x.unflatten(0, (-1, kv))[row, :, :length] for x in (band.keys(), band.values()))
        self.raw = turn(self.model, keys, -torch.arange(length)).repeat_interleave(group, 0)
        self.values = values.double().repeat_interleave(group, 0)
        count = read["how"].fresh[row]
        first = length - int(count)
        self.q = turn(self.model, read["q"][row, :, :count], -torch.arange(first, length))
        self.first = first
        self.mass += [0.0] * int(count)
        self.chosen, outs = [], []
        for number, begin in enumerate(range(first, length, per)):
            take = k if isinstance(k, int) else k[number]
            outs.append(self.piece(begin, min(begin + per, length), take))
        return torch.cat(outs, dim=1)

    def piece(self, begin: int, end: int, k: int) -> Tensor:
        m = self.m
        behind = [j for j in range(end) if begin - j >= m.local]  # beyond the window of the first query
        sinks = [j for j in behind if j < m.init]
        ready = max(0, (len(behind) - m.init) // m.block)
        members = [list(range(m.init + b * m.block, m.init + (b + 1) * m.block)) for b in range(ready)]
        near = [j for j in range(end) if j not in sinks and not any(j in b for b in members)]
        queries = self.q[:, begin - self.first : end - self.first]
        activation = turn(self.model, queries, torch.full((end - begin,), m.local))
        flat = activation.transpose(0, 1).flatten(1)
        weight = torch.full((len(flat),), 1 / len(flat), dtype=torch.float64)
        if m.probe == "window" and len(flat) > 1:
            var = flat.var(0, unbiased=False)
            bias = ((flat - flat.mean(0)) ** 2 / (var + var.mean() / 100)).mean(1)
            weight = bias / bias.sum()
        probe = (weight[:, None] * flat).sum(0)
        scores = []
        for block in members:
            best = sorted(block, key=lambda j: -self.mass[j])[: m.representatives]
            scores.append(torch.cosine_similarity(probe, self.raw[:, best].mean(1).flatten(), dim=0))
        order = sorted(range(ready), key=lambda b: -float(scores[b]))
        chosen = sorted(order[:k])
        self.chosen.append(chosen)
        far = sinks + [j for b in chosen for j in members[b]]
        outs = []
        for i in range(begin, end):
            seen = [j for j in near if j <= i]
            own = turn(self.model, self.q[:, i - self.first : i - self.first + 1], torch.tensor([i]))
            local = (own @ turn(self.model, self.raw[:, seen], torch.tensor(seen)).transpose(1, 2)).squeeze(1)
            away = (activation[:, i - begin : i - begin + 1] @ self.raw[:, far].transpose(1, 2)).squeeze(1)
            for n, j in enumerate(seen):
                self.mass[j] += float((local * self.scale).softmax(-1)[:, n].sum())
            share = (torch.cat([away, local], dim=1) * self.scale).softmax(-1)
            outs.append((share.unsqueeze(-1) * self.values[:, far + seen]).sum(1))
        return torch.stack(outs, dim=1)


def blocks_of(read: dict[str, Any], method: ActQKV, piece: int = 0, row: int = 0) -> list[int]:
    """Blocks recalled for a piece."""
    parts = read["parts"]
    if isinstance(parts, Partial):
        return []
    slots = parts[0].lists[row, 0, piece]
    slots = slots[slots >= method.init]
    assert slots.unflatten(0, (-1, method.block)).diff(dim=1).eq(1).all()
    return ((slots[:: method.block] - method.init) // method.block).tolist()


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (8, 1)])
@pytest.mark.parametrize("probe", ["window", "mean"])
def test_layer_equals_the_algorithm_token_by_token(heads: int, kv_heads: int, probe: str) -> None:
    """Two rows of different length, a prompt in two announced pieces and decode steps: blocks recalled and outputs."""
    model = llama(layers=1, heads=heads, kv_heads=kv_heads)
    method = ActQKV(**OWN, probe=probe)
    lengths, steps = (37, 61), 7
    ids, mask = left_padded([prompt(1, n, seed=n)[0] for n in lengths])
    with foveate.apply(model, method) as handle, watching() as seen:
        run(model, handle.cache(), ids, prompt(2, steps, seed=9), mask)
    scale = seen[0]["how"].scale
    recalled = 0
    for row, length in enumerate(lengths):
        truth = Truth(model, method, scale)
        for number, read in enumerate(seen):
            per = method.chunk if number == 0 else 1
            want = truth.take(read, length + number, row, per, method.topk)
            assert_close(read["result"].out[row, :, : want.shape[1]], want, TOLERANCE)
            for piece, chosen in enumerate(truth.chosen):
                assert blocks_of(read, method, piece, row) == chosen
                recalled += len(chosen)
    assert recalled > 40


def test_chunks_at_pieces_boundaries_are_the_prompt() -> None:
    """Masses and keys of blocks travel from forward to forward."""
    model, method, ids = llama(), ActQKV(**OWN), prompt(1, 64)
    want, _ = applied(model, method, ids, prompt(1, 5, seed=1))
    got, _ = applied(model, method, ids, prompt(1, 5, seed=1), chunks=16)
    assert_close(got, want, TOLERANCE)


@pytest.mark.parametrize("family", ["llama", "deepseek-v3"])
def test_a_window_that_holds_all_is_dense(family: str) -> None:
    """With a window that is longer than the text, and with a whole budget."""
    model, ids, steps = tiny(family, heads=6, kv_heads=2), prompt(2, 41), prompt(2, 7, seed=1)
    want, _ = logits(model, ids, steps)
    for options in ({"local": 48, "topk": 100}, {**SMALL, "budget": 1.0}, {}):
        got, _ = applied(model, ActQKV(**options), ids, steps)
        assert_close(got, want, TOLERANCE)


def test_all_blocks_are_recalled_if_topk_reaches() -> None:
    """Then every earlier token is read once, whatever the layers' shares."""
    method = ActQKV(**{**OWN, "topk": 40})
    with watching() as seen:
        applied(llama(layers=2), method, prompt(1, 61), prompt(1, 6, seed=1))
    for number, read in enumerate(seen[2:]):
        far, local = read["parts"]
        both = torch.cat([far.lists[0, 0, 0], local.over.lists[0, 0, 0]])
        assert sorted(both[both >= 0].tolist()) == list(range(62 + number // 2))
        assert far.frame.query.unique().tolist() == [8]
        assert far.frame.keys.unique().tolist() == [0]


def test_equal_activations_weigh_the_same() -> None:
    """And the probe is then the mean query; a token that stands out weighs more; padding weighs nothing."""
    x = torch.randn(2, 1, 1, 6).expand(2, 1, 5, 6).clone()
    real = torch.ones(2, 1, 5, dtype=torch.bool)
    real[1, 0, 3:] = False
    weights = outlier_weights(x, real, moments(x, real))
    assert_close(weights[0, 0], torch.full((5,), 0.2), 1e-6)
    assert_close(weights[1, 0], torch.tensor([1 / 3, 1 / 3, 1 / 3, 0, 0]), 1e-6)
    x = torch.randn(1, 1, 5, 6)
    x[0, 0, 3] += 10
    weights = outlier_weights(x, real[:1], moments(x, real[:1]))
    assert_close(weights.sum(-1), torch.ones(1, 1), 1e-6)
    assert int(weights.argmax()) == 3
    var = x[0, 0].double().var(0, unbiased=False)
    bias = ((x[0, 0].double() - x[0, 0].double().mean(0)) ** 2 / (var + var.mean() / 100)).mean(1)
    assert_close(weights[0, 0], bias / bias.sum(), 1e-5)


def test_running_moments_are_those_of_the_past() -> None:
    """Below the cap the mean and variance are of all tokens alike in weight; they judge a piece only behind the cap."""
    x, real = torch.randn(2, 3, 8, 4), torch.ones(2, 3, 8, dtype=torch.bool)
    weights, past = running_weights(x, real, None, cap=100)
    assert_close(weights, torch.full_like(weights, 1 / 8), 1e-6)
    assert past.count.tolist() == [24, 24]
    assert_close(past.mean, x.flatten(1, 2).mean(1), 1e-5)
    assert_close(past.var, x.var(2, unbiased=False).mean(1), 1e-5)
    weights, _ = running_weights(x, real, None, cap=15)
    assert_close(weights[:, :2], torch.full_like(weights[:, :2], 1 / 8), 1e-6)
    first = joined(moments(x[:, 0], real[:, 0]), moments(x[:, 1], real[:, 1]), 15)
    assert_close(weights[:, 2], outlier_weights(x[:, 2], real[:, 2], first), 1e-6)
    old, new = Moments(*(t[:1] for t in first)), moments(x[:1, 2], real[:1, 2])
    assert_close(joined(old, new, 15).mean, old.mean + (new.mean - old.mean) * 8 / (15 + 8), 1e-6)


def test_running_moments_are_of_each_row_alone() -> None:
    """No statistics are shared by requests, as they are in the released code."""
    model, method = llama(layers=2), ActQKV(**OWN, probe="running", cap=20)
    one, other = prompt(1, 141), prompt(1, 141, seed=5)
    want, _ = applied(model, method, one)
    applied(model, method, other)
    again, _ = applied(model, method, one)
    assert torch.equal(again, want)
    got, cache = applied(model, method, torch.cat([one, other]))
    assert_close(got[:1], want, TOLERANCE)
    assert cache.layers[0].mine["actqkv"]["count"].tolist() == [141, 141]
    plain, _ = applied(model, ActQKV(**OWN, probe="mean"), one)
    assert not torch.allclose(plain, want)


def test_entropy_is_of_the_softmax() -> None:
    assert_close(normalised_entropy(torch.full((3, 7), 0.3)), torch.ones(3), 1e-6)
    assert float(normalised_entropy(torch.tensor([50.0, 0, 0, 0]))) < 1e-6
    assert float(normalised_entropy(torch.tensor([0.5]))) == 0
    masked = torch.tensor([0.3, 0.3, -torch.inf, -torch.inf])
    assert float(normalised_entropy(masked)) == pytest.approx(1)


def test_cosines_are_of_heads_side_by_side() -> None:
    probes, blocks = torch.randn(2, 6, 3, 8), torch.randn(2, 2, 5, 8)
    got = cosines(probes, blocks)
    wide = blocks.repeat_interleave(3, 1).transpose(1, 2).flatten(2)
    for piece in range(3):
        want = torch.cosine_similarity(probes[:, :, piece].flatten(1)[:, None], wide, dim=2)
        assert_close(got[:, piece], want, 1e-5)


@pytest.mark.parametrize("least", [1, 4])
def test_layers_share_no_more_than_there_is(least: int) -> None:
    """In proportion to their entropies where no bound is met; never more than topk blocks a layer together."""
    layers, topk = 6, 8
    means = torch.rand(50, layers)
    means[0] = torch.tensor([1.0, 2, 1, 1, 2, 1]) / 2
    means[1, 2] = -1
    left = torch.full((50, 1), layers * topk)
    takes = []
    for number in range(layers):
        takes.append(taken(left, means, number, layers, least, 2 * topk))
        left = left - takes[-1]
    total = torch.cat(takes, dim=1)
    assert (total.sum(1) <= layers * topk).all()
    assert (total >= least).all()
    assert (total <= 2 * topk).all()
    assert total[0].tolist() == [6, 12, 6, 6, 12, 6]
    assert total[1].tolist() == [topk] * layers  # a history that is not full: equal shares


def test_shares_follow_the_entropies_in_decode_alone() -> None:
    """Equal in the prompt and until all histories are full; then by the means of the last entropies, row by row."""
    model, method = llama(layers=3), ActQKV(**{**OWN, "history": 4})
    with foveate.apply(model, method) as handle, torch.no_grad():
        cache = handle.cache()
        cache.expect(61)
        with watching() as seen:
            model(prompt(2, 61), past_key_values=cache)
        assert all(len(blocks_of(read, method, 3)) == 3 for read in seen)
        kept = cache.shared["actqkv"]["entropy"]
        assert (kept == -1).all()  # three pieces of four had a choice
        counts = []
        for step in range(3):
            means = cache.shared["actqkv"]["entropy"].clone()
            with watching() as seen:
                model(prompt(2, 1, seed=step), past_key_values=cache)
            counts.append([[len(blocks_of(read, method, 0, row)) for read in seen] for row in (0, 1)])
            if step == 0:
                assert counts[0] == [[3] * 3] * 2
                cache.shared["actqkv"]["entropy"] = torch.tensor([[0.2, 0.1, 0.3], [0.1, 0.3, 0.1]])
            if step == 1:
                assert (means >= 0).all()
                assert counts[1] == [[3, 2, 4], [2, 5, 2]]
        past = torch.stack([layer.mine["actqkv"]["entropy"].mean(1) for layer in cache.couriers()], dim=1)
        assert_close(cache.shared["actqkv"]["entropy"], past, 1e-6)
        assert ((past > 0) & (past <= 1)).all()


def test_below_the_floor_is_refused_with_it() -> None:
    with foveate.apply(llama(), "dense") as handle, pytest.raises(foveate.Infeasible) as error:
        handle.bind(ActQKV(**{**SMALL, "budget": 0.04})).check(200)
    assert error.value.floor == pytest.approx((3 + 8 + 3 + 4) / 200)


@pytest.mark.parametrize(
    "bad",
    [{"init": -1}, {"local": 0}, {"topk": 0}, {"chunk": 0}, {"representatives": 33}, {"probe": "x"}, {"history": 0}],
    ids=str,
)
def test_bad_parameters(bad: dict) -> None:
    with pytest.raises(foveate.BadArgument, match=next(iter(bad))):
        ActQKV(**bad)


def test_defaults_are_the_released_ones() -> None:
    method = ActQKV()
    assert (method.block, method.init, method.local, method.topk) == (32, 64, 512, 46)
    assert (method.representatives, method.chunk, method.least, method.history) == (4, 256, 32, 100)
    assert (method.probe, method.cap) == ("window", 1000)
    assert math.isclose(method.block * method.topk, 1472)
