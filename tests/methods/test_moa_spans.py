"""MoA: must-hold tests of its card."""

from __future__ import annotations

from itertools import pairwise, product
from typing import Any

import numpy as np
import pytest
import torch
from tests.closeness import assert_close
from tests.heads.words import WordTokenizer
from tests.methods.runs import TOLERANCE, applied, held, llama, logits, prompt, stores
from torch import Tensor

import foveate
from foveate.heads.influence import distance_profile, influence, window_losses
from foveate.heads.passkeys import Example
from foveate.heads.tap import Tap, Tapped
from foveate.methods import MoASpans, Profile
from foveate.methods import moa_spans as module
from foveate.methods.budget import PAIR_BYTES
from foveate.methods.moa_spans import blocks, rules
from foveate.methods.policies.choice import choose
from foveate.methods.profile import built_in_profile, fingerprint
from foveate.models import ModelShape, tiny

BLOCK, LENGTHS = 8, (64, 128)
SMALL: dict[str, Any] = {"density": 0.5}


def profile_for(shape: ModelShape) -> Profile:
    """Losses that fall with the window, the more the later the head; with these, more budget narrows no window, which
    the best choice does not promise in general."""
    loss: list[list] = []
    for n in LENGTHS:
        left = 0.9 ** torch.arange(n // BLOCK, dtype=torch.float64) - 0.9 ** (n // BLOCK - 1)
        weights = [1 + 0.3 * (torch.arange(x.num_kv_heads) + 2 * x.index) for x in shape.layers]
        loss.append([(w[:, None] * left).tolist() for w in weights])
    return Profile("moa-spans", fingerprint(shape), {"block": BLOCK, "lengths": list(LENGTHS), "loss": loss})


def profile(model: Any) -> Profile:
    return profile_for(ModelShape.of(model))


def windows(model: Any, method: MoASpans, length: int) -> list[tuple[int, ...]]:
    shape = ModelShape.of(model)
    whole = [(1 << 30,) * layer.num_kv_heads for layer in shape.layers]
    roles = method.plan(shape, profile(model), length)
    return [role.extra.get("windows", w) for role, w in zip(roles, whole, strict=True)]


def masked(model: Any, ids: Tensor, wide: list[tuple[int, ...]]) -> Tensor:
    """Logits of one dense forward in which kv head h of layer l sees the first block and its window."""
    n = ids.shape[1]
    i, j = torch.arange(n)[:, None], torch.arange(n)

    def serve(layer: Tapped) -> Tensor:
        heads, stores = layer.q.shape[1], layer.k.shape[1]
        seen = torch.stack([(j <= i) & ((j < BLOCK) | (i - j < w)) for w in wide[layer.shape.index]])
        k, v, seen = (x.repeat_interleave(heads // stores, dim=-3) for x in (layer.k, layer.v, seen))
        scores = (layer.q @ k.transpose(-1, -2) * layer.scale).masked_fill(~seen, -torch.inf)
        return scores.softmax(-1) @ v

    with torch.no_grad(), Tap(model, serve):
        return model(ids).logits


# -- influence ---------------------------------------------------------------------------------------------------------


def test_influence_is_exact_to_first_order() -> None:
    """Zero one entry, renormalise: the change of sum_k g_k A_k is the formula, for every entry."""
    a = torch.randn(3, 7, dtype=torch.float64).softmax(-1)
    g = torch.randn(3, 7, dtype=torch.float64)
    got = influence(a, g)
    for j in range(7):
        without = a.clone()
        without[:, j] = 0
        without /= without.sum(-1, keepdim=True)
        assert torch.allclose(got[:, j], (g * (without - a)).sum(-1), atol=1e-12)
    alone = influence(torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0, 5.0]]))
    assert alone.tolist() == [[-3.0, 0.0]]


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (8, 1)])
@pytest.mark.parametrize("length", [24, 29])
def test_profile_by_distance_is_the_plain_sum(heads: int, kv_heads: int, length: int) -> None:
    """|E| of every pair outside the first block of keys, added up by distance in blocks and over the group."""
    shape = ModelShape.of(llama(heads=heads, kv_heads=kv_heads)).layers[0]
    q, k, v = (torch.randn(1, h, length, 16) for h in (heads, kv_heads, kv_heads))
    grad = torch.randn(1, heads, length, 16)
    got = distance_profile(Tapped(shape, q, k, v, 0.25), grad, BLOCK)
    a = (
        (q @ k.repeat_interleave(heads // kv_heads, 1).transpose(2, 3) * 0.25)
        .masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
        .softmax(-1)
    )
    felt = influence(a, grad @ v.repeat_interleave(heads // kv_heads, 1).transpose(2, 3)).abs()[0]
    want = torch.zeros(kv_heads, -(-length // BLOCK))
    for h, i, j in product(range(heads), range(length), range(length)):
        if BLOCK <= j <= i:
            want[h // (heads // kv_heads), i // BLOCK - j // BLOCK] += felt[h, i, j]
    assert torch.allclose(got, want, atol=1e-4)


def test_gradients_are_those_of_the_attention_map() -> None:
    """Against autograd through an explicit map, in every layer; nothing of the model is left changed."""
    model, ids = llama(layers=2, max_positions=128), prompt(1, 32)
    maps: dict[int, Tensor] = {}

    def serve(layer: Tapped) -> Tensor:
        group = layer.q.shape[1] // layer.k.shape[1]
        k, v = layer.k.repeat_interleave(group, 1), layer.v.repeat_interleave(group, 1)
        future = torch.ones(32, 32).triu(1).bool()
        a = (layer.q @ k.transpose(2, 3) * layer.scale).masked_fill(future, -torch.inf).softmax(-1)
        a.requires_grad_() if not a.requires_grad else None
        a.retain_grad()
        maps[layer.shape.index] = a
        return a @ v

    with Tap(model, serve):
        out = model(ids).logits[0, 19:-1]
        torch.nn.functional.cross_entropy(out, out.detach().argmax(-1)).backward()
    model.zero_grad(set_to_none=True)
    got = window_losses(model, [Example(tuple(ids[0].tolist()), 20)], BLOCK)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    for layer, a in maps.items():
        felt = influence(a.detach(), a.grad).abs()[0].unflatten(0, (2, 3)).sum(1)
        far = torch.arange(32)[:, None] // BLOCK - torch.arange(32) // BLOCK
        far = far.masked_fill(torch.arange(32) < BLOCK, -1)
        for w in range(4):
            assert_close(got[layer][:, w], felt.masked_fill(far <= w, 0).sum((1, 2)), 1e-4)
        assert (got[layer][:, -1] == 0).all()


# -- the plan ----------------------------------------------------------------------------------------------------------


def test_the_solver_finds_the_best_choice() -> None:
    """Against trying all, with two capacities; the loss never rises with the capacity and no capacity is exceeded."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        loss, cost = rng.random((5, 4)), rng.integers(1, 9, (5, 4, 2)).astype(float)
        loss[:, 0], cost[:, 0] = 2.0, 0.5
        before = np.inf
        for room in ([2.5, 2.5], [9.0, 12.0], [15.0, 15.0], [30.0, 20.0], [90.0, 90.0]):
            taken = choose(loss, cost, np.array(room))
            assert taken is not None
            assert (cost[range(5), taken].sum(0) <= np.array(room) + 1e-9).all()
            options = product(range(4), repeat=5)
            best = min(
                loss[range(5), o].sum() for o in options if (cost[range(5), o].sum(0) <= np.array(room) + 1e-9).all()
            )
            assert loss[range(5), taken].sum() == pytest.approx(best)
            assert best <= before + 1e-12
            before = best
        assert choose(loss, cost, np.array([2.4, 90.0])) is None


def test_rules_are_the_released_grid() -> None:
    """alpha from -N_min in steps of half of it, beta in eighths; windows above 0 at the shortest profiled length and
    within the longest; and one block for ever."""
    grid = rules(64, (2048, 4096, 8192))
    assert grid[0] == (64.0, 0.0)
    assert (0.0, 1.0) in grid
    want = {
        (a, b / 8)
        for a in range(-2048, 8193, 1024)
        for b in range(9)
        if a + b / 8 * 2048 > 0 and a + b / 8 * 8192 <= 8192
    }
    assert set(grid[1:]) == want
    for alpha, beta in grid:
        for n in (1, 63, 64, 2048, 5000, 16384):
            count = -(-n // 64)
            assert blocks(alpha, beta, 64, n) == min(count, max(1, int(alpha / 64 + beta * count + 1e-9)))


@pytest.mark.parametrize("density", [0.4, 0.6])
def test_the_plan_is_the_best_of_all(density: float, seed: int) -> None:
    """All pairs of rules for two heads: what they hold at the profiled lengths and at the prompt's, what they lose."""
    rng, shape, length = np.random.default_rng(seed), ModelShape.of(llama(layers=1)), 150
    lost = {n: np.flip(rng.random((2, n // BLOCK)).cumsum(1), 1) - 0.01 for n in LENGTHS}
    loss = [[table.tolist()] for table in lost.values()]
    data = {"block": BLOCK, "lengths": list(LENGTHS), "loss": loss}
    slot, found = 2 * 16 * 4, {}
    for pair in product(rules(BLOCK, LENGTHS), repeat=2):
        tokens = {n: [min(n, BLOCK + BLOCK * blocks(*rule, BLOCK, n)) for rule in pair] for n in (*LENGTHS, length)}
        nbytes = sum(min(t * (slot + 4) + PAIR_BYTES, length * slot) for t in tokens[length])
        if nbytes > density * 2 * length * slot or any(sum(tokens[n]) > density * 2 * n for n in LENGTHS):
            continue
        value = 0.0
        for n in LENGTHS:
            at = [blocks(*rule, BLOCK, n) - 1 for rule in pair]
            value += lost[n][[0, 1], at].sum() / lost[n][:, 0].sum()
        found.setdefault(round(value, 9), set()).add(tuple(BLOCK * blocks(*rule, BLOCK, length) for rule in pair))
    assert len(found) > 20
    (role,) = MoASpans(density=density).plan(shape, Profile("moa-spans", fingerprint(shape), data), length)
    assert role.extra["windows"] in found[min(found)]


@pytest.mark.parametrize("budget", [0.3, 0.5, 0.8, "24 tokens"])
def test_every_density_is_respected(budget: Any) -> None:
    """At each profiled length and at the prompt's own; more is spent on heads that lose more."""
    model, length = llama(), 150
    share = 24 / length if budget == "24 tokens" else budget
    method = MoASpans(budget=budget)
    wide = windows(model, method, length)
    tokens = [min(length, BLOCK + w) for row in wide for w in row]
    assert sum(tokens) <= share * 6 * length
    assert len(set(tokens)) > 1 or share < 0.2
    _, cache = applied(model, method, prompt(1, length), profile=profile(model))
    # Between two steps a window waits for its newest token.
    want = [min(length, BLOCK + w - 1) for row in wide for w in row]
    assert [len(x) for store in stores(cache) for x in held(store)] == want
    assert np.mean(wide[2]) >= np.mean(wide[0])  # layer 2 loses more


def test_more_budget_never_loses_more() -> None:
    model = llama()
    lost = []
    for budget in (0.3, 0.4, 0.5, 0.6, 0.8, 1.0):
        wide = sum(windows(model, MoASpans(budget=budget), 128), ())
        table = np.array(profile(model).data["loss"][1]).reshape(6, -1)
        lost.append(sum(table[h, min(w // BLOCK, 16) - 1] for h, w in enumerate(wide)))
    assert all(a >= b - 1e-9 for a, b in pairwise(lost))
    assert lost[-1] < 1e-6
    assert lost[0] > lost[2] > 0


def test_windows_grow_with_the_prompt() -> None:
    """alpha + beta N: what was planned for one length is found again from the start at another."""
    model, method = llama(), MoASpans(density=0.6)
    short, long = windows(model, method, 64), windows(model, method, 256)
    assert sum(sum(long, ())) > sum(w for row in short for w in row if w < 1 << 30)
    assert windows(model, method, 64) == short


# -- what is read and held ---------------------------------------------------------------------------------------------


def test_all_windows_whole_is_dense() -> None:
    model, ids, steps = llama(), prompt(2, 61), prompt(2, 9, seed=1)
    want, _ = logits(model, ids, steps)
    for method in (MoASpans(budget=1.0), MoASpans(density=1.0)):
        got, _ = applied(model, method, ids, steps, profile=profile(model))
        assert_close(got, want, TOLERANCE)


def test_windows_as_wide_as_the_prompt_are_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    """alpha = 0, beta = 1 in every head, where a plan may choose it."""
    monkeypatch.setattr(module, "choose", lambda loss, cost, capacity: np.full(len(loss), cost.shape[1] - 1))
    model, ids, steps = llama(), prompt(2, 61), prompt(2, 9, seed=1)
    want, _ = logits(model, ids, steps)
    got, _ = applied(model, MoASpans(), ids, steps, profile=profile(model))
    assert_close(got, want, TOLERANCE)


@pytest.mark.parametrize("chunks", [None, 1, 7])
def test_ragged_decode_equals_the_masked_dense_model(chunks: int | None) -> None:
    model, ids, steps = llama(), prompt(2, 96), prompt(2, 9, seed=1)
    wide = windows(model, MoASpans(), 96)
    assert len({w for row in wide for w in row}) > 1
    want = masked(model, torch.cat([ids, steps], dim=1), wide)[:, 95:]
    got, cache = applied(model, MoASpans(), ids, steps, chunks, profile=profile(model))
    assert_close(got, want, TOLERANCE)
    dense, _ = logits(model, ids, steps)
    assert (got - dense).abs().max() > 1e-2
    for row, store in zip(wide, stores(cache), strict=True):
        for head, w in enumerate(row):
            few = sorted({*range(BLOCK), *range(max(0, 105 - w + 1), 105)})
            assert held(store)[head] in (few, sorted({*few, 105 - w}))


def test_positions_stay_those_of_the_text() -> None:
    """Windows are read at their distance in the text, with no re-counting; a left-padded row is its own."""
    model = llama()
    ids, mask = prompt(2, 96), torch.ones(2, 96, dtype=torch.long)
    mask[0, :20] = 0
    kwargs = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "output_logits": True}
    with foveate.apply(model, MoASpans(), profile=profile(model)) as handle, torch.no_grad():
        both = model.generate(ids, attention_mask=mask, return_dict_in_generate=True, **kwargs)
        cache = handle.cache()
        handle.binding.plan_cache(cache, 96)
        alone = model.generate(ids[:1, 20:], past_key_values=cache, return_dict_in_generate=True, **kwargs)
    assert_close(torch.stack(both.logits)[:, :1], torch.stack(alone.logits), 1e-4)


# -- profiles, budgets, refusals ---------------------------------------------------------------------------------------


def test_infeasible_below_two_blocks_a_head() -> None:
    model, length = llama(), 160
    with pytest.raises(foveate.Infeasible, match="two blocks of 8") as refusal:
        MoASpans(budget=0.1).plan(ModelShape.of(model), profile(model), length)
    per_head = 16 * (2 * 16 * 4 + 4) + 16
    assert refusal.value.floor == pytest.approx(per_head / (length * 2 * 16 * 4))
    roles = MoASpans(budget=refusal.value.floor * 1.0001).plan(ModelShape.of(model), profile(model), length)
    assert {w for role in roles for w in role.extra["windows"]} == {BLOCK}


def test_latent_attention_is_refused() -> None:
    model = tiny("deepseek-v3")
    with pytest.raises(foveate.Refused, match="one latent vector for all heads"):
        foveate.apply(model, MoASpans(), profile=profile(model))


@pytest.mark.parametrize("data", [{}, {"block": 8}, {"block": 8, "lengths": [32], "loss": [[[[1.0]]]]}])
def test_damaged_profiles_are_refused(data: dict) -> None:
    model = llama()
    with pytest.raises(foveate.BadArgument, match="foveate calibrate"):
        foveate.apply(model, MoASpans(), profile=Profile("moa-spans", fingerprint(ModelShape.of(model)), data))


def test_half_is_held_by_default() -> None:
    assert MoASpans().density == 0.5


@pytest.mark.parametrize("bad", [{"density": 0.0}, {"density": 1.5}])
def test_bad_parameters(bad: dict) -> None:
    with pytest.raises(foveate.BadArgument, match=next(iter(bad))):
        MoASpans(**bad)


class Probe:
    """A tiny model with a tokenizer of words."""

    def __init__(self, model: Any, seed: int = 0) -> None:
        self.model, self.tokenizer, self.seed, self.done = model, WordTokenizer(), seed, 0

    def progress(self, total: int, label: str) -> Any:
        def report(steps: int, how: str) -> None:
            assert "loss" in how
            self.done += steps

        return report


def test_calibration_gives_a_profile_that_plan_takes() -> None:
    model = llama(layers=2, max_positions=256)
    probe = Probe(model)
    made = MoASpans().calibrate(probe, lengths=(128, 192), samples=2, block=16)
    assert probe.done == 4
    table = np.array(made.data["loss"][1])
    assert table.shape == (2, 2, 12)
    assert (np.diff(table, axis=-1) <= 1e-6).all()
    assert (table[:, :, -1] == 0).all()
    assert (table[:, :, 0] > 0).all()
    _, cache = applied(model, MoASpans(budget=0.6), prompt(1, 200), profile=made)
    assert cache.nbytes < 0.7 * ModelShape.of(model).dense_kv_bytes(200)
    assert MoASpans().calibrate(Probe(model), lengths=(128, 192), samples=2, block=16).data == made.data
    for bad in ({"block": 0}, {"lengths": (512,)}):
        with pytest.raises(foveate.BadArgument, match=next(iter(bad))):
            MoASpans().calibrate(Probe(model), **bad)


def test_the_shipped_profile_fits_its_model() -> None:
    """What `apply` finds for the built-in model, and how it was measured; windows of its heads differ."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        num_hidden_layers=30,
        hidden_size=576,
        intermediate_size=1536,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        max_position_embeddings=8192,
    )
    shape = ModelShape.of(config)
    shipped = built_in_profile("moa-spans", shape)
    assert shipped is not None
    assert shipped.data["lengths"] == [512, 1024]
    for n, loss in zip(shipped.data["lengths"], shipped.data["loss"], strict=True):
        table = np.array(loss)
        assert table.shape == (30, 3, n // 64)
        assert (np.diff(table, axis=-1) <= 0).all()
    assert {
        "samples",
        "seconds",
        "device",
        "dtype",
        "torch",
        "transformers",
        "date",
        "seed",
    } <= shipped.provenance.keys()
    roles = MoASpans(budget=0.5).plan(shape, shipped, 2048)
    wide = [min(2048, 64 + w) for role in roles for w in role.extra.get("windows", (2048,) * 3)]
    assert 0.4 < np.mean(wide) / 2048 <= 0.5
    assert len(set(wide)) > 3
