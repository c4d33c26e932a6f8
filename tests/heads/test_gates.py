"""Gates: the two streams against their definition, gradients to the gates alone, and a planted head that is found."""

from __future__ import annotations

import math
from contextlib import nullcontext
from itertools import islice

import pytest
import torch
from tests.closeness import assert_close
from tests.heads.test_tap import by_definition, tokens
from tests.heads.words import WordTokenizer
from torch import Tensor

from foveate.attention import Span
from foveate.errors import BadArgument, Refused
from foveate.heads import gates as gates_module
from foveate.heads.gates import GateRecipe, gated, learn_gates, trapezoid, unchanged
from foveate.heads.passkeys import Example, passkey_examples
from foveate.heads.tap import Tap, Tapped, frozen, recomputed
from foveate.models import FAMILIES, tiny
from foveate.tasks.corpora import Corpus

SPAN = Span(sink=3, window=8)
LAYERS = frozenset(range(3))


def near(layer: Tapped) -> Tensor:
    return layer.attend(SPAN)


def gates_of(seed: int, layers: int = 3, kv_heads: int = 2) -> dict[int, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {i: torch.rand(kv_heads, generator=generator, requires_grad=True) for i in range(layers)}


def texts(length: int = 140, seed: int = 0) -> list[Example]:
    filler = Corpus("filler", " ".join(f"Nothing of note happens in sentence {i}." for i in range(60)))
    return list(islice(passkey_examples(WordTokenizer(), (length,), seed, filler), 64))


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"deepseek-v3"}))
@torch.no_grad()
def test_open_gates_change_nothing_at_all(family: str, seed: int) -> None:
    model, ids = tiny(family, heads=6, kv_heads=2), tokens(seed, 1, 61)
    goal, full = unchanged(model, ids, LAYERS)
    assert_close(goal, model.model(ids, use_cache=False).last_hidden_state, 1e-5)
    with gated(model, ids, {i: torch.ones(2) for i in LAYERS}, near, full) as hidden:
        assert torch.equal(hidden, goal)


@torch.no_grad()
def test_closed_gates_leave_the_other(seed: int) -> None:
    model, ids = tiny("llama", heads=6, kv_heads=2), tokens(seed, 2, 61)
    with Tap(model, lambda layer: by_definition(layer, SPAN)):
        want = model.model(ids).last_hidden_state
    _, full = unchanged(model, ids, LAYERS)
    with gated(model, ids, {i: torch.zeros(2) for i in LAYERS}, near, full) as hidden:
        assert_close(hidden, want, 1e-5)
    with gated(model, ids, {i: torch.full((2,), -0.3) for i in LAYERS}, near) as hidden:
        assert_close(hidden, want, 1e-5)


@pytest.mark.parametrize("full_term", ["teacher", "self"])
@torch.no_grad()
def test_short_texts_are_dense_for_any_gates(full_term: str, seed: int) -> None:
    model, ids = tiny("llama", heads=6, kv_heads=2), tokens(seed, 1, 11)
    goal, full = unchanged(model, ids, LAYERS)
    with gated(model, ids, gates_of(seed), near, full if full_term == "teacher" else None) as hidden:
        assert_close(hidden, goal, 1e-5)


@pytest.mark.parametrize("full_term", ["teacher", "self"])
def test_two_forwards_are_the_papers_one_forward_of_two_rows(full_term: str, seed: int) -> None:
    """The paper's form: rows F and S in one batch, S's full term taken from F without gradient; masks written out."""
    model, ids, labels = tiny("llama", heads=6, kv_heads=2), tokens(seed, 1, 61), 40
    gates = gates_of(seed)

    def coupled(layer: Tapped) -> Tensor:
        whole, close = by_definition(layer, Span()), by_definition(layer, SPAN)
        alpha = gates[layer.shape.index].clamp(0, 1).repeat_interleave(3).view(1, -1, 1, 1)
        full = whole[:1].detach() if full_term == "teacher" else whole[1:]
        return torch.cat([whole[:1], alpha * full + (1 - alpha) * close[1:]])

    with frozen(model), Tap(model, coupled):
        rows = model.model(ids.expand(2, -1)).last_hidden_state[:, labels:]
    want = (rows[0].detach() - rows[1]).square().mean()
    assert want > 1e-3
    wanted = torch.autograd.grad(want, list(gates.values()))

    with frozen(model):
        goal, outputs = unchanged(model, ids, LAYERS)
        full = outputs if full_term == "teacher" else None
        for again in (nullcontext(), recomputed(model)):
            with again, gated(model, ids, gates, near, full) as hidden:
                got = (hidden[:, labels:] - goal[:, labels:]).square().mean()
                grads = torch.autograd.grad(got, list(gates.values()))
            assert_close(got.detach(), want.detach(), 1e-4)
            for x, y in zip(grads, wanted, strict=True):
                assert_close(x, y, 1e-4)


def test_gradients_reach_the_gates_alone(seed: int) -> None:
    model = tiny("llama", heads=6, kv_heads=2).train()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    learned = learn_gates(model, texts(seed=seed), near, GateRecipe(steps=2))
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert model.training
    assert all(0 <= g < 1 for row in learned.gates for g in row)
    assert learned.losses[0] == 0  # all gates open
    assert learned.losses[1] > 0
    assert learned.tokens == 2 * 140


def test_a_crowded_gpu_changes_no_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers run again in the backward pass where activations would fill the memory."""
    model, recipe = tiny("llama", heads=6, kv_heads=2), GateRecipe(steps=3)
    want = learn_gates(model, texts(), near, recipe)
    calls = []

    def counted(layer: Tapped) -> Tensor:
        calls.append(layer.shape.index)
        return near(layer)

    monkeypatch.setattr(gates_module, "crowded", lambda *_: True)
    got = learn_gates(model, texts(), counted, recipe)
    assert calls == [0, 1, 2, 2, 1, 0] * 3
    assert torch.tensor(got.gates).sub(torch.tensor(want.gates)).abs().max() < 1e-4


def test_equal_texts_equal_gates() -> None:
    model, recipe = tiny("llama", heads=6, kv_heads=2), GateRecipe(steps=3)
    first = learn_gates(model, texts(seed=1), near, recipe)
    assert learn_gates(model, texts(seed=1), near, recipe) == first
    assert learn_gates(model, texts(seed=2), near, recipe) != first


def test_finds_the_head_that_the_model_needs() -> None:
    """Closed gates cost something in one head only: its gate stays open, the others close."""
    model = tiny("llama", layers=2, heads=6, kv_heads=3)

    def all_but_one(layer: Tapped) -> Tensor:
        out = layer.attend().clone()
        if layer.shape.index == 1:
            out[:, 2:4] = 0.0  # the query heads of kv head 1
        return out

    learned = learn_gates(model, texts(), all_but_one, GateRecipe(steps=40, lr=0.1))
    gates = torch.tensor(learned.gates)
    assert gates[1, 1] > 0.8
    gates[1, 1] = 0
    assert gates.max() < 0.05


def test_sliding_layers_have_no_gates() -> None:
    model = tiny("gemma3", layers=4, heads=6, kv_heads=2)
    learned = learn_gates(model, texts(), near, GateRecipe(steps=1))
    assert [None if row is None else len(row) for row in learned.gates] == [None, None, 2, 2]


def test_latent_attention_is_refused() -> None:
    with pytest.raises(Refused, match="one latent vector for all heads"):
        learn_gates(tiny("deepseek-v3"), texts(), near, GateRecipe(steps=1))


def test_too_few_texts_and_broken_weights_are_said() -> None:
    with pytest.raises(BadArgument, match="data='2 examples': 3 steps need one each"):
        learn_gates(tiny("llama"), texts()[:2], near, GateRecipe(steps=3))
    broken = tiny("llama")
    broken.lm_head.weight.data.fill_(math.nan)
    broken.model.norm.weight.data.fill_(math.inf)
    with pytest.raises(Refused, match="distance is nan at step 0"):
        learn_gates(broken, texts(), near, GateRecipe(steps=1))


def test_reports_every_step() -> None:
    said: list[tuple[int, str]] = []
    learn_gates(tiny("llama"), texts(), near, GateRecipe(steps=3), lambda steps, note: said.append((steps, note)))
    assert [steps for steps, _ in said] == [1, 1, 1]
    assert said[0][1].startswith("distance 0, mean gate 1.00")


def test_learning_rate_is_a_trapezoid() -> None:
    factors = [trapezoid(step, 2000) for step in range(2000)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[-1] == pytest.approx(0.1)
    assert factors[200] == pytest.approx(0.55)
    assert all(f == 1.0 for f in factors[400:1600])
    assert factors == pytest.approx(factors[::-1])
    assert 0 < trapezoid(0, 1) <= 1


@pytest.mark.parametrize("bad", [{"steps": 0}, {"lr": 0.0}, {"l1": -1.0}, {"full_term": "student"}])
def test_bad_recipes(bad: dict) -> None:
    with pytest.raises(BadArgument, match=next(iter(bad))):
        GateRecipe(**bad)
