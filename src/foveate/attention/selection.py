"""The typed answer to "which query-key pairs are read": spans of positions, lists of blocks, and parts that merge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

Ints = int | Tensor
"""A host integer, or one value per store head (int tensor [Hs])."""


@dataclass(frozen=True)
class Span:
    """Visibility by position alone: key j is seen by query i iff j <= i, i - j >= beyond, and
    (j < sink or i - j < window). `window=None`: everything.

    A span is a promise, not a preference: what no later query can see may be freed at any time, and one-shot,
    chunked and step-by-step reads of it are the same read.

    Args:
        sink: how many first tokens stay visible for ever.
        window: how many most recent positions are visible, the query's own included.
        beyond: only keys at least this far back (splits a read into disjoint parts).
    """

    sink: Ints = 0
    window: Ints | None = None
    beyond: Ints = 0

    @property
    def unbounded(self) -> bool:
        """True when the span hides nothing that is not in the future."""
        return self.window is None and isinstance(self.beyond, int) and self.beyond <= 0

    def sees(self, q_positions: Tensor, k_positions: Tensor) -> Tensor:
        """Boolean visibility.

        Args:
            q_positions: [B, 1 or Hs, N] int.
            k_positions: [B, 1 or Hs, M] int.

        Returns:
            [B, 1 or Hs, N, M] bool.
        """
        i, j = q_positions.unsqueeze(-1), k_positions.unsqueeze(-2)
        distance = i - j
        seen = distance >= per_head(self.beyond)
        seen = seen & (distance >= 0)
        if self.window is not None:
            seen = seen & ((j < per_head(self.sink)) | (distance < per_head(self.window)))
        return seen

    def within(self, other: Span) -> bool:
        """Whether the other one sees all that this one sees, as far as host integers tell."""
        if self is other:
            return True
        if not _no_more(other.beyond, 0) and not _no_more(other.beyond, self.beyond):
            return False
        if other.window is None or self.window is None:
            return other.window is None
        return _no_more(self.window, other.window) and _no_more(self.sink, other.sink)

    def for_head(self, head: int) -> Span:
        """The span of one store head, in host integers."""
        return Span(
            *(int(x[head]) if isinstance(x, Tensor) else x for x in (self.sink, self.window, self.beyond))  # type: ignore[arg-type]
        )


def needed(spans: Sequence[Span]) -> tuple[Span, ...]:
    """Those of the spans that hide what no other one hides: together they see what all of them see."""
    kept: list[Span] = []
    for span in spans:
        if not span.unbounded and not any(other.within(span) for other in kept):
            kept = [*(other for other in kept if not span.within(other)), span]
    return tuple(kept)


def _no_more(a: Ints, b: Ints) -> bool:
    """a <= b, if both are known to the host."""
    return isinstance(a, int) and isinstance(b, int) and a <= b


def per_head(x: Ints) -> Ints:
    """One value per store head, laid along the head axis of [B, Hs, N, M]."""
    return x.view(1, -1, 1, 1) if isinstance(x, Tensor) else x


@dataclass(frozen=True)
class Frame:
    """The angle at which a part is read. Default: absolute positions on both sides.

    Args:
        query: positions [B, N] to which the queries are moved before they meet the keys of this part; None leaves
            them where they are. (StreamingLLM counts positions inside the cache: its far part is read with the query
            moved, which equals re-indexing the keys, and no key is ever rotated twice.)
        keys: int [B, h, nq, K] like the lists of the selection: the position to which the first key of each listed
            block is moved for this read, the others of the block behind it; None leaves the keys where they are. For
            gaps that do not close by the same amount for all keys. The selection must then have no span.
    """

    query: Tensor | None = None
    keys: Tensor | None = None


@dataclass(frozen=True)
class Selection:
    """Pairs to read = causal ∩ the model's own window ∩ held ∩ (lists ∪ span).

    Args:
        lists: int32 [B, h, nq, K], key blocks (in slots of the store, unit `k_block`) per query block; h is 1 (one list
            for the layer), Hs (one per store head) or H (one per query head). Ascending, unique, -1 behind the end.
        q_block: queries per list; None means one list for all N queries (nq = 1).
        k_block: slots per listed block.
        span: what is visible by position besides the lists; None: the lists alone.
        frame: the angle of this part.
        counts: int32 [B, h, nq], entries of each list, where whoever made the lists knows them; None: they are counted.
    """

    lists: Tensor | None = None
    q_block: int | None = None
    k_block: int = 1
    span: Span | None = None
    frame: Frame = field(default_factory=Frame)
    counts: Tensor | None = None

    @property
    def dense(self) -> bool:
        """True when every causal pair is read at its own angle."""
        return self.span is not None and self.span.unbounded and self.frame.query is None and self.frame.keys is None

    def rows(self, start: int, stop: int) -> Selection:
        """The selection of queries start..stop-1 alone."""
        if self.lists is None or self.q_block is None:
            return self
        first, last = start // self.q_block, -(-stop // self.q_block)
        if first + 1 == last or start % self.q_block == 0:
            q_block = None if first + 1 == last else self.q_block
            counts = None if self.counts is None else self.counts[:, :, first:last]
            return replace(self, lists=self.lists[:, :, first:last], q_block=q_block, counts=counts)
        index = torch.arange(start, stop, device=self.lists.device) // self.q_block
        counts = None if self.counts is None else self.counts.index_select(2, index)
        return replace(self, lists=self.lists.index_select(2, index), q_block=1, counts=counts)

    def seen(self, geometry: Geometry, visible: Sequence[Span] = ()) -> Tensor:
        """The pairs as a mask over no more rows and heads than differ: bool [1 or B, 1, Hs or H, N, M]."""
        g = geometry
        seen = g.causal()
        for span in visible:
            if not span.unbounded:
                seen = seen & span.sees(*g.positions())
        chosen: Tensor | None = None
        if self.lists is not None:
            chosen = _scatter(self.lists, self.k_block, g.keys)
            if self.q_block is not None:
                block = torch.arange(g.queries, device=chosen.device) // self.q_block
                chosen = chosen.index_select(2, block)
        if self.span is not None and not self.span.unbounded:
            near = self.span.sees(*g.positions())
            chosen = near if chosen is None else torch.logical_or(*_same_heads(chosen, near))
        elif self.span is not None:
            chosen = None
        return seen if chosen is None else torch.logical_and(*_same_heads(seen, chosen))

    def mask(self, geometry: Geometry, num_heads: int, visible: Sequence[Span] = ()) -> Tensor:
        """The pairs as a mask, the slow truth that tests and `show` use: bool [B, H, N, M]."""
        g = geometry
        return _to_heads(self.seen(g, visible), num_heads).expand(g.batch, num_heads, g.queries, g.keys)

    def pairs(self, geometry: Geometry, num_heads: int, visible: Sequence[Span] = ()) -> Tensor:
        """Pairs read, int64 [B, H]: exactly the sum of `mask`, without making it."""
        from foveate.attention import pairs

        return pairs.pairs(self, geometry, num_heads, visible)

    def density(self, geometry: Geometry, num_heads: int, visible: Sequence[Span] = ()) -> Tensor:
        """Pairs read over causal pairs, float64 [B, H]."""
        from foveate.attention import pairs

        return pairs.density(self, geometry, num_heads, visible)

    def bytes_read(
        self, geometry: Geometry, num_heads: int, store_heads: int, slot: int, visible: Sequence[Span] = ()
    ) -> int:
        """Bytes of K and V a kernel must fetch, where one slot of one store head has `slot` bytes: each slot once per
        store head and query block."""
        from foveate.attention import pairs

        return pairs.bytes_read(self, geometry, num_heads, store_heads, slot, visible)

    def draw(self, geometry: Geometry, num_heads: int, **how: object) -> str:
        """The selection in characters; `how` as in `foveate.attention.drawing.shares`."""
        from foveate.attention import drawing

        return drawing.draw(self, geometry, num_heads, **how)

    def image(self, geometry: Geometry, num_heads: int, **how: object) -> np.ndarray:
        """The selection as grey values, uint8 [rows, cols]; `how` as in `foveate.attention.drawing.shares`."""
        from foveate.attention import drawing

        return drawing.image(self, geometry, num_heads, **how)


def _scatter(lists: Tensor, k_block: int, capacity: int) -> Tensor:
    """Lists [..., K] of blocks as a mask [..., capacity] over slots."""
    blocks = -(-capacity // k_block)
    flags = torch.zeros(*lists.shape[:-1], blocks + 1, dtype=torch.bool, device=lists.device)
    flags.scatter_(-1, torch.where(lists < 0, blocks, lists).long(), True)
    return flags[..., :blocks].repeat_interleave(k_block, dim=-1)[..., :capacity]


def _to_heads(mask: Tensor, num_heads: int) -> Tensor:
    """[B, h, N, M] with h in {1, Hs, H} -> [B, H, N, M]: query head h reads store head h // (H / Hs)."""
    h = mask.shape[1]
    if h == num_heads:
        return mask
    return mask.expand(-1, num_heads, -1, -1) if h == 1 else mask.repeat_interleave(num_heads // h, dim=1)


def _same_heads(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Two masks with the heads of the finer one."""
    heads = max(a.shape[1], b.shape[1])
    return _to_heads(a, heads), _to_heads(b, heads)


@dataclass(frozen=True)
class Geometry:
    """Where queries and keys stand. The plain case (no tensors) is M keys of which the last N are the queries' own.

    Args:
        batch, queries, keys: B, N, M.
        lengths: int [B, 1 or Hs], readable slots of each (row, store head); None: all M.
        first: int [B, 1 or Hs], slot of query 0; None: M - N. The N newest tokens always stand in the last slots in
            their own order, so causality in slots is j <= first + i whatever happened to older slots.
        q_positions: int [B, N], logical positions of the queries; None: M - N + arange(N).
        k_positions: int [B, 1 or Hs, M], logical position of each slot; None: arange(M).
    """

    batch: int
    queries: int
    keys: int
    lengths: Tensor | None = None
    first: Tensor | None = None
    q_positions: Tensor | None = None
    k_positions: Tensor | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def plain(self) -> bool:
        """True when causality is bottom-right aligned and every slot is readable in every row."""
        return self.lengths is None and self.first is None

    def rows(self, start: int, stop: int) -> Geometry:
        """The geometry of queries start..stop-1 alone, over the same keys."""
        if start == 0 and stop == self.queries:
            return self
        past = self.keys - self.queries
        first = torch.full((1, 1), past, device=self.device) if self.first is None else self.first
        if self.q_positions is None:
            q_positions = torch.arange(past + start, past + stop, device=self.device).unsqueeze(0)
        else:
            q_positions = self.q_positions[:, start:stop]
        return replace(self, queries=stop - start, first=first + start, q_positions=q_positions)

    def positions(self) -> tuple[Tensor, Tensor]:
        """Positions of queries [1 or B, 1, N] and of slots [1 or B, 1 or Hs, M]."""
        q, k = self.q_positions, self.k_positions
        if q is None:
            q = torch.arange(self.keys - self.queries, self.keys, device=self.device).unsqueeze(0)
        if k is None:
            k = torch.arange(self.keys, device=self.device).view(1, 1, -1)
        return q.unsqueeze(1), k

    def ends(self) -> Tensor:
        """One past the last slot that each query may read, by causality and length: [1 or B, 1 or Hs, N], in 0..M."""
        i = torch.arange(1, self.queries + 1, device=self.device)
        ends = (self.keys - self.queries + i).view(1, 1, -1) if self.first is None else self.first.unsqueeze(-1) + i
        ends = ends.clamp(0, self.keys)
        return ends if self.lengths is None else torch.minimum(ends, self.lengths.unsqueeze(-1).clamp(min=0))

    def causal(self) -> Tensor:
        """Readable and not in the future, in slots: bool [1 or B, 1 or Hs, N, M]."""
        slot = torch.arange(self.keys, device=self.device)
        return slot < self.ends().unsqueeze(-1)


ALL = Selection(span=Span())
"""Dense: every causal pair."""


class Partial(NamedTuple):
    """A part that was attended already, over keys in no other part.

    Args:
        out: [B, H, N, Dv].
        lse: [B, H, N], log of the softmax mass of the part (any log-weight is allowed).
        over: the pairs that it attends, where they are pairs of the store under plain softmax: who sums attention over
            keys counts them in.
    """

    out: Tensor
    lse: Tensor
    over: Selection | None = None


Parts = Selection | Partial | Sequence[Selection | Partial]
"""What a method's `select` may return: disjoint parts, merged exactly by lse."""
