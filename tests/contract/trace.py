"""Which pairs were read: the parts of every read, expanded by their definition to queries and keys by position.

This is the slow truth: it knows nothing of the machinery's masks, gathers and counts, only what a part promises.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from foveate.attention import Partial, Selection, Span
from foveate.cache import Band, Store
from foveate.engine import context, forward
from foveate.engine.read import Reading

Reads = dict[int, Tensor]
"""By layer: bool [B, H, T, T], query position by key position."""


class Trace:
    """Pairs read while it was recording.

    Attributes:
        pairs: by layer, bool [B, H, T, T]; a query that was run again (after a crop) replaces what it read before.
        counts: by phase, how many pairs real queries read.
        framed: whether some part was read at another angle.
    """

    def __init__(self, length: int) -> None:
        self.length, self.pairs, self.counts = length, {}, {"prompt": 0, "decode": 0}
        self.framed = False
        self._layer, self._phase = -1, ""
        self._cleared: set[tuple[int, int]] = set()

    def enter(self, call: Any, plan: Any) -> None:
        self._layer, self._phase = plan.shape.index, call.phase
        self._cleared.clear()

    def add(self, store: Store, q: Tensor, parts: Any, how: Reading) -> None:
        batch, heads, queries, _ = q.shape
        mine = self.pairs.setdefault(self._layer, torch.zeros(batch, heads, self.length, self.length, dtype=torch.bool))
        group = heads // store.spec.heads
        selections = [parts] if isinstance(parts, Selection | Partial) else list(parts)
        frames = [part.frame for part in selections if isinstance(part, Selection)]
        self.framed |= any(frame.query is not None or frame.keys is not None for frame in frames)
        for band in store.bands:
            for i, pair in enumerate(band.pairs):
                row, store_head = divmod(int(pair), store.spec.heads)
                count, by_head = None, any(_lists_by_head(part, store.spec.heads) for part in selections)
                for head in range(store_head * group, (store_head + 1) * group):
                    if count is None or by_head:
                        count = torch.zeros(queries, int(band.lengths[i]), dtype=torch.int64)
                        for part in selections:
                            if isinstance(part, Selection):  # a Partial was recorded when the method attended it
                                count += read_by(part, band, i, row, head, store_head, store, how, queries)
                        assert count.max() <= 1, "two parts read the same pair"
                    self._enter(mine[row, head], count.bool(), band, i, int(how.fresh[row]), (row, head))

    def _enter(self, mine: Tensor, seen: Tensor, band: Band, i: int, fresh: int, where: tuple[int, int]) -> None:
        first = int(band.seen[i]) - fresh
        if where not in self._cleared:
            mine[first : first + fresh] = False
            self._cleared.add(where)
        positions = band.slot_positions()[i, : int(band.lengths[i])].long()
        rows = torch.zeros(fresh, self.length, dtype=torch.bool)
        rows[:, positions] = seen[:fresh]
        mine[first : first + fresh] |= rows
        self.counts[self._phase] += int(seen[:fresh].sum())


def _lists_by_head(part: Selection | Partial, store_heads: int) -> bool:
    """Whether the query heads of a group have lists of their own."""
    return isinstance(part, Selection) and part.lists is not None and part.lists.shape[1] not in (1, store_heads)


def read_by(
    part: Selection, band: Band, i: int, row: int, head: int, store_head: int, store: Store, how: Reading, queries: int
) -> Tensor:
    """Pairs of one part for one query head: int [N, slots]."""
    length = int(band.lengths[i])
    k = band.slot_positions()[i, :length].long()
    q = int(band.seen[i]) - int(how.fresh[row]) + torch.arange(queries)
    distance = q[:, None] - k
    seen = distance >= 0
    for span in how.spans if how.spans is not None else band.spans:
        seen &= visible(span.for_head(store_head), distance, k)
    chosen = None if part.span is None else visible(part.span.for_head(store_head), distance, k)
    if part.lists is not None:
        width = part.lists.shape[1]
        blocks = part.lists[row, {1: 0, store.spec.heads: store_head}.get(width, head)].long()
        slots = torch.arange(length)
        most = max(int(blocks.max()) if blocks.numel() else 0, length // part.k_block) + 1
        times = torch.zeros(len(blocks), 1 + most, dtype=torch.int64)
        times.scatter_add_(1, 1 + blocks.clamp_min(-1), torch.ones_like(blocks))
        assert times[:, 1:].max() <= 1, "a block is listed twice"
        of = torch.zeros(queries, dtype=torch.int64) if part.q_block is None else torch.arange(queries) // part.q_block
        listed = times[:, 1:].bool()[:, slots // part.k_block][of]
        chosen = listed if chosen is None else chosen | listed
    assert chosen is not None, "a selection with neither lists nor a span reads nothing"
    return (seen & chosen).long()


def visible(span: Span, distance: Tensor, k: Tensor) -> Tensor:
    seen = distance >= span.beyond
    if span.window is not None:
        seen &= (k < span.sink) | (distance < span.window)
    return seen


@contextmanager
def tracing(length: int) -> Iterator[Trace]:
    """Record every read of tokens at positions below `length`."""
    trace = Trace(length)
    attend, read, again = forward._attend, forward.read, context.read

    def noting(call: Any, plan: Any, *args: Any, **kwargs: Any) -> Any:
        trace.enter(call, plan)
        return attend(call, plan, *args, **kwargs)

    def reading(store: Store, q: Tensor, parts: Any, how: Reading, **kwargs: Any) -> Any:
        trace.add(store, q, parts, how)
        return read(store, q, parts, how, **kwargs)

    forward._attend, forward.read, context.read = noting, reading, reading
    try:
        yield trace
    finally:
        forward._attend, forward.read, context.read = attend, read, again


def same_reads(one: Reads, other: Reads, rows: slice = slice(None)) -> None:
    """The same pairs in every layer, for the queries in `rows`."""
    assert one.keys() == other.keys()
    for layer, pairs in one.items():
        a, b = pairs[:, :, rows], other[layer][:, :, rows]
        assert torch.equal(a, b), f"layer {layer}: {int((a != b).sum())} pairs differ"
