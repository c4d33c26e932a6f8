"""The linear recurrence: every form gives what the formula says."""

from typing import Any

import pytest
import torch
from tests.closeness import LIMIT, assert_close

from foveate.attention.recurrence import TOGETHER, chunked, reference, step
from foveate.errors import BadArgument

EXACT, FULL = LIMIT[torch.float64], LIMIT[torch.float32]
Given = dict[str, Any]


@pytest.fixture(autouse=True)
def _seeded(seed):
    torch.manual_seed(seed)


def drawn(
    length=37, batch=2, heads=4, width=5, keys=3, groups=(2, 4), dtype=torch.float64, decay=1.0, **changes
) -> Given:
    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64).to(dtype)

    dt = torch.rand(batch, length, heads, dtype=torch.float64).to(dtype)
    rate = torch.rand(heads, dtype=torch.float64).to(dtype) * decay
    given: Given = {
        "x": normal(batch, length, heads, width),
        "dt": dt,
        "log_decay": -rate * dt,
        "b": normal(batch, length, groups[0], keys),
        "c": normal(batch, length, groups[1], keys),
        "skip": normal(heads),
        "state": normal(batch, heads, width, keys),
    }
    return {**given, **changes}


def by_hand(given: Given) -> tuple[torch.Tensor, torch.Tensor]:
    """y and the last state in float64, with every pair of tokens written out: nothing is carried from row to row, and
    groups are found by their number."""
    g: Given = {name: None if t is None else t.double() for name, t in given.items()}
    length, heads = g["x"].shape[1:3]
    ys, states = [], []
    for h in range(heads):
        b = g["b"][:, :, h * g["b"].shape[2] // heads]
        c = g["c"][:, :, h * g["c"].shape[2] // heads]
        x, dt, logs = (g[name][:, :, h] for name in ("x", "dt", "log_decay"))
        rows, held = [], x
        for i in range(length):
            held = torch.zeros(*x[:, 0].shape, b.shape[-1], dtype=torch.float64)
            if g["state"] is not None:
                held = logs[:, : i + 1].sum(1).exp()[:, None, None] * g["state"][:, h]
            for j in range(i + 1):
                weight = logs[:, j + 1 : i + 1].sum(1).exp() * dt[:, j]
                held = held + weight[:, None, None] * x[:, j, :, None] * b[:, j, None, :]
            row = (held * c[:, i, None, :]).sum(-1)
            rows.append(row if g["skip"] is None else row + g["skip"][h] * x[:, i])
        ys.append(torch.stack(rows, 1))
        states.append(held)
    return torch.stack(ys, 2), torch.stack(states, 1)


def check(got, want, limit):
    for one, other in zip(got, want, strict=True):
        assert_close(one, other, limit)


@pytest.mark.parametrize("groups", [(2, 4), (4, 1)])
def test_the_reference_is_the_formula(groups):
    given = drawn(length=9, groups=groups)
    check(reference(**given), by_hand(given), EXACT)
    given = drawn(length=9, groups=groups, state=None, skip=None)
    check(reference(**given), by_hand(given), EXACT)


@pytest.mark.parametrize("length", [1, 2, 16, 17, 37])
@pytest.mark.parametrize("chunk", [1, 7, 16, 64])
def test_chunks_are_exact(length, chunk):
    given = drawn(length)
    check(chunked(**given, chunk=chunk), by_hand(given), EXACT)


@pytest.mark.parametrize("groups", [(1, 1), (4, 1), (1, 4), (2, 1), (2, 2), (4, 2), (4, 4)])
def test_groups_are_shared_by_runs_of_heads(groups):
    given = drawn(19, groups=groups)
    check(chunked(**given, chunk=8), by_hand(given), EXACT)


def test_in_single_precision_over_a_long_text():
    given = drawn(length=700, dtype=torch.float32)
    y, state = chunked(**given)
    assert y.dtype == state.dtype == torch.float32
    check((y, state), reference(**given), FULL)


def test_a_long_text_is_read_in_parts():
    given = drawn(length=301)
    assert given["x"].shape[1] > 2 * TOGETHER
    check(chunked(**given, chunk=2), reference(**given), EXACT)


def test_in_bf16_the_state_is_wide():
    given = drawn(dtype=torch.bfloat16)
    y, state = chunked(**given)
    want, left = by_hand(given)
    assert y.dtype == torch.bfloat16 and state.dtype == torch.float32
    assert_close(y, want, 2**-9)  # what rounding y alone may cost: half a unit in the last of 8 bits
    assert_close(state, left, FULL)


@pytest.mark.parametrize("decay", [0.0, 1e3, float("inf")])
def test_decays_of_every_strength(decay):
    """One, none, and those whose product underflows: no NaN, and the formula."""
    given = drawn(length=50, dtype=torch.float32, decay=1.0)
    given["log_decay"] = -given["dt"].clamp_min(0.01) * decay if decay else given["dt"] * 0
    check(chunked(**given, chunk=16), by_hand(given), FULL)


def test_any_split_with_the_state_carried():
    given = drawn(29)
    state, parts = given["state"], []
    for a, z in ((0, 1), (1, 12), (12, 29)):
        now: Given = {k: v[:, a:z] for k, v in given.items() if k not in ("skip", "state")}
        y, state = chunked(**now, skip=given["skip"], state=state, chunk=4)
        parts.append(y)
    check((torch.cat(parts, 1), state), by_hand(given), EXACT)


@pytest.mark.parametrize("groups", [(2, 4), (4, 1)])
def test_steps_are_the_scan(groups):
    given = drawn(11, groups=groups)
    want, left = by_hand(given)
    state = given["state"]
    for t in range(11):
        now: Given = {k: v[:, t] for k, v in given.items() if k not in ("skip", "state")}
        y, state = step(**now, skip=given["skip"], state=state)
        assert_close(y, want[:, t], EXACT)
    assert_close(state, left, EXACT)


def test_without_a_state_it_begins_at_zero():
    given = drawn(state=None, skip=None)
    zeros: Given = {**given, "state": torch.zeros(2, 4, 5, 3, dtype=torch.float64)}
    assert torch.equal(chunked(**given)[0], chunked(**zeros)[0])
    check(chunked(**given), by_hand(given), EXACT)


def test_a_token_of_no_weight_changes_nothing():
    given = drawn(20, skip=None)
    given["dt"][:, 5], given["log_decay"][:, 5] = 0, 0
    without: Given = {k: v if k in ("skip", "state") else torch.cat([v[:, :5], v[:, 6:]], 1) for k, v in given.items()}
    y, state = chunked(**given, chunk=8)
    want, left = chunked(**without, chunk=8)
    check((torch.cat([y[:, :5], y[:, 6:]], 1), state), (want, left), EXACT)


def test_gradients_are_those_of_the_formula():
    given = drawn(13, batch=1)
    ours: Given = {k: v.clone().requires_grad_() for k, v in given.items()}
    theirs: Given = {k: v.clone().requires_grad_() for k, v in given.items()}
    for form, leaves in ((lambda g: chunked(**g, chunk=5), ours), (by_hand, theirs)):
        y, state = form(leaves)
        (y.square().sum() + state.sin().sum()).backward()
    for name in given:
        assert_close(ours[name].grad, theirs[name].grad, EXACT)


def test_without_decay_it_is_causal_linear_attention():
    given = drawn(12, heads=2, groups=(2, 2), state=None, skip=None)
    given["dt"], given["log_decay"] = torch.ones_like(given["dt"]), torch.zeros_like(given["dt"])
    scores = torch.einsum("bihk,bjhk->bhij", given["c"], given["b"]).tril()
    want = torch.einsum("bhij,bjhp->bihp", scores, given["x"])
    assert_close(chunked(**given, chunk=5)[0], want, EXACT)


def test_refusals():
    with pytest.raises(BadArgument, match="chunk"):
        chunked(**drawn(), chunk=0)
    with pytest.raises(BadArgument, match="groups"):
        chunked(**drawn(groups=(3, 4)))
