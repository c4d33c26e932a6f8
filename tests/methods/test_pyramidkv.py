"""PyramidKV: must-hold tests of its card."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.closeness import assert_close
from tests.contract.runs import held as held_by_row
from tests.contract.runs import left_padded, run
from tests.methods.runs import TOLERANCE, applied, held, llama, logits, prompt, stores
from tests.methods.test_snapkv import captured, window_truth

import foveate
from foveate.methods import PyramidKV, Role, SnapKV
from foveate.methods.policies.layers import pyramid
from foveate.models import ModelShape, tiny

SMALL = {"budget": 24, "window": 5, "kernel": 3}


def counts(model, method: PyramidKV, length: int) -> list[int]:
    shape = ModelShape.of(model)
    full = [layer.index for layer in shape.layers if layer.kind == "full"]
    return [method.layer_total(Role(), shape, layer, length) for layer in full]


@pytest.mark.parametrize("beta", [1, 2, 20])
@pytest.mark.parametrize("layers", [1, 2, 3, 8, 33])
def test_layers_add_up_and_never_rise(layers: int, beta: int) -> None:
    """Exactly: the released code's floored slope adds up to more than it was given."""
    for average in (0, 1, 7, 119, 120):
        for most in (average, average + 1, average + 9, 2 * average, 10**6):
            found = pyramid(average, layers, beta=beta, most=most)
            assert sum(found) == layers * average
            assert found == sorted(found, reverse=True)
            assert found[0] <= most
            assert found[-1] >= 0
            if layers > 1 and most >= 2 * average:
                assert (found[0], found[-1]) == (2 * average - average // beta, average // beta)


def test_the_line_is_the_papers() -> None:
    """Between its ends the line is straight to within a token; a floored slope holds 8 % more than the budget here."""
    average, layers, beta = 120, 32, 20
    low, high = average // beta, 2 * average - average // beta
    straight = [high - layer * (high - low) / (layers - 1) for layer in range(layers)]
    found = pyramid(average, layers, beta=beta, most=10**6)
    assert max(abs(a - b) for a, b in zip(found, straight, strict=True)) < 1
    floored = [high - layer * ((high - low) // (layers - 1)) for layer in range(layers)]
    assert sum(floored) > 1.02 * layers * average == 1.02 * sum(found)


def test_more_is_never_less_in_any_layer() -> None:
    """Also where the first layer is full: the released code drops its slope there."""
    before = [0] * 7
    for average in range(191):
        found = pyramid(average, 7, beta=20, most=190)
        assert all(a <= b for a, b in zip(before, found, strict=True))
        before = found
    assert before == [190] * 7


@pytest.mark.parametrize("family", ["llama", "gemma3", "deepseek-v3"])
@pytest.mark.parametrize("budget", [24, 60, 0.6])
def test_each_layer_holds_its_part_of_the_budget(family: str, budget: float) -> None:
    net = tiny(family, layers=6, heads=4, kv_heads=2)
    method = PyramidKV(budget=budget, window=5)
    _, cache = applied(net, method, prompt(1, 101))
    found = [len(x) for store in stores(cache) for x in held(store)[:1]]
    full = [layer.index for layer in ModelShape.of(net).layers if layer.kind == "full"]
    kept = [found[i] for i in full]
    assert kept == counts(net, method, 101)
    assert sum(kept) == len(kept) * method.total(ModelShape.of(net), 101)
    assert kept[0] > kept[-1]


@pytest.mark.parametrize("settings", [{"beta": 1}, {"beta": 20, "layers": 1}])
def test_without_a_slope_it_is_snapkv(settings: dict) -> None:
    model = llama(layers=settings.get("layers", 3))
    ids, steps = prompt(2, 61), prompt(2, 3, seed=1)
    got, cache = applied(model, PyramidKV(**SMALL, beta=settings["beta"]), ids, steps)
    want, plain = applied(model, SnapKV(**SMALL), ids, steps)
    assert [held(s) for s in stores(cache)] == [held(s) for s in stores(plain)]
    assert torch.equal(got, want)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (8, 1)])
def test_keeps_the_top_of_the_plain_formula(heads: int, kv_heads: int) -> None:
    """W + k_l tokens in layer l: the window counts in."""
    ids = prompt(1, 61)
    geometry = {"heads": heads, "kv_heads": kv_heads, "layers": 3}
    _, cache = applied(llama(**geometry), PyramidKV(budget=20, window=5, kernel=1, beta=5), ids)
    for (q, k, scale), store, chosen in zip(captured(ids, **geometry), stores(cache), (27, 15, 3), strict=True):
        mass = window_truth(q, k, 5, scale).mean(2)
        want = [sorted([*row.topk(chosen).indices.tolist(), *range(56, 61)]) for row in mass.flatten(0, 1)]
        assert held(store) == want


def test_room_for_all_is_dense() -> None:
    model, ids, steps = llama(), prompt(2, 41), prompt(2, 7, seed=1)
    want, _ = logits(model, ids, steps)
    for budget in (41, 500, 1.0):
        got, _ = applied(model, PyramidKV(budget=budget), ids, steps)
        assert_close(got, want, TOLERANCE)


def test_rows_have_pyramids_of_their_own_lengths() -> None:
    model, method = llama(), PyramidKV(budget=0.5, window=5)
    rows = [prompt(1, n, seed=n)[0] for n in (3, 41, 101)]
    ids, mask = left_padded(rows)
    with foveate.apply(model, method) as handle:
        cache = handle.cache()
        run(model, cache, ids, prompt(3, 2, seed=1), mask)
    for b, row in enumerate(rows):
        found = [len(heads[0]) - 2 for heads in held_by_row(cache, b)]
        assert found == ([3, 3, 3] if b == 0 else counts(model, method, len(row)))


def test_layers_of_unequal_weight_share_bytes() -> None:
    """Where the first layers' tokens are the heavier ones, the pyramid gets smaller, not the cache larger."""
    shape = ModelShape.of(llama(layers=4))
    heavy = [replace(layer, store_heads=8) if layer.index < 2 else layer for layer in shape.layers]
    for layers, fits in ((heavy, True), (shape.layers, False)):
        uneven = replace(shape, layers=tuple(layers))
        method = PyramidKV(budget=0.3, window=5)
        average = method.total(uneven, 200)
        weight = [uneven.kv_bytes_per_slot(i) + 4 * uneven.layers[i].store_heads for i in range(4)]
        found = [method.layer_total(Role(), uneven, i, 200) for i in range(4)]
        used, granted = sum(w * n for w, n in zip(weight, found, strict=True)), sum(weight) * average
        assert granted * 0.97 < used <= granted
        assert (sum(found) < 4 * average) == fits


def test_below_the_floor_is_refused_with_it() -> None:
    """The window alone, in every layer: no count falls below it, however short the prompt."""
    with foveate.apply(llama(layers=4), "dense") as handle:
        with pytest.raises(foveate.Infeasible) as error:
            handle.bind(PyramidKV(budget=0.05, window=16)).check(200)
        handle.bind(PyramidKV(budget=error.value.floor, window=16)).check(200)
    for length in range(17, 60):
        assert min(counts(llama(), PyramidKV(budget=17, window=16), length)) >= 16


@pytest.mark.parametrize(
    "bad", [{"beta": 0}, {"window": 0}, {"kernel": 4}, {"pool": "sum"}, {"reduce": "median"}, {"budget": 0.0}]
)
def test_bad_parameters(bad: dict) -> None:
    with pytest.raises(foveate.BadArgument, match=next(iter(bad))):
        PyramidKV(**bad)
