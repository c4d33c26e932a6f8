"""Nearest keys by inner product: graphs over keys, searched best first, and inverted lists.

A table describes the keys of one (row, kv head); tables of several are padded and stacked, so that they follow beams
and forks like any tensor.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.errors import FoveateError

ENTRIES = 8
"""Keys at which a search in a graph begins."""
STEPS = 4
"""Keys whose neighbours are looked at in one round of a search."""
ROWS = 2048
"""Keys whose neighbours are chosen at once."""


class Found(NamedTuple):
    """The best keys of each query.

    Args:
        keys: int64 [B, H, N, k] key numbers, -1 where there are fewer, in no order.
        scanned: keys to which each query was compared, int64 [B, H, N].
    """

    keys: Tensor
    scanned: Tensor


# -- graphs ------------------------------------------------------------------------------------------------------------


def query_graph(keys: Tensor, queries: Tensor, knn: int, degree: int) -> dict[str, Tensor]:
    """A graph over keys [A, D] that follows queries [n, D]: keys near the same query are neighbours, however far apart
    they lie themselves.

    Of each query's `knn` best keys the best is linked with all others. Every key keeps the neighbours it shares most
    queries with, none of which is nearer to a kept one than to the key itself; what is left of its `degree` goes to the
    nearest keys. A ring over all keys makes each reachable.

    Returns:
        edges: int32 [A, degree + 1], -1 behind the end; entries: int32 [ENTRIES], the best keys of most queries.

    Source: RetrievalAttention (2409.10516) section 3.2, after RoarGraph.
    """
    return query_graphs([keys], [queries], knn, degree)[0]


def query_graphs(keys: Sequence[Tensor], queries: Sequence[Tensor], knn: int, degree: int) -> list[dict[str, Tensor]]:
    """`query_graph` of several sets of keys, each with queries of its own, made together: as one graph in several
    parts, so that a device is not asked for the same few numbers over and over."""
    starts = [0, *accumulate(len(each) for each in keys)]
    total, every = starts[-1], torch.cat(list(keys)).float()
    bests, pairs, near, sources, ranks = [], [], [], [], []
    for some, asked, start in zip(keys, queries, starts, strict=False):
        some, count = some.float(), len(some)
        best = torch.cat([(q.float() @ some.T).topk(min(knn, count), dim=1).indices for q in asked.split(ROWS)])
        bests.append(best[:, 0])
        best = best + start
        pairs.append(torch.stack([best[:, :1].expand(-1, best.shape[1] - 1).flatten(), best[:, 1:].flatten()]))
        here = torch.arange(count, device=some.device)
        found = torch.cat([_nearest(some, part, min(degree, count - 1)) for part in here.split(ROWS)])
        near.append((found + start).flatten())
        sources.append((here + start)[:, None].expand_as(found).flatten())
        ranks.append(torch.arange(found.shape[1], device=some.device).expand_as(found).flatten())
    pivot, other = torch.cat(pairs, dim=1)
    links, shared = torch.unique(torch.cat([pivot * total + other, other * total + pivot]), return_counts=True)
    projected = _spread_out(every, _ranked(links, shared, total, 2 * degree), degree - degree // 4)
    # Links to near keys both ways: who is near to nobody's query can be reached by those that are near to it.
    source, target, rank = torch.cat(sources), torch.cat(near), torch.cat(ranks)
    links, order = torch.unique(torch.cat([source * total + target, target * total + source]), return_inverse=True)
    weight = torch.full_like(links, degree + 1).scatter_reduce(0, order, rank.repeat(2), "amin")
    edges = torch.cat([projected, _ranked(links, -weight, total, degree)], dim=1)
    edges = _first_unique(edges)[:, :degree]
    edges = F.pad(edges, (0, degree - edges.shape[1]), value=-1)
    graphs = []
    for some, best, start in zip(keys, bests, starts, strict=False):
        count, own = len(some), edges[start : start + len(some)]
        own = torch.where(own < 0, -1, own - start)
        ring = (torch.arange(count, device=own.device) + 1) % count
        popular = torch.bincount(best, minlength=count).argsort(descending=True, stable=True)
        graphs.append(
            {
                "edges": torch.cat([own, ring[:, None]], dim=1).to(torch.int32),
                "entries": _fit(popular[:ENTRIES], ENTRIES).to(torch.int32),
            }
        )
    return graphs


def key_graph(keys: Tensor, degree: int) -> dict[str, Tensor]:
    """The ground level of faiss's HNSW graph over keys [A, D] by inner product, in the form of `query_graph`."""
    faiss = _faiss()
    data = keys.float().cpu().contiguous().numpy()
    index = faiss.IndexHNSWFlat(data.shape[1], max(2, degree // 2), faiss.METRIC_INNER_PRODUCT)
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)  # keys that are added side by side give another graph each time
    try:
        index.add(data)
    finally:
        faiss.omp_set_num_threads(threads)
    start = faiss.vector_to_array(index.hnsw.offsets)[: len(data)].astype("int64")
    width = index.hnsw.nb_neighbors(0)
    flat = torch.from_numpy(faiss.vector_to_array(index.hnsw.neighbors).astype("int64"))
    edges = flat[torch.from_numpy(start)[:, None] + torch.arange(width)]
    ring = ((torch.arange(len(data)) + 1) % len(data))[:, None]
    first = torch.tensor([index.hnsw.entry_point])
    return {
        "edges": torch.cat([edges, ring], dim=1).to(torch.int32).to(keys.device),
        "entries": _fit(first, ENTRIES).to(torch.int32).to(keys.device),
    }


def walk(q: Tensor, keys: Tensor, edges: Tensor, entries: Tensor, k: int, beam: int) -> Found:
    """Best-first search: look at the neighbours of the best keys known, until the `beam` best have all been looked at.

    Args:
        q: [B, H, N, D]; keys: [B, Hs, A, D]; edges: [B, Hs, A, R]; entries: [B, Hs, E].
    """
    batch, heads, queries, dim = q.shape
    stores, count = keys.shape[1:3]
    beam = min(max(beam, k), count)
    pair = torch.arange(batch * stores, device=q.device).repeat_interleave(heads // stores * queries)
    rows = q.reshape(-1, 1, dim).float()
    flat_keys, flat_edges = keys.reshape(-1, dim), edges.reshape(batch * stores * count, -1)
    visited = torch.zeros(len(rows), count + 1, dtype=torch.bool, device=q.device)
    known = rows.new_full((len(rows), beam), -torch.inf)
    at = torch.full(known.shape, -1, dtype=torch.long, device=q.device)
    done = torch.ones(known.shape, dtype=torch.bool, device=q.device)
    fresh = entries.flatten(0, 1)[pair].long()
    while True:
        fresh = _once(fresh)
        fresh = torch.where(visited.gather(1, fresh.masked_fill(fresh < 0, count)), -1, fresh)
        new = fresh >= 0
        visited.scatter_(1, fresh.masked_fill(~new, count), True)
        visited[:, count] = False
        vectors = flat_keys[(pair[:, None] * count + fresh).masked_fill(~new, 0)].float()
        scores = (rows @ vectors.transpose(1, 2)).squeeze(1).masked_fill(~new, -torch.inf)
        known, order = torch.cat([known, scores], dim=1).topk(beam, dim=1)
        at = torch.cat([at, fresh], dim=1).gather(1, order)
        done = torch.cat([done, ~new], dim=1).gather(1, order)
        if bool(done.all()):
            break
        rank = torch.where(done, -torch.inf, known)
        score, place = rank.topk(min(STEPS, beam), dim=1)
        live = score > -torch.inf
        done = done.scatter(1, place, True)
        node = (pair[:, None] * count + at.gather(1, place)).masked_fill(~live, 0)
        fresh = flat_edges[node].long().masked_fill(~live.unsqueeze(-1), -1).flatten(1)
    shape = (batch, heads, queries)
    return Found(at[:, :k].view(*shape, -1), visited[:, :count].sum(1).view(shape))


def _ranked(links: Tensor, weight: Tensor, count: int, width: int) -> Tensor:
    """Links source * count + target as a table [count, width] of targets, heaviest first, -1 behind the end."""
    order = weight.argsort(descending=True, stable=True)
    order = order[(links[order] // count).argsort(stable=True)]
    source, target = links[order] // count, links[order] % count
    first = torch.searchsorted(source, torch.arange(count, device=links.device))
    rank = torch.arange(len(source), device=links.device) - first[source]
    table = torch.full((count, width), -1, dtype=torch.long, device=links.device)
    kept = rank < width
    table[source[kept], rank[kept]] = target[kept]
    return table


def _nearest(keys: Tensor, some: Tensor, count: int) -> Tensor:
    """The keys nearest to some of them, themselves left out: int64 [n, count], nearest first."""
    apart = torch.cdist(keys[some], keys).scatter(1, some[:, None], torch.inf)
    return apart.topk(count, dim=1, largest=False).indices


def _spread_out(keys: Tensor, table: Tensor, most: int) -> Tensor:
    """Of each key's candidates [A, C], in order, at most `most` that are nearer to it than to those taken before."""
    kept = torch.full((len(table), most), -1, dtype=torch.long, device=keys.device)
    for start in range(0, len(table), ROWS):
        some = table[start : start + ROWS]
        near = keys[some.clamp_min(0)]
        own = (near - keys[start : start + len(some), None]).norm(dim=-1)
        apart = torch.cdist(near, near)
        taken = torch.zeros(some.shape, dtype=torch.bool, device=keys.device)
        for j in range(some.shape[1]):
            hidden = ((apart[:, j] < own[:, j, None]) & taken).any(1)
            taken[:, j] = ~hidden & (some[:, j] >= 0) & (taken.sum(1) < most)
        order = taken.long().argsort(dim=1, descending=True, stable=True)[:, :most]
        chosen = some.gather(1, order).masked_fill(~taken.gather(1, order), -1)
        kept[start : start + len(some), : chosen.shape[1]] = chosen
    return kept


def _first_unique(table: Tensor) -> Tensor:
    """Rows [A, C] with -1 anywhere: each number once, in the order in which they come, -1 behind the end."""
    kept, order = table.sort(dim=1, stable=True)
    again = F.pad(kept[:, 1:] == kept[:, :-1], (1, 0)) | (kept < 0)
    again = torch.zeros_like(again).scatter(1, order, again)
    place = again.long().argsort(dim=1, stable=True)
    return table.gather(1, place).masked_fill(again.gather(1, place), -1)


def _once(fresh: Tensor) -> Tensor:
    """Rows [L, n] of key numbers, ascending, what comes again as -1."""
    fresh = fresh.sort(dim=1).values
    return fresh.masked_fill(F.pad(fresh[:, 1:] == fresh[:, :-1], (1, 0)), -1)


# -- lists -------------------------------------------------------------------------------------------------------------


def inverted_lists(keys: Tensor, clusters: int, seed: int) -> dict[str, Tensor]:
    """Keys [A, D] by the nearest of k-means centroids, made by faiss.

    Returns:
        centroids: float32 [clusters, D]; members: int32 [clusters, longest], -1 behind the end.
    """
    faiss = _faiss()
    data = keys.float().cpu().contiguous().numpy()
    clusters = min(clusters, len(data))
    means = faiss.Kmeans(data.shape[1], clusters, niter=10, seed=seed, min_points_per_centroid=1)
    means.train(data)
    label = torch.from_numpy(means.index.search(data, 1)[1][:, 0])
    number = torch.arange(len(data))
    members = _ranked(label * len(data) + number, -number, len(data), int(torch.bincount(label).max()))[:clusters]
    return {
        "centroids": torch.from_numpy(means.centroids).to(keys.device),
        "members": members.to(torch.int32).to(keys.device),
    }


def probe(q: Tensor, keys: Tensor, centroids: Tensor, members: Tensor, k: int, probes: int) -> Found:
    """The best keys in the lists of the `probes` best centroids.

    Args:
        q: [B, H, N, D]; keys: [B, Hs, A, D]; centroids: [B, Hs, C, D]; members: [B, Hs, C, W], -1 for none.
    """
    batch, heads, queries, dim = q.shape
    stores, count = keys.shape[1:3]
    pair = torch.arange(batch * stores, device=q.device).repeat_interleave(heads // stores * queries)
    rows = q.reshape(batch * stores, -1, dim).float()
    alive = (members >= 0).any(-1).flatten(0, 1)
    score = rows @ centroids.flatten(0, 1).transpose(1, 2)
    score = score.masked_fill(~alive[:, None], -torch.inf).flatten(0, 1)
    best = score.topk(min(probes, score.shape[1]), dim=1)
    listed = members.flatten(0, 1)[pair[:, None], best.indices].long()
    listed = listed.masked_fill((best.values == -torch.inf).unsqueeze(-1), -1).flatten(1)
    vectors = keys.reshape(-1, dim)[(pair[:, None] * count + listed).masked_fill(listed < 0, 0)].float()
    logits = (q.reshape(-1, 1, dim).float() @ vectors.transpose(1, 2)).squeeze(1).masked_fill(listed < 0, -torch.inf)
    top = logits.topk(min(k, logits.shape[1]), dim=1)
    found = listed.gather(1, top.indices).masked_fill(top.values == -torch.inf, -1)
    return Found(found.view(batch, heads, queries, -1), (listed >= 0).sum(1).view(batch, heads, queries))


def scan(q: Tensor, keys: Tensor, counts: Tensor, k: int) -> Found:
    """The best of all keys, exactly: q [B, H, N, D], keys [B, Hs, A, D] of which counts [B, Hs] are real."""
    batch, heads, queries, dim = q.shape
    rows = q.reshape(batch, keys.shape[1], -1, dim).float()
    score = rows @ keys.float().transpose(-1, -2)
    real = torch.arange(keys.shape[2], device=q.device) < counts[:, :, None, None]
    top = score.masked_fill(~real, -torch.inf).topk(min(k, keys.shape[2]), dim=-1)
    found = top.indices.masked_fill(top.values == -torch.inf, -1)
    scanned = counts[:, :, None].expand(-1, -1, heads // keys.shape[1] * queries)
    shape = (batch, heads, queries)
    return Found(found.view(*shape, -1), scanned.reshape(shape))


# -- tables ------------------------------------------------------------------------------------------------------------


def stacked(tables: Sequence[dict[str, Tensor] | None], rows: int) -> dict[str, Tensor]:
    """Tables of all (row, kv head) pairs as tensors [rows, pairs / rows, ...], filled up with -1 (numbers) or 0."""
    known = next((table for table in tables if table), None)
    out = {}
    for name, like in (known or {}).items():
        parts = [table[name] if table else like[:0] for table in tables]
        shape = [max(sizes) for sizes in zip(*(part.shape for part in parts), strict=True)]
        whole = like.new_full((len(parts), *shape), 0 if like.is_floating_point() else -1)
        for i, part in enumerate(parts):
            whole[(i, *(slice(size) for size in part.shape))] = part
        out[name] = whole.unflatten(0, (rows, -1))
    return out


def _fit(x: Tensor, width: int) -> Tensor:
    return F.pad(x, (0, width - len(x)), value=-1)


def _faiss() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of its own wrapper
            import faiss
    except ImportError:
        raise FoveateError(
            "this index needs faiss: install foveate with the extra 'retrieval-index' (foveate[retrieval-index])"
        ) from None
    return faiss
