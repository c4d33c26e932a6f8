"""Graphs over keys and the search in them, against slow forms of both; and what a search costs where keys are many."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from foveate.methods.policies import neighbours, orders, query_graphs
from foveate.methods.policies.neighbours import scan, walk, walk_abreast
from foveate.methods.policies.orders import Best, counted, ranked
from foveate.methods.policies.query_graphs import ENTRIES, query_graph


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# -- orders ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "count", "k"), [(20, 400, 32), (7, 30, 8), (5, 9, 9), (4, 33, 1), (6, 1200, 5)])
def test_best_columns_are_the_largest(rows: int, count: int, k: int) -> None:
    """With equals at the k-th, with rows of which less than k are numbers at all, and with memory of earlier calls."""
    best = Best()
    best.columns(random(50, 500), 20)
    score = random(rows, count, seed=1)
    score[0] = (2 * score[0]).round()
    score[1] = 0
    score[2, k // 2 :] = -torch.inf
    found = best.columns(score, k)
    want = score.topk(k, dim=1).values
    assert torch.equal(score.gather(1, found).sort(dim=1, descending=True).values, want)
    assert all(len(set(row)) == k for row in found.tolist())


def test_links_are_ranked_by_weight_and_number() -> None:
    links = [(0, 4, 2), (0, 1, 2), (0, 3, 0), (2, 0, 7), (2, 4, 7), (0, 2, 5), (4, 4, 1)]
    source, target, weight = torch.tensor(links).T
    want = [[3, 1, 4], [-1, -1, -1], [0, 4, -1], [-1, -1, -1], [4, -1, -1]]
    assert ranked(source, target, weight, (5, 5, 7), 3).tolist() == want
    assert [x.tolist() for x in counted(torch.tensor([4, 1, 4, 4, 0]))] == [[0, 1, 4], [1, 1, 3]]


# -- graphs ------------------------------------------------------------------------------------------------------------


def slow_graph(keys: Tensor, queries: Tensor, knn: int, degree: int) -> tuple[list[list[int]], list[int]]:
    """The neighbours of each key without the ring, and the entries, one link after the other."""
    keys, queries, count = keys.double(), queries.double(), len(keys)
    shared: list[dict[int, int]] = [{} for _ in range(count)]
    best_of = [0] * count
    for q in queries:
        pivot, *others = (keys @ q).argsort(descending=True)[:knn].tolist()
        best_of[pivot] += 1
        for other in others:
            for a, b in ((pivot, other), (other, pivot)):
                shared[a][b] = shared[a].get(b, 0) + 1
    apart = torch.cdist(keys, keys, compute_mode="donot_use_mm_for_euclid_dist").tolist()
    nearest = [[b for b in sorted(range(count), key=apart[a].__getitem__) if b != a][:degree] for a in range(count)]
    edges = []
    for a in range(count):
        kept: list[int] = []
        for b in sorted(shared[a], key=lambda b: (-shared[a][b], b))[: 2 * degree]:
            if len(kept) < degree - degree // 4 and all(apart[c][b] >= apart[a][b] for c in kept):
                kept.append(b)
        rank = {b: i for i, b in enumerate(nearest[a])}
        for b in range(count):
            if a in nearest[b]:
                rank[b] = min(rank.get(b, degree), nearest[b].index(a))
        near = sorted(rank, key=lambda b: (rank[b], b))[:degree]
        edges.append([*kept, *(b for b in near if b not in kept)][:degree])
    return edges, sorted(range(count), key=lambda a: -best_of[a])[:ENTRIES]


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_a_graph_is_what_it_is_said_to_be(offset: float, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where keys have much in common, next to which they differ little."""
    if not compiled:
        monkeypatch.setattr(query_graphs, "native", lambda noun: None)
    keys, queries = random(70, 8) + offset * random(8, seed=2), random(50, 8, seed=1)
    table = query_graph(keys, queries, 6, 8)
    edges, entries = slow_graph(keys, queries, 6, 8)
    for number, (got, want) in enumerate(zip(table["edges"].tolist(), edges, strict=True)):
        assert got == want + [-1] * (8 - len(want)) + [(number + 1) % 70]
    assert table["entries"].tolist() == entries


@pytest.mark.parametrize("held", [True, False])
@pytest.mark.parametrize("device", [True, False])
def test_graphs_made_together_are_the_same(device: bool, held: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a device: several sets at once, of different sizes, in parts; and products that are too many to hold."""
    keys = [random(count, 8, seed=count) for count in (60, 9, 41, 3)]
    queries = [random(count, 8, seed=90 + count) for count in (50, 70, 1, 20)]
    alone = [query_graph(k, q, 6, 8) for k, q in zip(keys, queries, strict=True)]
    if device:
        monkeypatch.setattr(orders, "on_processor", lambda x: False)
        monkeypatch.setattr(query_graphs, "on_processor", lambda x: False)
        assert [len(bunch) for bunch in query_graphs._bunches(keys)] == [4]
    monkeypatch.setattr(query_graphs, "_bunches", lambda keys: [range(3), range(3, 4)])
    monkeypatch.setattr(query_graphs, "IN_CACHE", 1 << 12)
    monkeypatch.setattr(query_graphs, "TOGETHER", 1 << 14 if held else 1 << 11)
    for one, other in zip(query_graphs.query_graphs(keys, queries, 6, 8), alone, strict=True):
        assert torch.equal(one["edges"], other["edges"]) and torch.equal(one["entries"], other["entries"])


# -- search ------------------------------------------------------------------------------------------------------------


def slow_walk(q: Tensor, keys: Tensor, edges: Tensor, entries: Tensor, k: int, beam: int) -> tuple[set[int], int]:
    """One query: its best keys, and how many it was compared to."""
    score, beam = (keys @ q).tolist(), min(max(beam, k), len(keys))
    known, looked = {x for x in entries.tolist() if x >= 0}, set()
    while True:
        view = sorted(known, key=lambda x: -score[x])[:beam]
        turn = [x for x in view if x not in looked][: neighbours.STEPS]
        if not turn:
            return set(view[:k]), len(known)
        looked |= set(turn)
        known |= {x for node in turn for x in edges[node].tolist() if x >= 0}


@pytest.mark.parametrize("whole", [0, 1000, None])
@pytest.mark.parametrize("beam", [1, 6, 25, 60, 500])
def test_the_walk_is_best_first(beam: int, whole: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled, or in either way to compare; for rows with fewer keys and without a graph, several queries, heads in
    groups."""
    if whole is not None:
        monkeypatch.setattr(neighbours, "native", lambda noun: None)
        monkeypatch.setattr(neighbours, "WHOLE", whole)
    q, keys, counts = random(2, 4, 3, 8, seed=5), random(2, 2, 300, 8), [[300, 120], [0, 300]]
    edges, entries = torch.full((2, 2, 300, 7), -1, dtype=torch.int32), torch.full((2, 2, 8), -1, dtype=torch.int32)
    for b in range(2):
        for h in range(2):
            if count := counts[b][h]:
                table = query_graph(keys[b, h, :count], random(90, 8, seed=7), 8, 6)
                edges[b, h, :count], entries[b, h] = table["edges"], table["entries"]
    found = walk(q, keys, edges, entries, 5, beam)
    for b in range(2):
        for head in range(4):
            for n in range(3):
                h = head // 2
                want, scanned = slow_walk(q[b, head, n], keys[b, h], edges[b, h], entries[b, h], 5, beam)
                assert {x for x in found.keys[b, head, n].tolist() if x >= 0} == want
                assert found.scanned[b, head, n] == scanned


def test_keys_that_are_many_are_not_all_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a query is compared to grows far more slowly than the keys. From some number of keys on nothing else is
    multiplied, below it all keys are, which takes less time; what is found and said to be scanned is the same."""
    compared, whole, scanned = [], [], []
    comparison, product = neighbours._comparison, torch.mm

    def counting(*args: object) -> Callable:
        compare = comparison(*args)  # type: ignore[arg-type]
        return lambda owner, number: compared.append(len(owner)) or compare(owner, number)

    monkeypatch.setattr(neighbours, "_comparison", counting)
    monkeypatch.setattr(torch, "mm", lambda a, b, **kwargs: whole.append(b.shape[1]) or product(a, b, **kwargs))
    monkeypatch.setattr(neighbours, "WHOLE", 7999 / (20 * 24))
    monkeypatch.setattr(query_graphs, "native", lambda noun: None)  # its products are not to be counted
    queries = random(600, 8, seed=1)
    for count in (500, 2000, 8000):
        keys = random(count, 8)
        table = query_graph(keys, queries[20:], 16, 12)
        asked, stored = queries[None, None, :20], keys[None, None]
        found = walk_abreast(asked, stored, table["edges"][None, None], table["entries"][None, None], 5, 24)
        exact = scan(asked, stored, torch.tensor([[count]]), 5)
        pairs = zip(found.keys[0, 0].tolist(), exact.keys[0, 0].tolist(), strict=True)
        assert sum(len(set(a) & set(b)) for a, b in pairs) > 0.9 * 20 * 5
        assert sum(compared) == found.scanned.sum()
        scanned.append(sum(compared) / 20)
        compared.clear()
    assert whole == [500, 2000]
    assert scanned[1] < 2 * scanned[0] and scanned[2] < 2 * scanned[1], "4 times the keys each"
    assert scanned[2] < 0.05 * 8000


def test_the_papers_stores_are_searched_by_what_is_found() -> None:
    """128K keys, groups of 4 heads, a beam of 200."""
    assert neighbours.WHOLE * 4 * 200 < 128 * 1024
