"""RetrievalAttention: must-hold tests of its card."""

from __future__ import annotations

import sys
from bisect import bisect_right
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tests.closeness import assert_close
from tests.contract.runs import left_padded, tokens
from tests.methods.runs import TOLERANCE, applied, llama, logits, prompt, stores, watching

import foveate
from foveate.attention import Partial, Selection
from foveate.cache import PlacedColumn
from foveate.methods import RetrievalAttention
from foveate.methods.policies.clusters import key_clusters, zones
from foveate.methods.policies.neighbours import inverted_lists, key_graph, probe, scan, walk
from foveate.methods.policies.query_graphs import query_graph
from foveate.models import tiny

SMALL = {"sink": 2, "recent": 6, "k": 8, "knn": 8, "degree": 8, "beam": 12, "queries": 64}
LEARNT = ["graph", "flat", "ivf", "hnsw", "wave"]


def shifted(count: int, queries: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys [count, 32] in clusters, and queries [queries, 32] about the same topics that lie elsewhere."""
    g = torch.Generator().manual_seed(seed)
    topics = 1.5 * torch.randn(20, 32, generator=g)
    keys = torch.randn(count, 32, generator=g) + topics[torch.randint(0, 20, (count,), generator=g)]
    turn, offset = torch.randn(32, 32, generator=g) / 32**0.5, 2 * torch.randn(32, generator=g)
    about = topics[torch.randint(0, 20, (queries,), generator=g)]
    return keys, torch.randn(queries, 32, generator=g) + 2 * about @ turn + offset


def one(x: torch.Tensor) -> torch.Tensor:
    """As the only row and head."""
    return x[None, None]


def recall(found: torch.Tensor, exact: torch.Tensor) -> float:
    hits = [len(set(f.tolist()) & set(e.tolist())) for f, e in zip(found, exact, strict=True)]
    return sum(hits) / exact.numel()


# -- search ------------------------------------------------------------------------------------------------------------


def test_defaults_are_the_papers() -> None:
    method = RetrievalAttention()
    assert (method.sink, method.recent, method.k, method.index) == (128, 512, 100, "graph")
    assert (method.segment, method.cluster, method.estimated) == (8192, 16, 0.232)


def test_the_scan_is_exact() -> None:
    g = torch.Generator().manual_seed(0)
    q, keys = torch.randn(2, 6, 3, 8, generator=g), torch.randn(2, 2, 30, 8, generator=g)
    counts = torch.tensor([[30, 11], [4, 30]])
    found = scan(q, keys, counts, 5)
    for b in range(2):
        for h in range(6):
            real = int(counts[b, h // 3])
            for n in range(3):
                want = (keys[b, h // 3, :real] @ q[b, h, n]).argsort(descending=True)[:5].tolist()
                assert sorted(x for x in found.keys[b, h, n].tolist() if x >= 0) == sorted(want)
                assert found.scanned[b, h, n] == real


def test_a_wide_beam_finds_everything() -> None:
    """The ring makes every key reachable, so a beam over all keys is the exact scan, in both graphs."""
    keys, queries = shifted(200, 40)
    exact = scan(one(queries), one(keys), torch.tensor([[200]]), 20).keys[0, 0]
    for table in (query_graph(keys, queries[:4], 3, 4), key_graph(keys, 4)):
        found = walk(one(queries), one(keys), one(table["edges"]), one(table["entries"]), 20, 200)
        assert recall(found.keys[0, 0], exact) == 1
        assert (found.scanned == 200).all()


@pytest.mark.parametrize("seed", range(4))
def test_queries_make_the_better_index_when_they_lie_elsewhere(seed: int) -> None:
    """Recall against the share of keys looked at: the graph by queries beats the graph by keys, which may look at more,
    and the lists by keys."""
    keys, queries = shifted(3000, 1032, seed)
    seen, test = queries[:1000], queries[1000:]
    exact = scan(one(test), one(keys), torch.tensor([[3000]]), 50).keys[0, 0]

    def by(table: dict, beam: int) -> tuple[float, float]:
        found = walk(one(test), one(keys), one(table["edges"]), one(table["entries"]), 50, beam)
        return recall(found.keys[0, 0], exact), float(found.scanned.float().mean()) / 3000

    def lists(probes: int) -> tuple[float, float]:
        found = probe(one(test), one(keys), one(table["centroids"]), one(table["members"]), 50, probes)
        return recall(found.keys[0, 0], exact), float(found.scanned.float().mean()) / 3000

    queried, keyed = query_graph(keys, seen, 32, 32), key_graph(keys, 32)
    table = inverted_lists(keys, 55, 0)
    at, share = by(queried, 100)
    assert at > 0.95
    assert share < 0.4
    other, more = by(keyed, 200)
    assert more > share and at > other + 0.04
    most = bisect_right(range(1, 56), share, key=lambda probes: lists(probes)[1])
    assert lists(most)[1] <= share < lists(most + 1)[1]
    assert at > lists(most)[0]
    wider, more = by(queried, 200)
    assert wider > at and more > share


def test_neighbours_are_many_enough_and_real() -> None:
    keys, queries = shifted(300, 100)
    table = query_graph(keys, queries, 8, 12)
    assert table["edges"].shape == (300, 13)
    for number, row in enumerate(table["edges"][:, :-1].tolist()):
        there = [x for x in row if x >= 0]
        assert len(set(there)) == len(there) and number not in there and max(there, default=0) < 300
        assert row == there + [-1] * (12 - len(there))
    pivots = (queries @ keys.T).argmax(1)
    assert table["entries"][0] == torch.bincount(pivots).argmax()
    assert torch.equal(query_graph(keys, queries, 8, 12)["edges"], table["edges"])
    assert torch.equal(key_graph(keys, 12)["edges"], key_graph(keys, 12)["edges"])


def test_lists_hold_every_key_once() -> None:
    keys, _ = shifted(300, 1)
    table = inverted_lists(keys, 17, 3)
    listed = table["members"][table["members"] >= 0]
    assert sorted(listed.tolist()) == list(range(300))
    nearest = torch.cdist(keys, table["centroids"]).argmin(1)
    for cluster, members in enumerate(table["members"].tolist()):
        assert all(nearest[x] == cluster for x in members if x >= 0)
    assert torch.equal(inverted_lists(keys, 17, 3)["members"], table["members"])


# -- clusters ----------------------------------------------------------------------------------------------------------


def slow_zones(q, keys, values, table, tokens, share):
    """One query: keys read, and (out, lse) of what is estimated."""
    members = {c: [i for i, x in enumerate(table["labels"].tolist()) if x == c] for c in range(len(table["sizes"]))}
    order = sorted((c for c in members if members[c]), key=lambda c: -float(q @ keys[members[c]].mean(0)))
    read, weights, means, done = [], [], [], 0
    for cluster in order:
        done += len(members[cluster])
        if done <= tokens:
            read += members[cluster]
        elif done <= tokens + share * len(keys):
            logit = float(q @ keys[members[cluster]].mean(0)) / len(q) ** 0.5
            weights.append(len(members[cluster]) * np.exp(logit))
            means.append(values[members[cluster]].mean(0).numpy())
    total = sum(weights)
    return sorted(read), sum(w * m for w, m in zip(weights, means, strict=True)) / total, np.log(total)


def test_wave_against_its_formula() -> None:
    g = torch.Generator().manual_seed(1)
    keys, values = torch.randn(90, 8, generator=g), torch.randn(90, 5, generator=g)
    q = torch.randn(1, 4, 1, 8, generator=g)
    table = key_clusters(keys, values, segment=40, size=6)
    assert len(table["sizes"]) == 7 + 7 + 2  # of 40, 40 and 10 keys
    assert set(table["labels"][:40].tolist()) <= set(range(7)), "a cluster lies in one segment"
    ctx = SimpleNamespace(scale=8**-0.5, softcap=None)
    got = zones(q, {name: one(x) for name, x in table.items()}, 20, 0.4, ctx)
    for h in range(4):
        read, out, lse = slow_zones(q[0, h, 0], keys, values, table, 20, 0.4)
        assert got.keys[0, h, 0].nonzero().squeeze(-1).tolist() == read
        np.testing.assert_allclose(got.estimate.out[0, h, 0], out, atol=1e-5)
        assert float(got.estimate.lse[0, h, 0]) == pytest.approx(lse, abs=1e-5)


def test_an_estimate_of_single_keys_is_exact() -> None:
    """Clusters of one key each, all of them estimated: dense attention."""
    model, ids, steps = llama(layers=2), prompt(2, 61), prompt(2, 4, seed=1)
    want, _ = logits(model, ids, steps)
    for estimated, close in ((1.0, True), (0.3, False)):
        method = RetrievalAttention(sink=2, recent=6, k=8, index="wave", cluster=1, estimated=estimated)
        got, _ = applied(model, method, ids, steps)
        assert (float((got - want).norm() / want.norm()) < TOLERANCE) == close


# -- the method --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", LEARNT)
@pytest.mark.parametrize("family", ["llama", "deepseek-v3"])
def test_all_keys_looked_up_is_dense(family: str, index: str) -> None:
    model = tiny(family, heads=6, kv_heads=2)
    ids, steps = prompt(2, 41), prompt(2, 5, seed=1)
    want, _ = logits(model, ids, steps)
    for settings in ({"k": 33}, {"budget": 1.0}):
        got, cache = applied(model, RetrievalAttention(**{**SMALL, "index": index, **settings}), ids, steps)
        assert_close(got, want, TOLERANCE)
        assert cache.host_nbytes > 0


@pytest.mark.parametrize("index", LEARNT)
def test_rows_of_different_length_search_alone(index: str) -> None:
    """Rows with fewer keys than are looked up, with none on the host, and with many, in one batch."""
    model = llama(layers=2)
    method = RetrievalAttention(**{**SMALL, "index": index})
    rows, then = [tokens(i, n) for i, n in enumerate((5, 14, 33, 61))], tokens(9, 4, 3)
    ids, mask = left_padded(rows)
    from tests.contract.runs import run

    with foveate.apply(model, method) as handle:
        together = run(model, handle.cache(), ids, then, mask)
        for b, row in enumerate(rows):
            cache = handle.cache()
            handle.binding.plan_cache(cache, 61)
            alone = run(model, cache, row[None], then[b : b + 1])
            assert_close(together.steps[b : b + 1], alone.steps, TOLERANCE)


def test_what_lies_where() -> None:
    """First and newest of the prompt on the device, and what is generated; the rest and the index on the host."""
    model, ids = llama(layers=2), prompt(2, 61)
    _, dense = applied(model, "dense", ids)
    _, cache = applied(model, RetrievalAttention(**SMALL), ids, prompt(2, 5, seed=1))
    for layer, whole in zip(cache.couriers(), stores(dense), strict=True):
        (band,) = layer.store.bands
        assert isinstance(band.k, PlacedColumn)
        assert band.away.tolist() == [53] * 4
        assert (band.lengths - band.away).tolist() == [8 + 5] * 4
        assert band.k.far.data.device == torch.device("cpu")
        assert torch.equal(band.k.far.data[:, :53], whole.bands[0].keys()[:, 2:55])
        assert layer.prepared["retrieval-attention"]["edges"].shape == (2, 2, 53, 9)
        assert layer.samples is None
    assert cache.nbytes < 0.6 * dense.nbytes
    far = 2 * 2 * 2 * 2 * 53 * 16 * 4  # layers, sides, rows, kv heads, tokens, head size, bytes
    assert cache.host_nbytes == far + 2 * 2 * 2 * (53 * 9 + 8) * 4


def test_each_query_head_reads_its_best_keys() -> None:
    """The scan lists, per query head, the largest q·k of the stored keys on the host, beside all on the device."""
    model, ids = llama(layers=2), prompt(1, 61)
    with watching() as seen:
        applied(model, RetrievalAttention(**{**SMALL, "index": "flat"}), ids, prompt(1, 2, seed=1))
    read = seen[-1]
    here, there = read["parts"]
    assert here.lists.tolist() == [[[[0, 1, *range(55, 63)]]] * 2]
    keys = read["store"].bands[0].keys()
    logit = torch.einsum("hd,hmd->hm", read["q"][0, :, 0], keys.repeat_interleave(3, 0))[:, 2:55]
    want = (logit.topk(8).indices + 2).sort(-1).values
    assert torch.equal(there.lists[0, :, 0].long(), want)
    assert len({tuple(x) for x in there.lists[0, :3, 0].tolist()}) > 1, "heads of a group look for themselves"


def test_two_parts_are_one_softmax() -> None:
    model, ids = llama(layers=2), prompt(1, 61)
    with watching() as seen:
        applied(model, RetrievalAttention(**SMALL), ids, prompt(1, 1, seed=1))
    read = seen[-1]
    band, q = read["store"].bands[0], read["q"][0, :, 0].double()
    keys, values = (x.double().repeat_interleave(3, 0) for x in (band.keys(), band.values()))
    for h in range(6):
        listed = torch.cat([read["parts"][0].lists[0, h // 3, 0], read["parts"][1].lists[0, h, 0]]).long()
        listed = listed[listed >= 0]
        p = (keys[h, listed] @ q[h] / 4).softmax(0)
        torch.testing.assert_close(read["result"].out[0, h, 0].double(), p @ values[h, listed], atol=1e-6, rtol=1e-6)


def test_how_much_was_scanned_is_said() -> None:
    model, ids = llama(layers=2), prompt(2, 161)
    for index, exact in (("graph", False), ("flat", True)):
        _, cache = applied(model, RetrievalAttention(**{**SMALL, "index": index}), ids, prompt(2, 1, seed=1))
        for layer in cache.couriers():
            share = layer.mine["retrieval-attention"]["scanned"]
            assert share.shape == (2, 6)
            assert ((share == 1) if exact else (share > 0) & (share < 1)).all()


def test_the_prompts_queries_make_the_graph() -> None:
    """The samples are the prompt's own queries, the same for every way to cut the prompt, and gone afterwards."""
    model, ids = llama(layers=1), prompt(2, 61)
    tables = []
    for chunk in (None, 7):
        for queries in (16, 100):
            method = RetrievalAttention(**{**SMALL, "queries": queries})
            _, cache = applied(model, method, ids, chunks=chunk)
            tables.append(next(cache.couriers()).prepared["retrieval-attention"]["edges"])
    assert torch.equal(tables[0], tables[2]) and torch.equal(tables[1], tables[3])
    assert not torch.equal(tables[0], tables[1])
    with watching() as seen:
        applied(model, RetrievalAttention(**{**SMALL, "queries": 100}), ids)
    keys = stores(cache)[0].bands[0].keys()[2, 2:55]  # row 1, kv head 0
    by_hand = query_graph(keys, seen[0]["q"][1, :3].flatten(0, 1), 8, 8)
    assert torch.equal(by_hand["edges"].sort(-1).values, tables[1][1, 0].sort(-1).values)


def test_without_an_index_the_scan_is_exact() -> None:
    """After a crop into the prompt; a crop of generated tokens leaves the index."""
    model, ids = llama(layers=2), prompt(2, 61)
    with foveate.apply(model, RetrievalAttention(**SMALL)) as handle, torch.no_grad():
        cache = handle.cache()
        cache.expect(61)
        model(ids, past_key_values=cache)
        model(prompt(2, 3, seed=1), past_key_values=cache)
        cache.crop(-3)
        assert all(layer.prepared for layer in cache.couriers())
        cache.crop(-20)
        assert not any(layer.prepared for layer in cache.couriers())
        exact = handle.bind(RetrievalAttention(**{**SMALL, "index": "flat"})).cache()
        exact.expect(61)
        model(ids, past_key_values=exact)
        exact.crop(-20)
        step = prompt(2, 1, seed=2)
        got, want = (model(step, past_key_values=c).logits for c in (cache, exact))
        assert_close(got, want, TOLERANCE)


def test_a_budget_shrinks_what_stays_before_what_is_looked_up() -> None:
    with foveate.apply(llama(layers=2), "dense") as handle:
        for budget, want in ((0.5, (128, 512, 3360)), (0.1, (80, 320, 400)), (1.0, (128, 512, 1 << 30))):
            roles = RetrievalAttention(budget=budget).plan(handle.binding.shape, None, 8000)
            assert {(r.place.sink, r.place.recent, r.extra["k"]) for r in roles} == {want}
        with pytest.raises(foveate.Infeasible) as error:
            handle.bind(RetrievalAttention(), budget=0.03).check(200)
        assert error.value.floor == pytest.approx(8 / 200)


def test_faiss_is_only_asked_for_where_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    model, ids = llama(layers=1), prompt(1, 61)
    for index in ("graph", "flat", "wave"):
        applied(model, RetrievalAttention(**{**SMALL, "index": index}), ids)
    for index in ("ivf", "hnsw"):
        with pytest.raises(foveate.FoveateError, match="retrieval-index"):
            applied(model, RetrievalAttention(**{**SMALL, "index": index}), ids)


@pytest.mark.parametrize("bad", [{"sink": -1}, {"recent": 0}, {"knn": 1}, {"estimated": 1.5}, {"index": "tree"}])
def test_bad_parameters(bad: dict) -> None:
    with pytest.raises(foveate.BadArgument, match=next(iter(bad))):
        RetrievalAttention(**bad)


def test_parts_are_disjoint() -> None:
    model, ids = llama(layers=2), prompt(2, 61)
    for index, kinds in (("graph", [Selection] * 2), ("wave", [Selection, Selection, Partial])):
        with watching() as seen:
            applied(model, RetrievalAttention(**{**SMALL, "index": index}), ids, prompt(2, 2, seed=1))
        parts = seen[-1]["parts"]
        assert [type(p) for p in parts] == kinds
        for b in range(2):
            for h in range(6):
                one, other = (set(x[x >= 0].tolist()) for x in (parts[0].lists[b, h // 3, 0], parts[1].lists[b, h, 0]))
                assert not one & other and len(other) <= 8
