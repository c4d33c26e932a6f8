"""Nearest keys by inner product: searched best first in a graph over keys, in inverted lists, or among all.

A table describes the keys of one (row, kv head); tables of several are padded and stacked, so that they follow beams
and forks like any tensor.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.errors import FoveateError
from foveate.methods.policies.native import native
from foveate.methods.policies.orders import Best, on_processor, ranked
from foveate.methods.policies.query_graphs import ENTRIES

STEPS = 4
"""Keys whose neighbours are looked at in one round of a search."""
WHOLE = 50
"""Keys per query and key of its beam up to which products with all of them take less time than with those that a search
comes by: gathering is what takes time."""


class Found(NamedTuple):
    """The best keys of each query.

    Args:
        keys: int64 [B, H, N, k] key numbers, -1 where there are fewer, in no order.
        scanned: keys to which each query was compared, int64 [B, H, N].
    """

    keys: Tensor
    scanned: Tensor


# -- graphs ------------------------------------------------------------------------------------------------------------


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


def walk(
    q: Tensor, keys: Tensor, edges: Tensor, entries: Tensor, k: int, beam: int, finder: Best | None = None
) -> Found:
    """Best-first search: look at the neighbours of the best keys known, until the `beam` best have all been looked at.
    Of equal keys the one found first is the better one, of those found in one round the one of lower number.

    It is compiled where it can be: for a few queries that takes a tenth of the time.

    Args:
        q: [B, H, N, D]; keys: [B, Hs, A, D]; edges: [B, Hs, A, R]; entries: [B, Hs, E].
        finder: of another search, whose memory is used again.
    """
    loops = native("walk") if on_processor(q) and on_processor(keys) else None
    if loops is None:
        return walk_abreast(q, keys, edges, entries, k, beam, finder)
    return Found(*loops.search(q, keys, edges, entries, k, beam, STEPS))


def walk_abreast(
    q: Tensor, keys: Tensor, edges: Tensor, entries: Tensor, k: int, beam: int, finder: Best | None = None
) -> Found:
    """`walk` of all queries at once, a step of each at a time.

    What has been found lies in the host's memory, in the order in which it was found. Keys may lie anywhere.
    """
    finder = finder or Best()
    q, keys = q.detach(), keys.detach()
    batch, heads, queries, _ = q.shape
    stores, count = keys.shape[1:3]
    beam = min(max(beam, k), count)
    each, every, span = heads // stores * queries, batch * heads * queries, count + 1
    compare = _comparison(q, keys, beam, finder)
    links = edges.reshape(batch * stores * count, -1).cpu().numpy()
    first = np.arange(every) // each * count  # where a query's keys begin among all
    # What was not found yet, by key; no key stands for none, and -1 is the last of the query before.
    unseen = finder.room("unseen", (every, span), np.bool_, True)
    unseen[:, -1] = False
    unseen, scanned = unseen.reshape(-1), np.zeros(every, dtype=np.int64)
    # What was found and not looked at, in order of finding; and what was looked at, one of each query after the other.
    room = 4 * beam + STEPS * max(links.shape[1], entries.shape[-1])
    number, score = (finder.room(f"found {x}", (every, room), x, -1) for x in (np.int32, np.float32))
    score.fill(-np.inf)
    filled, start = np.zeros(every, dtype=np.int64), np.arange(every) * room
    looked, value_of = (finder.room(f"looked {x}", (2 * beam + STEPS, every), x, -1) for x in (np.int32, np.float32))
    value_of.fill(-np.inf)
    fresh, going, done = entries.flatten(0, 1).cpu().numpy().repeat(each, axis=0), np.arange(every), 0
    while True:
        at = (fresh + (going * span)[:, None]).reshape(-1)
        at = at[unseen.take(at)]
        at.sort()
        at = at[np.concatenate([[True], at[1:] != at[:-1]])[: len(at)]]
        unseen[at] = False
        owner, found = np.divmod(at, span)
        gained = np.bincount(owner, minlength=every)
        scanned += gained
        if (filled + gained).max() > room:  # only the best can come into a beam again
            best = finder.columns(torch.from_numpy(score), beam).numpy()
            for x, none in ((number, -1), (score, -np.inf)):
                x[:, :beam] = np.take_along_axis(x, best, axis=1)
                x[:, beam:] = none
            filled[:] = beam
        place = np.arange(len(at)) + (start + filled + gained - np.cumsum(gained))[owner]
        filled += gained
        number.reshape(-1)[place], score.reshape(-1)[place] = found, compare(owner, found)
        if done + STEPS > len(looked):
            looked = np.pad(looked, ((0, done), (0, 0)), constant_values=-1)
            value_of = np.pad(value_of, ((0, done), (0, 0)), constant_values=-np.inf)
        for now in range(done, done + STEPS):
            place = score.argmax(1) + start
            value = score.take(place)
            live = value > -np.inf
            if now >= beam:  # else there are too few for a beam without this one
                live &= np.count_nonzero(value_of[:now] >= value, axis=0) < beam
            looked[now, live] = number.take(place[live])
            value_of[now, live] = value[live]
            score.reshape(-1)[place[live]] = -np.inf
        node = looked[done : done + STEPS].T
        done += STEPS
        going = np.flatnonzero(node[:, 0] >= 0)
        if not len(going):
            break
        node = node[going]
        fresh = links.take(node + first[going, None], axis=0, mode="clip")
        fresh[node < 0] = -1
        fresh = fresh.reshape(len(going), -1)
    # A search ends when all of its beam have been looked at: those are the best that were found.
    of_best, best = (torch.from_numpy(x[:done].T.copy()) for x in (looked, value_of))
    keys_found = of_best.gather(1, finder.columns(best, min(k, done))).long()
    shape = (batch, heads, queries)
    return Found(keys_found.view(*shape, -1).to(q.device), torch.from_numpy(scanned).view(shape).to(q.device))


def _comparison(q: Tensor, keys: Tensor, beam: int, finder: Best) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """The scores of queries owner [n] with keys number [n]: float32 [n]."""
    stores, count, dim = keys.shape[1:]
    rows = q.reshape(len(keys) * stores, -1, dim).float()
    each = rows.shape[1]
    if count <= WHOLE * each * beam:
        table, room = finder.scores((len(rows), each, count), rows), rows.new_empty(count, dim)
        for own, stored, out in zip(rows, keys.flatten(0, 1), table, strict=True):
            torch.mm(own, room.copy_(stored).T, out=out)
        flat = table.view(-1).cpu().numpy()
        return lambda owner, number: flat.take(owner * count + number)
    every = rows.flatten(0, 1)

    def compare(owner: np.ndarray, number: np.ndarray) -> np.ndarray:
        asked, there = (torch.from_numpy(x).to(q.device) for x in (owner, number))
        store = asked // each
        vectors = keys[store // stores, store % stores, there].float()
        return (every[asked] * vectors).sum(-1).cpu().numpy()

    return compare


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
    longest = int(torch.bincount(label).max())
    members = ranked(label, number, torch.zeros_like(number), (clusters, len(data), 0), longest)
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
