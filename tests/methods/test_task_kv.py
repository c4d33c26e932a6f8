"""Task-KV: must-hold tests of its card."""

from __future__ import annotations

import pytest
import torch
from tests.closeness import assert_close
from tests.contract.runs import held as held_by_row
from tests.contract.runs import left_padded, run
from tests.methods.runs import TOLERANCE, applied, held, llama, logits, prompt, stores, watching

import foveate
from foveate.methods import TaskKV
from foveate.methods.policies.apart import distances, divided, full_heads, head_vectors
from foveate.models import ModelShape, tiny

SMALL = {"budget": 24, "sink": 2, "recent": 6, "window": 5, "kernel": 3, "top": 8}


def described(ids: torch.Tensor, method: TaskKV, **geometry: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Per layer the mean window attention [Hs, T] of each kv head, and its distance [Hs], by the plain formulas."""
    with watching() as seen:
        applied(llama(**geometry), "dense", ids)
    found = []
    for read in seen:
        band, q, t = read["store"].bands[0], read["q"][0], ids.shape[1]
        k, v = band.keys(), band.values()
        group = q.shape[0] // k.shape[0]
        logit = q @ k.repeat_interleave(group, 0).transpose(-1, -2) * read["how"].scale
        rows = logit.masked_fill(torch.ones(t, t).triu(1).bool(), -torch.inf).softmax(-1)[:, -method.window :]
        c = rows.mean(1).unflatten(0, (-1, group)).mean(1)
        vectors = []
        for head in range(k.shape[0]):
            best = c[head].argsort(descending=True)[: method.top]
            vectors.append(sum(c[head, i] * v[head, i] for i in best))
        centre = sum(vectors) / len(vectors)
        found.append((c, torch.stack([(x - centre).norm() for x in vectors])))
    return found


def far_heads(method: TaskKV, layers: int, heads: int) -> list[int]:
    roles = method.plan(ModelShape.of(llama(layers=layers, heads=heads, kv_heads=heads)), None, 4096)
    return [role.extra["far"] for role in roles]


def test_far_heads_go_down_on_a_line() -> None:
    assert far_heads(TaskKV(beta=0.25, far=0), 5, 16) == [4, 3, 2, 1, 0]
    assert far_heads(TaskKV(), 4, 8) == [2, 2, 1, 1]  # 2.4, 1.93, 1.47, 1
    assert far_heads(TaskKV(beta=0.25, far=4), 3, 8) == [2, 3, 4]
    assert far_heads(TaskKV(beta=1.0, far=99), 3, 4) == [4, 4, 4]
    assert far_heads(TaskKV(beta=0.5), 1, 4) == [2]


@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 8), (12, 6), (8, 1)])
def test_far_and_nearest_heads_hold_all(heads: int, kv_heads: int) -> None:
    """The others: sinks, recent tokens, and the middle that the smoothed window attention ranks highest."""
    ids, geometry = prompt(1, 61), {"heads": heads, "kv_heads": kv_heads, "layers": 3}
    method = TaskKV(**{**SMALL, "budget": 40, "beta": 0.34, "kernel": 3})
    _, cache = applied(llama(**geometry), method, ids)
    fars = [role.extra["far"] for role in method.plan(ModelShape.of(llama(**geometry)), None, 61)]
    for (c, distance), store, far in zip(described(ids, method, **geometry), stores(cache), fars, strict=True):
        whole = {*distance.argsort(descending=True)[:far].tolist(), int(distance.argmin())}
        kept = held(store)
        if kv_heads == 1:
            assert len(kept[0]) == 40
            continue
        assert {head for head in range(kv_heads) if len(kept[head]) == 61} == whole
        smooth = torch.nn.functional.pad(c, (1, 1)).unfold(-1, 3, 1).mean(-1)
        counts = [len(x) for x in kept]
        assert sum(counts) == kv_heads * 40
        for head in set(range(kv_heads)) - whole:
            middle = (2 + smooth[head, 2:55].topk(counts[head] - 8).indices).tolist()
            assert kept[head] == sorted([0, 1, *middle, *range(55, 61)])


def test_roles_follow_from_the_prompt() -> None:
    """Two prompts, or two rows of a batch, have other far heads; and each row has its own."""
    model, method = llama(heads=8, kv_heads=8), TaskKV(**{**SMALL, "budget": 32})
    found = []
    for seed in range(4):
        _, cache = applied(model, method, prompt(1, 61, seed=seed))
        found.append([[len(x) == 61 for x in held(store)] for store in stores(cache)])
    assert found[0] != found[1]
    _, cache = applied(model, method, torch.cat([prompt(1, 61, seed=seed) for seed in range(4)]))
    together = [[len(x) == 61 for x in held(store)] for store in stores(cache)]
    for row in range(4):
        assert [layer[row * 8 : row * 8 + 8] for layer in together] == found[row]


def test_a_constant_added_to_all_heads_changes_no_role() -> None:
    g = torch.Generator().manual_seed(0)
    vectors = torch.randn(2, 6, 16, generator=g, dtype=torch.float64)
    moved = vectors + torch.randn(2, 1, 16, generator=g, dtype=torch.float64)
    assert_close(distances(moved), distances(vectors), 1e-12)
    for row in range(2):
        assert full_heads(distances(moved)[row], 2) == full_heads(distances(vectors)[row], 2)


def test_equal_heads_are_taken_in_order() -> None:
    attention, v = torch.rand(1, 1, 20).expand(1, 4, 20), torch.randn(1, 1, 20, 8).expand(1, 4, 20, 8)
    distance = distances(head_vectors(attention, v, 5))
    assert (distance == 0).all()
    assert full_heads(distance[0], 2) == [0, 1]
    assert full_heads(distance[0], 0) == [0]
    for _ in range(20):  # two vectors are equally far from their mean, whatever rounding says
        both = distances(torch.randn(1, 2, 16) * 100)
        assert both[0, 0] == both[0, 1] > 0


def test_only_the_top_tokens_sum_a_head_up() -> None:
    attention = torch.tensor([[[0.1, 0.4, 0.2, 0.3]]])
    v = torch.tensor([[[[1.0], [10.0], [100.0], [1000.0]]]])
    assert head_vectors(attention, v, 2).item() == pytest.approx(0.4 * 10 + 0.3 * 1000)
    assert head_vectors(attention, v, 99).item() == pytest.approx(0.1 + 4 + 20 + 300)


def test_the_budget_is_met_and_more_is_never_less() -> None:
    """Exactly, wherever there are tokens enough; where the far heads alone exceed it, they are filled in order."""
    before = [0] * 5
    for average in range(10, 101):
        found = divided([100] * 5, average, 10, [3, 0])
        assert sum(found) == 5 * average
        assert all(a <= b for a, b in zip(before, found, strict=True))
        assert min(found) >= 10
        before = found
    assert divided([100] * 5, 20, 10, [3, 0]) == [10, 10, 10, 60, 10]
    assert divided([100] * 5, 40, 10, [3, 0]) == [70, 10, 10, 100, 10]
    assert divided([100] * 5, 60, 10, [3, 0]) == [100, 34, 33, 100, 33]
    assert divided([7] * 3, 90, 10, [0]) == [7, 7, 7]


def test_one_token_too_many_does_not_touch_the_far_heads() -> None:
    model, ids = llama(heads=4, kv_heads=4, layers=1), prompt(1, 61)
    method = TaskKV(**{**SMALL, "budget": 60})
    _, cache = applied(model, method, ids)
    counts = [len(x) for x in held(stores(cache)[0])]
    assert sum(counts) == 240
    assert sorted(counts)[-2:] == [61, 61]


def test_room_for_all_is_dense() -> None:
    model, ids, steps = llama(), prompt(2, 41), prompt(2, 7, seed=1)
    want, _ = logits(model, ids, steps)
    for budget in (41, 500, 1.0):
        got, _ = applied(model, TaskKV(**{**SMALL, "budget": budget}), ids, steps)
        assert_close(got, want, TOLERANCE)


def test_rows_divide_budgets_of_their_own_lengths() -> None:
    model, method = llama(heads=4, kv_heads=4), TaskKV(**{**SMALL, "budget": 0.5})
    rows = [prompt(1, n, seed=n)[0] for n in (3, 41, 101)]
    ids, mask = left_padded(rows)
    with foveate.apply(model, method) as handle:
        cache = handle.cache()
        run(model, cache, ids, prompt(3, 2, seed=1), mask)
    shape = ModelShape.of(model)
    for b, row in enumerate(rows):
        average = 3 if b == 0 else method.total(shape, len(row))
        assert [sum(len(x) - 2 for x in heads) for heads in held_by_row(cache, b)] == [4 * average] * 3


def test_decode_adds_to_every_head() -> None:
    model, method = llama(heads=4, kv_heads=4), TaskKV(**SMALL)
    _, before = applied(model, method, prompt(1, 61))
    _, after = applied(model, method, prompt(1, 61), prompt(1, 5, seed=2))
    for one, other in zip(stores(before), stores(after), strict=True):
        assert held(other) == [[*x, *range(61, 66)] for x in held(one)]


def test_latent_attention_is_refused() -> None:
    with pytest.raises(foveate.Refused, match="one latent vector for all heads"):
        foveate.apply(tiny("deepseek-v3"), TaskKV())


def test_below_the_floor_is_refused_with_it() -> None:
    with foveate.apply(llama(layers=2), "dense") as handle:
        with pytest.raises(foveate.Infeasible) as error:
            handle.bind(TaskKV(budget=0.1, sink=16, recent=48)).check(400)
        handle.bind(TaskKV(budget=error.value.floor, sink=16, recent=48)).check(400)


def test_defaults_are_the_papers() -> None:
    method = TaskKV()
    assert (method.beta, method.far, method.top) == (0.3, 1, 256)
    assert (method.sink, method.recent, method.window, method.kernel) == (16, 256, 32, 7)


@pytest.mark.parametrize(
    "bad",
    [
        {"beta": 1.5},
        {"far": -1},
        {"top": 0},
        {"sink": -1},
        {"recent": 0},
        {"window": 0},
        {"kernel": 4},
        {"budget": 0.0},
    ],
)
def test_bad_parameters(bad: dict) -> None:
    with pytest.raises(foveate.BadArgument, match=next(iter(bad))):
        TaskKV(**bad)
