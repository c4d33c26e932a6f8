"""RetrievalAttention: most keys lie in the host's memory, and each query looks its nearest ones up there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.attention import ALL, Partial, Parts, Selection
from foveate.cache import UNBOUNDED, Away, Place, View
from foveate.errors import BadArgument
from foveate.methods.base import Context, Method, Needs, Profile, Role, register, tries
from foveate.methods.budget import Budget
from foveate.methods.policies.clusters import key_clusters, zones
from foveate.methods.policies.lists import mask_lists
from foveate.methods.policies.neighbours import (
    Found,
    inverted_lists,
    key_graph,
    probe,
    scan,
    stacked,
    walk,
)
from foveate.methods.policies.orders import Best
from foveate.methods.policies.places import ascending
from foveate.methods.policies.query_graphs import query_graphs
from foveate.models.shape import ModelShape

INDEXES = ("graph", "flat", "ivf", "hnsw", "wave")
LEAST = 8
"""Tokens below which a budget leaves nothing to look up."""


@register
@dataclass(frozen=True, kw_only=True)
class RetrievalAttention(Method):
    """When the prompt is over, all but its first and newest tokens go to the host's memory. A decode step reads those
    two on the device, with everything generated since, and of the others the k keys of largest q·k, which it finds in
    an index over them: per kv head, searched by each query head. Attention over these happens on the host; one softmax
    is merged of both.

    Queries lie elsewhere than keys, so an index that follows keys alone leads them astray. The graph is made from
    queries of the prompt: keys that are near the same query are neighbours in it. Keys are as stored (rotated).
    After a crop into the prompt the index is gone, and the scan is exact.

    Args:
        sink, recent: first and newest tokens of the prompt that stay on the device.
        k: keys looked up by each query head (paper: 100, or 2000 for tasks of many facts). A budget counts the tokens
            on the device in, which get at most half of it, first and newest in the same proportion.
        index: "graph" (paper); "flat" is the exact scan; "ivf" and "hnsw" are what the paper compares with, made by
            faiss from keys alone; "wave" is the successor's: clusters of keys, the best read, the next estimated from
            their means, the others left out.
        queries: prompt queries per head by which the graph is made, by chance (the paper takes all).
        knn: nearest keys of each of these. degree: neighbours of a key in a graph.
        beam: keys in view during a search in a graph; at least k.
        probes: lists of "ivf" that are scanned, of the square root of the number of keys.
        segment, cluster, estimated: "wave": consecutive keys that are clustered together, keys per cluster on average,
            share of the keys that is estimated. (Its paper has sink=4, recent=64.)
        seed: of k-means in "ivf".

    Source: 2409.10516, section 3; "wave" after RetroInfer, 2505.02922. The released repository holds only the latter.
    """

    id = "retrieval-attention"
    name = "RetrievalAttention"
    paper = "2409.10516"
    slots = frozenset({"decode"})
    nested = False
    offloads = True
    search = tries(
        sink=(16, 128), recent=(128, 512), k=(50, 100, 400, 2000), queries=(512, 2048), knn=(16, 32, 64),
        degree=(16, 32, 64), beam=(100, 200, 400), probes=(4, 16), segment=(8192,), cluster=(8, 16, 32),
        estimated=(0.0, 0.232), seed=(0,),
    )  # fmt: skip

    sink: int = 128
    recent: int = 512
    k: int = 100
    index: Literal["graph", "flat", "ivf", "hnsw", "wave"] = "graph"
    queries: int = 2048
    knn: int = 32
    degree: int = 32
    beam: int = 200
    probes: int = 8
    segment: int = 8192
    cluster: int = 16
    estimated: float = 0.232
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sink < 0:
            raise BadArgument("sink", self.sink, "give 0 or more tokens")
        for name in ("recent", "k", "queries", "beam", "probes", "segment", "cluster"):
            if getattr(self, name) < 1:
                raise BadArgument(name, getattr(self, name), "give at least 1")
        for name in ("knn", "degree"):
            if getattr(self, name) < 2:
                raise BadArgument(name, getattr(self, name), "give at least 2, so that keys have neighbours")
        if not 0 <= self.estimated <= 1:
            raise BadArgument("estimated", self.estimated, "give a share in 0..1")
        if self.index not in INDEXES:
            raise BadArgument("index", self.index, f"give one of {', '.join(INDEXES)}")

    def plan(self, shape: ModelShape, profile: Profile | None, length: int) -> Sequence[Role]:
        budget, sink, recent, k = Budget.of(self.budget), self.sink, self.recent, self.k
        if budget is not None and budget.whole:
            k = UNBOUNDED
        elif budget is not None:
            read = budget.read_tokens(shape, length, 0, name=self.id, floor=LEAST)
            here = min(sink + recent, read // 2)
            sink = here * sink // (sink + recent)
            recent, k = here - sink, read - here
        return [Role("retrieve", place=Place(sink, recent), extra={"k": k})] * len(shape.layers)

    def needs(self, role: Role) -> Needs:
        return Needs(queries=self.queries if self.index == "graph" and role.name == "retrieve" else 0)

    def prepare(self, view: View, ctx: Context) -> Mapping[str, Tensor]:
        if ctx.role.name != "retrieve" or ctx.role.place is None or self.index == "flat":
            return {}
        keys, values, first = view.k(), view.v(), ctx.role.place.sink
        away = ctx.role.place.away(view.host_lengths.ravel()).reshape(view.host_lengths.shape)
        # Fewer keys than are looked up need no index.
        pairs = [(b, h) for b, h in np.ndindex(*away.shape) if away[b, h] > max(2, ctx.role.extra["k"])]
        parts = [(keys[at][first : first + away[at]], values[at][first : first + away[at]]) for at in pairs]
        made = dict(zip(pairs, self._made(pairs, parts, ctx), strict=False))
        return stacked([made.get(at) for at in np.ndindex(*away.shape)], len(keys))

    def _made(
        self, pairs: Sequence[tuple[int, int]], parts: Sequence[tuple[Tensor, Tensor]], ctx: Context
    ) -> Sequence[dict[str, Tensor]]:
        """The index of each (row, kv head), out of its keys and values; none where there is none to be made."""
        if self.index == "graph":
            if ctx.samples is None or ctx.samples_valid is None or not pairs:
                return []
            groups = ctx.samples.unflatten(1, (ctx.shape.store_heads, -1))
            queries = [groups[b, h][:, ctx.samples_valid[b]].flatten(0, 1) for b, h in pairs]
            return query_graphs([k for k, _ in parts], queries, self.knn, self.degree)
        if self.index == "hnsw":
            return [key_graph(k, self.degree) for k, _ in parts]
        if self.index == "ivf":
            return [inverted_lists(k, round(len(k) ** 0.5), self.seed) for k, _ in parts]
        return [key_clusters(k, v, self.segment, self.cluster) for k, v in parts]

    def select(self, q: Tensor, view: View, ctx: Context) -> Parts:
        away = view.away
        if ctx.role.name != "retrieve" or away is None or ctx.role.extra["k"] >= int(away.counts.max()):
            return ALL
        there = q.to(away.k.device)
        counts, k = away.counts.to(q.device), ctx.role.extra["k"]
        slot = torch.arange(view.capacity, device=q.device)
        gone = (slot >= away.first) & (slot < away.first + counts.unsqueeze(-1))
        here = Selection(lists=mask_lists((view.valid() & ~gone).unsqueeze(2)))
        group = q.shape[1] // counts.shape[1]
        few = (away.counts <= k).repeat_interleave(group, dim=1)[:, :, None, None]  # all of them are read
        every = torch.arange(away.k.shape[2], device=there.device) < away.counts.repeat_interleave(group, 1)[..., None]
        if self.index == "wave" and ctx.prepared:
            zone = zones(there, dict(ctx.prepared), k, self.estimated, ctx)
            read = torch.where(few, every.unsqueeze(2), zone.keys[..., : every.shape[-1]])
            lse = zone.estimate.lse.masked_fill(few[..., 0], -torch.inf)
            guess = Partial(zone.estimate.out.to(q.device), lse.to(q.device))
            ctx.count(float(zone.estimated.masked_fill(few[..., 0], 0).sum()))
            lists = mask_lists(read)
            listed = torch.where(lists < 0, -1, lists + away.first).to(q.device, torch.int32)
            return [here, Selection(lists=listed, q_block=1), guess]
        found = self._find(there, away, k, ctx)
        found_keys = F.pad(found.keys, (0, k - found.keys.shape[-1]), value=-1)
        all_of_few = torch.where(every, torch.arange(every.shape[-1], device=there.device), -1)[:, :, None, :k]
        lists = torch.where(few, all_of_few, found_keys)
        ctx.mine["scanned"] = (found.scanned.amax(-1) / every.sum(-1).clamp_min(1)).to(q.device)
        listed = ascending(torch.where(lists < 0, -1, lists + away.first)).to(q.device, torch.int32)
        return [here, Selection(lists=listed, q_block=1)]

    def _find(self, q: Tensor, away: Away, k: int, ctx: Context) -> Found:
        """The best keys of each query among those on the host, by the index; exactly where there is none."""
        tables, few = ctx.prepared, (away.counts <= k).unsqueeze(-1)  # no need to look for these
        if "edges" in tables:
            edges, entries = tables["edges"][:, :, : away.k.shape[2]], tables["entries"].masked_fill(few, -1)
            return walk(q, away.k, edges, entries, k, self.beam, ctx.forward.setdefault("finder", Best()))
        if "members" in tables:
            members = tables["members"].masked_fill(few.unsqueeze(-1), -1)
            return probe(q, away.k, tables["centroids"], members, k, self.probes)
        return scan(q, away.k, away.counts, k)
