"""The linear recurrence: every form gives what the formula says."""

import pytest
import torch

from foveate.attention.recurrence import TOGETHER, chunked, reference, step
from foveate.errors import BadArgument


def drawn(length=37, batch=2, heads=4, width=5, keys=3, groups=(2, 4), dtype=torch.float64, decay=1.0):
    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64).to(dtype)

    dt = torch.rand(batch, length, heads, dtype=torch.float64).to(dtype)
    rate = torch.rand(heads, dtype=torch.float64).to(dtype) * decay
    return {
        "x": normal(batch, length, heads, width),
        "dt": dt,
        "log_decay": -rate * dt,
        "b": normal(batch, length, groups[0], keys),
        "c": normal(batch, length, groups[1], keys),
        "skip": normal(heads),
        "state": normal(batch, heads, width, keys),
    }


def by_hand(g):
    """The formula with every pair of tokens written out: no state at all."""
    batch, length, heads, _ = g["x"].shape
    y = torch.zeros_like(g["x"])
    for r in range(batch):
        for h in range(heads):
            b = g["b"][r, :, h * g["b"].shape[2] // heads]
            c = g["c"][r, :, h * g["c"].shape[2] // heads]
            for i in range(length):
                for j in range(i + 1):
                    left = g["log_decay"][r, j + 1 : i + 1, h].sum().exp()
                    y[r, i, h] += left * g["dt"][r, j, h] * (c[i] @ b[j]) * g["x"][r, j, h]
                whole = g["log_decay"][r, : i + 1, h].sum().exp()
                y[r, i, h] += whole * g["state"][r, h] @ c[i] + g["skip"][h] * g["x"][r, i, h]
    return y


def test_the_reference_is_the_formula():
    given = drawn(length=9)
    torch.testing.assert_close(reference(**given)[0], by_hand(given), rtol=0, atol=1e-12)


@pytest.mark.parametrize("length", [1, 2, 16, 17, 37])
@pytest.mark.parametrize("chunk", [1, 7, 16, 64])
def test_chunks_are_exact(length, chunk):
    given = drawn(length)
    y, state = chunked(**given, chunk=chunk)
    want, left = reference(**given)
    torch.testing.assert_close(y, want, rtol=0, atol=1e-10)
    torch.testing.assert_close(state, left, rtol=0, atol=1e-10)


@pytest.mark.parametrize("groups", [(1, 1), (4, 1), (1, 4), (2, 2), (4, 4)])
def test_groups_are_shared_by_runs_of_heads(groups):
    given = drawn(groups=groups)
    torch.testing.assert_close(chunked(**given, chunk=8)[0], reference(**given)[0], rtol=0, atol=1e-10)


def test_in_single_precision_over_a_long_text():
    given = drawn(length=700, dtype=torch.float32)
    y, state = chunked(**given)
    assert y.dtype == state.dtype == torch.float32
    want, left = reference(**given)
    assert (y - want).norm() / want.norm() < 1e-4 and (state - left).norm() / left.norm() < 1e-4


def test_a_long_text_is_read_in_parts():
    given = drawn(length=301)
    y, state = chunked(**given, chunk=2)
    want, left = reference(**given)
    assert given["x"].shape[1] > 2 * TOGETHER
    torch.testing.assert_close(y, want, rtol=0, atol=1e-10)
    torch.testing.assert_close(state, left, rtol=0, atol=1e-10)


def test_in_bf16_the_state_is_wide():
    given = drawn(dtype=torch.bfloat16)
    y, state = chunked(**given)
    want, _ = reference(**given)
    assert y.dtype == torch.bfloat16 and state.dtype == torch.float32
    assert (y - want).norm() / want.norm() < 4e-3  # what rounding y alone costs


@pytest.mark.parametrize("decay", [0.0, 1e3, float("inf")])
def test_decays_of_every_strength(decay):
    """One, none, and those whose product underflows: no NaN, and the formula."""
    given = drawn(length=50, dtype=torch.float32, decay=1.0)
    given["log_decay"] = -given["dt"].clamp_min(0.01) * decay if decay else given["dt"] * 0
    y, _ = chunked(**given, chunk=16)
    want = reference(**given)[0]
    assert torch.isfinite(y).all() and (y - want).norm() / want.norm() < 1e-5


def test_any_split_with_the_state_carried():
    given = drawn(29)
    want, left = chunked(**given)
    state, parts = given["state"], []
    for a, z in ((0, 1), (1, 12), (12, 29)):
        now = {k: v[:, a:z] for k, v in given.items() if k not in ("skip", "state")}
        y, state = chunked(**now, skip=given["skip"], state=state, chunk=4)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), want, rtol=0, atol=1e-10)
    torch.testing.assert_close(state, left, rtol=0, atol=1e-10)


def test_steps_are_the_scan():
    given = drawn(11)
    want, left = reference(**given)
    state = given["state"]
    for t in range(11):
        y, state = step(*(given[k][:, t] for k in ("x", "dt", "log_decay", "b", "c")), given["skip"], state)
        torch.testing.assert_close(y, want[:, t], rtol=0, atol=1e-12)
    torch.testing.assert_close(state, left, rtol=0, atol=1e-12)


def test_without_a_state_it_begins_at_zero():
    given = drawn() | {"state": None, "skip": None}
    zeros = given | {"state": torch.zeros(2, 4, 5, 3, dtype=torch.float64)}
    assert torch.equal(chunked(**given)[0], chunked(**zeros)[0])
    torch.testing.assert_close(chunked(**given)[0], reference(**given)[0], rtol=0, atol=1e-10)


def test_a_token_of_no_weight_changes_nothing():
    given = drawn(20)
    given["dt"][:, 5], given["log_decay"][:, 5] = 0, 0
    given["skip"] = None
    without = {k: v if v is None or k == "state" else torch.cat([v[:, :5], v[:, 6:]], 1) for k, v in given.items()}
    y, state = chunked(**given, chunk=8)
    want, left = chunked(**without, chunk=8)
    torch.testing.assert_close(torch.cat([y[:, :5], y[:, 6:]], 1), want, rtol=0, atol=1e-10)
    torch.testing.assert_close(state, left, rtol=0, atol=1e-10)


def test_gradients_are_those_of_the_reference():
    given = drawn(13, batch=1)
    names = list(given)
    ours = {k: v.clone().requires_grad_() for k, v in given.items()}
    theirs = {k: v.clone().requires_grad_() for k, v in given.items()}
    for form, leaves in ((lambda **g: chunked(**g, chunk=5), ours), (reference, theirs)):
        y, state = form(**leaves)
        (y.square().sum() + state.sin().sum()).backward()
    for name in names:
        torch.testing.assert_close(ours[name].grad, theirs[name].grad, rtol=0, atol=1e-9)


def test_without_decay_it_is_causal_linear_attention():
    given = drawn(12, heads=2, groups=(2, 2)) | {"state": None, "skip": None}
    given["dt"], given["log_decay"] = torch.ones_like(given["dt"]), torch.zeros_like(given["dt"])
    scores = torch.einsum("bihk,bjhk->bhij", given["c"], given["b"]).tril()
    want = torch.einsum("bhij,bjhp->bihp", scores, given["x"])
    torch.testing.assert_close(chunked(**given, chunk=5)[0], want, rtol=0, atol=1e-10)


def test_refusals():
    with pytest.raises(BadArgument, match="chunk"):
        chunked(**drawn(), chunk=0)
    with pytest.raises(BadArgument, match="groups"):
        chunked(**drawn(groups=(3, 4)))
