"""SpAtten: must-hold tests of its card, as far as they are about what is computed."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from tests.closeness import assert_close, relative_rms
from tests.methods.runs import TOLERANCE, applied, held, llama, logits, prompt, stores
from torch import Tensor

import foveate
from foveate.heads.tap import Tap, Tapped
from foveate.methods import SpAtten
from foveate.methods.policies.lowbit import rough_and_fine, split_bits
from foveate.models import ModelShape, tiny

SMALL = {"last": 0.2, "start": 2, "recent": 4}


def coded(k: Tensor, method: SpAtten, rough: bool) -> Tensor:
    """Keys [n, D] from so many bits, a scale per key; only the upper ones if rough: number by number."""
    assert method.msb is not None
    out = torch.zeros_like(k)
    for at, key in enumerate(k):
        scale = float(key.abs().max()) / (2 ** (method.msb + method.lsb - 1) - 1)
        for c, x in enumerate(key.tolist()):
            code = round(x / scale)
            out[at, c] = scale * ((code >> method.lsb << method.lsb) if rough else code)
    return out


class Reference:
    """One dense forward of one row under the paper's rules, written out: importance is summed with every pair."""

    def __init__(self, method: SpAtten, tokens: list[int], heads: list[int], prompt_length: int) -> None:
        self.method, self.tokens, self.heads, self.n = method, tokens, heads, prompt_length
        self.alive: list[set[int]] = []
        self.on: list[set[int]] = []
        self.mass, self.size = torch.zeros(prompt_length).double(), torch.zeros(0)
        self.recomputed: list[bool] = []

    def __call__(self, layer: Tapped) -> Tensor:
        index, (count, n) = layer.shape.index, layer.q.shape[1:3]
        before = self.alive[-1] if self.alive else set(range(self.n))
        forced = {*range(self.method.start), *range(self.n - self.method.recent, self.n)}
        order = sorted(before, key=lambda j: (j not in forced, -float(self.mass[j]), j))
        alive = set(order[: self.tokens[index]])
        self.alive.append(alive)
        if not self.on:
            self.size = torch.zeros(count).double()
        last = self.on[-1] if self.on else set(range(count))
        on = set(sorted(last, key=lambda h: (-float(self.size[h]), h))[: self.heads[index]])
        self.on.append(on)
        out = torch.zeros(1, count, n, layer.v.shape[-1])
        for head in range(count):
            store = head * layer.k.shape[1] // count
            for i in range(n):
                read = sorted(({*alive} & {*range(i + 1)}) | {i} | set(range(self.n, i)))
                k, q = layer.k[0, store, read].double(), layer.q[0, head, i].double()
                p = (k @ q * layer.scale).softmax(0)
                if self.method.msb is not None and i >= self.n:
                    looks = [(coded(k, self.method, rough) @ q * layer.scale).softmax(0) for rough in (True, False)]
                    p = looks[int(looks[0].max() < self.method.threshold)]
                    self.recomputed.append(bool(looks[0].max() < self.method.threshold))
                if i < self.n:
                    self.mass[[*read]] += p
                keep = -(-round(self.method.values * 1000) * len(read) // 1000)
                least = p.sort(descending=True, stable=True).indices[keep:]
                p[least] = 0
                if head in on:
                    out[0, head, i] = (p @ layer.v[0, store, read].double()).float()
        self.size += out[0, :, : self.n].double().abs().sum((1, 2))
        return out


def reference(model: Any, method: SpAtten, ids: Tensor, prompt_length: int) -> tuple[Tensor, Reference]:
    shape = ModelShape.of(model)
    roles = method.plan(shape, None, prompt_length)
    tokens = [round(role.extra["share"] * prompt_length) for role in roles]
    made = Reference(method, tokens, [role.extra["heads"] for role in roles], prompt_length)
    with torch.no_grad(), Tap(model, made):
        return model(ids).logits, made


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (8, 1)])
@pytest.mark.parametrize("extra", [{}, {"heads": 0.5}, {"values": 0.4}, {"heads": 0.6, "values": 0.7}])
def test_equals_the_rules_written_out(heads: int, kv_heads: int, extra: dict) -> None:
    """Prompt and decode; later tokens read what each layer still has, and each other."""
    model = llama(heads=heads, kv_heads=kv_heads, layers=3)
    method = SpAtten(**SMALL, **extra)
    ids, steps = prompt(1, 41), prompt(1, 2, seed=1)
    want, made = reference(model, method, torch.cat([ids, steps], dim=1), 41)
    got, cache = applied(model, method, ids, steps)
    assert_close(got, want[:, 40:], TOLERANCE)
    for store, alive in zip(stores(cache), made.alive, strict=True):
        assert held(store) == [sorted({*alive, 41, 42})] * kv_heads
    assert made.alive[0] > made.alive[1] > made.alive[2]
    assert [len(x) for x in made.alive] == [41, 24, 8]
    if "heads" in extra:
        assert made.on[0] > made.on[2]


@pytest.mark.parametrize("extra", [{}, {"values": 0.6}, {"heads": 0.5}])
@pytest.mark.parametrize("threshold", [0.0, 0.4, 1.0])
def test_flat_attention_looks_again_with_all_bits(threshold: float, extra: dict) -> None:
    """Never at a threshold of 0, always at 1 (as good as exact with many bits), else where nothing is that likely."""
    model, ids, steps = llama(heads=4, kv_heads=2, layers=2), prompt(1, 33), prompt(1, 3, seed=1)
    method = SpAtten(**SMALL, **extra, msb=3, lsb=5, threshold=threshold)
    want, made = reference(model, method, torch.cat([ids, steps], dim=1), 33)
    got, _ = applied(model, method, ids, steps)
    assert_close(got, want[:, 32:], TOLERANCE)
    assert len(made.recomputed) == 2 * 4 * 3
    share = sum(made.recomputed) / len(made.recomputed)
    assert share == threshold if threshold in (0, 1) else 0 < share < 1
    exact, _ = applied(model, SpAtten(**SMALL, **extra), ids, steps)
    errors = []
    for msb, lsb, level in ((3, 5, threshold), (12, 12, 1.0)):
        looked, _ = applied(model, SpAtten(**SMALL, **extra, msb=msb, lsb=lsb, threshold=level), ids, steps)
        assert torch.equal(looked[:, 0], exact[:, 0])  # the prompt is read as it is
        errors.append(relative_rms(looked[:, 1:], exact[:, 1:]))
    assert errors[0] > 1e-3
    assert errors[1] < TOLERANCE


def test_upper_and_lower_bits_are_the_number() -> None:
    codes = torch.arange(-128, 128).float()
    for low in (0, 1, 4, 7):
        most, least = split_bits(codes, low)
        assert torch.equal(most * 2**low + least, codes)
        assert int(least.min()) == 0
        assert int(least.max()) == 2**low - 1
        assert int(most.min()) == -(2 ** (7 - low))
        assert int(most.max()) == 2 ** (7 - low) - 1
    x = torch.randn(2, 3, 9, 16)
    rough, fine = rough_and_fine(x, 4, 4)
    step = x.abs().amax(-1, keepdim=True) / 127
    assert ((fine - x).abs() <= 0.5001 * step).all()
    assert ((fine - rough >= -1e-6) & (fine - rough <= 15.001 * step)).all()
    assert torch.equal(rough_and_fine(x, 8, 0)[0], fine)


def test_edited_rows_are_read_whole() -> None:
    from foveate.methods import METHODS

    SpAtten() | METHODS["quest"]()
    for extra in ({"msb": 8}, {"values": 0.5}):
        with pytest.raises(foveate.BadArgument, match="both fill the slot 'decode'"):
            SpAtten(**extra) | METHODS["quest"]()


def test_a_chain_of_subsets() -> None:
    """Over layers, in every row of a padded batch; the first and newest tokens stay."""
    model, method = llama(layers=5), SpAtten(last=0.3, start=2, recent=5)
    ids = prompt(2, 61)
    mask = torch.ones(2, 61, dtype=torch.long)
    mask[1, :20] = 0
    with foveate.apply(model, method) as handle, torch.no_grad():
        cache = handle.cache()
        cache.expect(61)
        model(ids, past_key_values=cache, attention_mask=mask)
    for row, length in ((0, 61), (1, 41)):
        sets = [set(held(store)[2 * row]) for store in stores(cache)]
        assert sets[0] == set(range(length))
        assert all(a > b for a, b in pairwise(sets))
        assert {0, 1, *range(length - 5, length)} <= sets[-1]
        assert len(sets[-1]) == int(0.3 * length + 1e-6)
        assert all(held(store)[2 * row] == held(store)[2 * row + 1] for store in stores(cache))


def test_rows_of_a_batch_are_pruned_alone(seed: int) -> None:
    """Tokens, heads and values; the released demo adds up the attention of a whole batch."""
    model, method = llama(), SpAtten(**SMALL, heads=0.5, values=0.6)
    ids, steps = prompt(3, 41, seed % 10**6), prompt(3, 2, seed % 10**6 + 1)
    got, together = applied(model, method, ids, steps)
    left = set()
    for row in range(3):
        want, alone = applied(model, method, ids[row : row + 1], steps[row : row + 1])
        assert_close(got[row : row + 1], want, TOLERANCE)
        for both, one in zip(stores(together), stores(alone), strict=True):
            assert held(both)[2 * row : 2 * row + 2] == held(one)
        left.add(str([held(store) for store in stores(alone)]))
    assert len(left) == 3


def test_all_shares_at_one_are_dense() -> None:
    model, ids, steps = llama(), prompt(2, 41), prompt(2, 7, seed=1)
    want, _ = logits(model, ids, steps)
    for kwargs in ({"last": 1.0}, {"budget": 1.0}, {"last": 1.0, "values": 1.0, "heads": 1.0}, {}):
        got, _ = applied(model, SpAtten(**kwargs), ids, steps)  # by default the newest 128 tokens stay
        assert_close(got, want, TOLERANCE)


def test_pruned_heads_give_zero_and_never_return() -> None:
    model, ids, steps = llama(layers=4), prompt(1, 41), prompt(1, 5, seed=1)
    seen: dict[int, list[Tensor]] = {}
    hooks = [
        layer.self_attn.o_proj.register_forward_pre_hook(
            lambda module, args, i=i: seen.setdefault(i, []).append(args[0].unflatten(-1, (6, -1)))
        )
        for i, layer in enumerate(model.model.layers)
    ]
    applied(model, SpAtten(last=1.0, heads=0.5), ids, steps)
    for hook in hooks:
        hook.remove()
    off: set[int] = set()
    for i in range(4):
        zero = [{h for h in range(6) if not out[..., h, :].any()} for out in seen[i]]
        assert len(zero) == 6
        assert all(z == zero[0] for z in zero)  # prompt and every step
        assert off <= zero[0]
        off = zero[0]
    assert len(off) == 3


@pytest.mark.parametrize("budget", [0.9, 0.7, 0.4, 0.3])
def test_budget_is_what_is_held(budget: float) -> None:
    model, ids = llama(layers=6), prompt(1, 200)
    method = SpAtten(start=2, recent=8, budget=budget)
    _, cache = applied(model, method, ids)
    counts = [len(held(store)[0]) for store in stores(cache)]
    assert counts[0] == 200
    assert counts == sorted(counts, reverse=True)
    granted = method.budget.held_tokens(ModelShape.of(model), 200, name="spatten", extra=8)
    assert 6 * granted - 6 * 3 <= sum(counts) <= 6 * granted
    dense = ModelShape.of(model).dense_kv_bytes(200)
    assert cache.nbytes <= budget * dense + 6 * 2 * 16 * (4 + 4 + 2 * 64 + 16)


def test_below_the_floor_is_refused_with_it() -> None:
    method = SpAtten(start=2, recent=8, budget=0.2)
    with pytest.raises(foveate.Infeasible) as error:
        method.plan(ModelShape.of(llama(layers=4)), None, 200)
    assert 0.25 + 0.75 * 10 / 200 <= error.value.floor < 0.34


def test_a_second_prompt_is_dense_over_what_is_held() -> None:
    model = llama()
    with foveate.apply(model, SpAtten(**SMALL)) as handle, torch.no_grad():
        cache = handle.cache()
        for turn in range(2):
            cache.expect(41)
            out = model(prompt(1, 41, seed=turn), past_key_values=cache).logits
        assert out.isfinite().all()
        assert [len(held(store)[0]) for store in stores(cache)] == [82, 24 + 41, 8 + 41]


def test_latent_attention_is_refused() -> None:
    with pytest.raises(foveate.Refused, match="latents"):
        foveate.apply(tiny("deepseek-v3"), SpAtten())


@pytest.mark.parametrize(
    "bad",
    [
        {"last": 0.0},
        {"heads": 1.5},
        {"values": 0.0},
        {"start": -1},
        {"recent": 0},
        {"msb": 0},
        {"msb": 21},
        {"lsb": -1},
        {"threshold": 1.1},
    ],
)
def test_bad_parameters(bad: dict) -> None:
    with pytest.raises(foveate.BadArgument, match=next(iter(bad))):
        SpAtten(**bad)
