"""The cost model against sums written out, and Kinetics' predictions."""

from __future__ import annotations

from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foveate.bench.clock import Rates
from foveate.bench.cost import Attention, Cost, Model, Work, balance, capped, coverage, crossover, decode, prefill
from foveate.models.named import NAMED
from foveate.models.shape import ModelShape

EIGHT = Model.of(ModelShape.of(NAMED["qwen3-8b"]()), 8.19e9)
SPARSE = ["top-k", "block-top-k", "window"]
counts = st.integers(0, 400)


def total(cost: Cost) -> float:
    return cost.eflops(300.0)


@given(counts, st.integers(1, 400), counts)
def test_a_capped_sum_is_the_sum(prompt: int, generated: int, budget: int) -> None:
    assert capped(prompt, generated, budget) == sum(min(budget, prompt + t) for t in range(1, generated + 1))


@given(counts, st.integers(1, 300))
def test_dense_is_the_sum_over_tokens(prompt: int, generated: int) -> None:
    cost = decode(EIGHT, Attention(), Work(prompt, generated))
    pairs = sum(prompt + t for t in range(1, generated + 1))
    assert cost.attention == pytest.approx(4 * EIGHT.heads * pairs)
    # The paper's closed form leaves out the newest token of every step.
    paper = 2 * (2 * prompt + generated) * generated * EIGHT.heads
    assert cost.attention - paper == pytest.approx(2 * generated * EIGHT.heads, rel=1e-6, abs=1)
    assert cost.cache == pytest.approx(4 * EIGHT.kv * pairs)


@given(counts, st.integers(1, 300), st.integers(1, 5))
def test_a_budget_for_everything_is_dense(prompt: int, generated: int, trials: int) -> None:
    dense = decode(EIGHT, Attention(), Work(prompt, generated, trials))
    for kind in ("top-k", "window"):
        sparse = decode(EIGHT, Attention(kind, prompt + generated), Work(prompt, generated, trials))  # type: ignore[arg-type]
        assert sparse.flops == pytest.approx(dense.flops)
    one = decode(EIGHT, Attention("top-k", prompt + generated), Work(prompt, generated))
    assert one.cache == pytest.approx(decode(EIGHT, Attention(), Work(prompt, generated)).cache)


@given(
    counts, st.integers(1, 200), counts, st.integers(1, 6), st.sampled_from(["dense", "quantized", "state", *SPARSE])
)
def test_costs_grow_with_everything(prompt: int, generated: int, budget: int, trials: int, kind: str) -> None:
    def cost(p: int, g: int, b: int, n: int) -> float:
        return total(decode(EIGHT, Attention(kind, b), Work(p, g, n)))  # type: ignore[arg-type]

    base = cost(prompt, generated, budget, trials)
    assert cost(prompt + 1, generated, budget, trials) >= base
    assert cost(prompt, generated + 1, budget, trials) > base
    assert cost(prompt, generated, budget + 1, trials) >= base
    assert cost(prompt, generated, budget, trials + 1) > base


def test_the_released_code_has_the_wrong_sign() -> None:
    """With the correction added, a budget of all tokens would cost more than dense attention."""
    prompt, generated, budget = 100, 1000, 1100
    wrong = budget * generated + 0.5 * max(0, budget - prompt) ** 2
    dense = sum(prompt + t for t in range(1, generated + 1))
    assert wrong > 2 * dense
    assert capped(prompt, generated, budget) == dense


@pytest.mark.parametrize(("name", "parameters", "paper"), [("qwen3-8b", 8.19e9, 395)])
def test_where_attention_outweighs_parameters(name: str, parameters: float, paper: float) -> None:
    model = Model.of(ModelShape.of(NAMED[name]()), parameters)
    assert balance(model, 562.5) == pytest.approx(paper, rel=0.02)


def test_bits_scale_the_traffic() -> None:
    work = Work(10_000, 100)
    dense, four = decode(EIGHT, Attention(), work), decode(EIGHT, Attention("quantized", bits=4.5), work)
    assert four.cache == pytest.approx(dense.cache * 4.5 / 16) and four.flops == dense.flops


def test_crossover() -> None:
    assert crossover(lambda n: 100 + n, lambda n: 2 * n) == 101
    assert crossover(lambda n: 1, lambda n: 2) == 1
    assert crossover(lambda n: 2 * n, lambda n: n) == inf

    def step(kind: Attention, n: int) -> float:
        return total(decode(EIGHT, kind, Work(n, 1)))

    quest = Attention("block-top-k", 2048)
    length = crossover(lambda n: step(quest, n), lambda n: step(Attention(), n))
    assert 2048 < length < 2 * 2048


def test_seconds_are_a_roofline() -> None:
    machine = Rates(3e12, 2.8e12, 8e14)
    step = decode(EIGHT, Attention(), Work(131072, 1))
    assert step.seconds(machine) == pytest.approx((step.cache + step.weights) / 3e12)
    prompt = prefill(EIGHT, 131072)
    assert prompt.seconds(machine) == pytest.approx(prompt.flops / 8e14)
    assert prefill(EIGHT, 131072, 0.1).attention == pytest.approx(0.1 * prompt.attention)


@given(st.integers(1, 40), st.data())
def test_coverage(tried: int, data: st.DataObject) -> None:
    correct, k = data.draw(st.integers(0, tried)), data.draw(st.integers(1, tried))
    assert coverage(correct, tried, tried) == (1.0 if correct else 0.0)
    assert 0 <= coverage(correct, tried, k) <= 1
