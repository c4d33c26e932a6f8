"""FlexPrefill: must-hold tests of its card."""

from __future__ import annotations

import math

import pytest
import torch
from tests.closeness import assert_close
from tests.families import family_model
from tests.methods.runs import TOLERANCE, applied, llama, logits, prompt, watching

import foveate
from foveate.methods import FlexPrefill
from foveate.methods.policies.lists import coverage_count
from foveate.methods.policies.probes import block_mean, js_distance, last_rows, probe_lines

SMALL = {"block": 8, "min_budget": 8, "gamma": 0.6}
FULL = {"min_budget": 4096}


def blocks(read: dict, size: int = 8) -> torch.Tensor:
    """Active blocks [B, H, query blocks, key blocks] of a read."""
    lists = read["parts"].lists
    count = -(-read["store"].bands[0].used // size)
    out = torch.zeros(*lists.shape[:3], count + 1, dtype=torch.bool)
    return out.scatter(-1, torch.where(lists < 0, count, lists).long(), True)[..., :count]


def run(ids: torch.Tensor, model=None, **kwargs) -> list[dict]:
    with watching() as seen:
        applied(model or llama(), FlexPrefill(**{"block": 8, "min_budget": 8, **kwargs}), ids)
    return seen


def prefix(mass: list[float], limit: float) -> list[int]:
    """The largest entries whose running sum stays within the limit."""
    taken, total = [], 0.0
    for i in sorted(range(len(mass)), key=lambda i: -mass[i]):
        total += mass[i]
        if total > limit:
            break
        taken.append(i)
    return taken


def plainly(
    q: torch.Tensor, k: torch.Tensor, scale: float, cap: float | None, how: dict
) -> tuple[set[tuple[int, int]], bool]:
    """The card's steps for one head, q and k [m, D] in float64: active (query block, key block), query-aware or not."""

    def logit(x: torch.Tensor) -> torch.Tensor:
        return x * scale if cap is None else (x * scale / cap).tanh() * cap

    m, b = len(k), how["block"]
    nb = -(-m // b)
    pieces = [range(b * i, min(b * i + b, m)) for i in range(nb)]
    vertical, slash = [0.0] * m, [0.0] * m
    for i in range(m - b, m):
        for j, p in enumerate(logit(q[i] @ k[: i + 1].T).softmax(-1).tolist()):
            vertical[j] += p / b
            slash[i - j] += p / b
    mean_k = torch.stack([k[list(piece)].mean(0) for piece in pieces])
    columns, leaning = ([sum(mass[j] for j in piece) for piece in pieces] for mass in (vertical, slash))
    estimate = logit(mean_k @ q[m - b :].mean(0)).softmax(-1).tolist()
    far = 0.0
    for x, y in zip(estimate, columns, strict=True):
        far += sum(0.5 * z * math.log(z / ((x + y) / 2)) for z in (x, y) if z > 0)
    aware = math.sqrt(max(far, 0.0)) < how["tau"]
    least = min(nb, -(-how["min_budget"] // b))
    most = nb if how.get("max_budget") is None else min(nb, -(-how["max_budget"] // b))
    lines = []
    for tokens, mass in ((vertical, columns), (slash, leaning)):
        n = (len(prefix(tokens, how["gamma"])) + 1) // b + 1
        n = least if aware else max(least, min(most, n))
        lines.append([0, *sorted(range(1, nb), key=lambda i, mass=mass: -mass[i])][:n])
    active = {(i, j) for i in range(nb) for j in range(i + 1) if j in lines[0] or i - j in lines[1]}
    if aware:
        pairs = [(i, j) for i in range(nb) for j in range(i + 1)]
        rows = [logit(mean_k[: i + 1] @ q[list(pieces[i])].mean(0)).softmax(-1) for i in range(nb)]
        active |= {pairs[at] for at in prefix([float(rows[i][j]) for i, j in pairs], how["gamma"] * nb)}
    return active, aware


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize(
    ("length", "block", "gamma", "min_budget", "max_budget"),
    [(93, 8, 0.6, 8, None), (96, 8, 0.95, 16, None), (61, 2, 0.7, 4, None), (101, 4, 0.8, 8, 20)],
)
def test_reads_the_blocks_that_the_plain_rule_says(
    family: str, length: int, block: int, gamma: float, min_budget: int, max_budget: int | None, seed: int
) -> None:
    """Both patterns, against loops; the softcap of a model holds for the estimate from means as for the probe."""
    model, ids = family_model(family, heads=6, kv_heads=2), prompt(1, length, seed)
    kinds = []
    for tau in (0.0, 0.1, 0.2, 0.3, 2.0):
        how = {"block": block, "gamma": gamma, "tau": tau, "min_budget": min_budget, "max_budget": max_budget}
        read = run(ids, model, **how)[-1]
        scale, cap = read["how"].scale, read["how"].softcap
        assert (cap is not None) == (family == "gemma2")
        k = read["store"].bands[0].keys().double()
        active = blocks(read, block)[0]
        for head in range(6):
            want, aware = plainly(read["q"][0, head].double(), k[head // 3], scale, cap, how)
            assert {(i, j) for i, j in active[head].nonzero().tolist()} == want
            kinds.append((tau, aware))
    assert {aware for tau, aware in kinds if tau == 0} == {False}
    assert {aware for tau, aware in kinds if tau == 2} == {True}
    assert {aware for tau, aware in kinds if 0 < tau < 2} == {False, True}


@pytest.mark.parametrize("length", [61, 64])
@pytest.mark.parametrize("tau", [0.0, 2.0])
def test_covering_everything_is_dense(length: int, tau: float) -> None:
    model, ids = llama(), prompt(2, length)
    want, _ = logits(model, ids)
    with watching() as seen:
        got, _ = applied(model, FlexPrefill(block=8, gamma=1.01, tau=tau, min_budget=8), ids)
    assert_close(got, want, TOLERANCE)
    assert all(r["parts"].lists is not None for r in seen)


@pytest.mark.parametrize("tau", [0.0, 0.3, 2.0])
def test_sink_column_and_diagonal_are_always_read(tau: float) -> None:
    for read in run(prompt(2, 93), tau=tau, gamma=0.3):
        active = blocks(read)
        assert active[..., 0].all()
        assert active.diagonal(dim1=-2, dim2=-1).all()
        assert not active.triu(1).any()


def test_it_really_is_sparse_and_rows_are_served_by_their_own_length() -> None:
    reads = run(prompt(1, 200), gamma=0.3)
    full = torch.ones(25, 25).tril().sum()
    assert all(blocks(r).sum((-1, -2)).float().mean() < 0.8 * full for r in reads)


def test_tau_decides_the_pattern() -> None:
    """tau = 0: no head is query-aware; tau >= sqrt(ln 2): every head is, and lines fall to their least."""
    p, q = torch.rand(50, 9).softmax(-1), torch.zeros(50, 9)
    q[:, 0] = 1.0
    assert (js_distance(p, q) <= math.sqrt(math.log(2)) + 1e-6).all()
    assert not js_distance(p, p).isnan().any()
    far = js_distance(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]))
    assert far == pytest.approx(math.sqrt(math.log(2)))
    lines, aware = (run(prompt(1, 93), llama(layers=1), tau=tau, gamma=0.5)[0] for tau in (0.0, 2.0))
    # A vertical-slash head is a union of whole columns and diagonals; a query-aware one generally is not.
    active = blocks(lines)[0]
    for head in active:
        last = head[-1]
        rebuilt = torch.zeros_like(head)
        for i in range(head.shape[0]):
            for j in range(i + 1):
                rebuilt[i, j] = head[i, j] and (head[j:, j].all() or head.diagonal(-(i - j)).all())
        assert torch.equal(rebuilt, head)
        assert last[0]
    assert not torch.equal(active, blocks(aware)[0])


def test_lines_cover_gamma_of_the_probe() -> None:
    q, k = torch.randn(4, 93, 16), torch.randn(4, 93, 16)
    vertical, slash = probe_lines(last_rows(q, k, 8, 0.5))
    assert_close(vertical.sum(-1), torch.ones(4), 1e-6)
    assert_close(slash.sum(-1), torch.ones(4), 1e-6)
    for mass in (vertical, slash):
        n = coverage_count(mass, 0.7)
        best = mass.sort(-1, descending=True).values
        for head in range(4):
            # Another sum than the running one, which rounds otherwise.
            assert best[head, : n[head]].double().sum() > 0.7 - 1e-6
            assert best[head, : n[head] - 1].double().sum() < 0.7 + 1e-6


def test_slash_equals_a_loop_over_diagonals() -> None:
    q, k = torch.randn(3, 21, 8), torch.randn(3, 21, 8)
    rows = last_rows(q, k, 5, 0.4)
    _, slash = probe_lines(rows)
    for head in range(3):
        for distance in range(21):
            want = sum(float(rows[head, i, 4 + 16 + i - distance]) for i in range(5) if 16 + i - distance >= 0) / 5
            assert float(slash[head, distance]) == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize("k_heads", [1, 2, 6])
def test_probed_rows_are_those_of_attention(k_heads: int) -> None:
    q, k = torch.randn(6, 21, 8), torch.randn(k_heads, 21, 8)
    scores = 0.4 * q[:, -5:] @ k.repeat_interleave(6 // k_heads, dim=0).transpose(1, 2)
    seen = torch.arange(21) <= torch.arange(16, 21)[:, None]
    rows = last_rows(q, k, 5, 0.4)
    assert not rows[..., :4].any() and rows.shape == (6, 5, 25)
    assert_close(rows[..., 4:], scores.masked_fill(~seen, -torch.inf).softmax(-1), 1e-6)
    assert_close(probe_lines(rows)[0], rows[..., 4:].mean(1), 1e-6)


@pytest.mark.parametrize("n", [5, 8, 16, 19])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_partial_last_block_is_a_true_mean(n: int, dtype: torch.dtype) -> None:
    x = torch.randn(2, n, 4).to(dtype)
    means = block_mean(x, 8)
    assert means.dtype == torch.float32 and means.shape == (2, -(-n // 8), 4)
    for i, some in enumerate(x.double().split(8, dim=1)):
        assert_close(means[:, i], some.mean(1), 1e-6)


def test_block_count_does_not_depend_on_the_order_of_heads() -> None:
    ids = prompt(1, 93)
    model = llama(layers=1, heads=4, kv_heads=4)
    plain = blocks(run(ids, model)[0]).sum((-1, -2)).flatten()
    attention = model.model.layers[0].self_attn
    order = torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        for name in ("q_proj", "k_proj", "v_proj"):
            weight = getattr(attention, name).weight
            weight.copy_(weight.view(4, -1, weight.shape[-1])[order].reshape_as(weight))
    assert torch.equal(blocks(run(ids, model)[0]).sum((-1, -2)).flatten(), plain[order])


def test_short_prompts_are_dense() -> None:
    assert all(r["parts"].dense for r in run(prompt(1, 31), min_budget=32))


def test_a_threshold_near_one_lists_no_block_of_the_future() -> None:
    """Pairs of blocks in the future have a mass of 0, which a nearly full sum still has room for."""
    for gamma in (0.9999, 1.0, 1.01):
        for read in run(prompt(1, 93), tau=2.0, gamma=gamma):
            assert not blocks(read).triu(1).any()


def test_defaults_are_the_papers() -> None:
    method = FlexPrefill()
    assert (method.block, method.gamma, method.tau, method.min_budget, method.max_budget) == (128, 0.9, 0.1, 1024, None)


@pytest.mark.parametrize("bad", [{"block": 0}, {"gamma": 0.0}, {"max_budget": 8}, {"budget": 0.5}])
def test_bad_parameters(bad: dict) -> None:
    with pytest.raises(foveate.BadArgument, match=next(iter(bad))):
        FlexPrefill(**bad)
