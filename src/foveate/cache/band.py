"""A band: (row, store head) pairs that share one capacity. Ragged stores are a few bands, never one padded tensor."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from foveate.attention import Span
from foveate.attention.sent import sent
from foveate.cache.column import Column, Counts, Observed, PackedColumn, Side, fitted, stack_index
from foveate.cache.place import AnyColumn, Place, PlacedColumn, placed, recalled, slots
from foveate.cache.state import Blocks, Tag
from foveate.cache.summaries import Summaries

GROWTH = 16
"""Smallest number of spare slots when a band grows; more (1/16 of the length) once it is long."""


class Band:
    """Keys, values, positions, tags and summaries of P pairs, all [P, C, ...], compact from slot 0.

    Args:
        pairs: host int64 [P], row * Hs + head, ascending.
        heads: Hs.
        spans: the visibility these heads promise (host integers); what they hide may be freed.
        k, v: exact tensors [P, C, Dk] and [P, C, Dv]; v None when values are a slice of the keys (MLA).
        tags, blocks: what methods asked for.
        place: which tokens leave the device, or None.
    """

    def __init__(
        self,
        pairs: np.ndarray,
        heads: int,
        spans: tuple[Span, ...],
        k: Tensor,
        v: Tensor | None,
        tags: Mapping[str, Tag],
        blocks: Mapping[str, Blocks],
        value_dim: int,
        place: Place | None = None,
    ) -> None:
        self.spans, self.value_dim, self.place = spans, value_dim, place
        self._name(pairs, heads, k.device)
        self.k: AnyColumn = Column(k)
        self.v: AnyColumn | None = None if v is None else Column(v)
        self.positions: Column | None = None
        """int32 [P, C], only once something was evicted; until then slot = position."""
        self.tags = {
            name: Column(k.new_full((k.shape[0], k.shape[1], t.width), t.fill, dtype=t.dtype), t.fill)
            for name, t in tags.items()
        }
        self.declared = dict(blocks)
        self.summaries = Summaries()
        self._arrived = 0
        """Tokens that every pair took and that are not in the counts yet: a decode step waits for the host."""
        self._seen = np.zeros(len(pairs), dtype=np.int64)
        self.lengths = np.zeros(len(pairs), dtype=np.int64)
        self.floor: Counts = np.zeros(len(pairs), dtype=np.int64)
        """A crop may not go back behind this many seen tokens: what it would need again was freed."""
        self._renew()

    def _name(self, pairs: np.ndarray, heads: int, device: torch.device) -> None:
        self.pairs, self.heads = pairs, heads
        self.rows = pairs // heads
        """Row of each pair, host int64 [P]."""
        self.index = sent(pairs, device)
        """Pair numbers on the device, int64 [P]."""

    # -- what is held -------------------------------------------------------------------------------------------------

    @property
    def lengths(self) -> Counts:
        """Slots in use by each pair. Never changed in place."""
        self._count()
        return self._lengths

    @lengths.setter
    def lengths(self, counts: Counts) -> None:
        self._count()
        self._lengths = counts
        self.used = int(counts.max(initial=0))
        """Slots in use by the longest pair."""
        self.even = bool((counts == self.used).all())
        """All pairs hold the same number of tokens."""
        self._device_lengths: Tensor | None = None
        self._room: int | None = None
        self._grids: tuple[Tensor, Tensor] | None = None

    @property
    def seen(self) -> Counts:
        """Tokens ever appended: the next token's logical position."""
        self._count()
        return self._seen

    @seen.setter
    def seen(self, counts: Counts) -> None:
        self._count()
        self._seen = counts

    def _count(self) -> None:
        if self._arrived:
            self._lengths, self._seen = self._lengths + self._arrived, self._seen + self._arrived
            self._arrived = 0

    def _renew(self) -> None:
        """Something was or will be allocated anew: forget what was added up."""
        self._allocated: int | None = None
        """Bytes of all tensors but the lengths."""
        self._room: int | None = None
        self._grids: tuple[Tensor, Tensor] | None = None

    @property
    def room(self) -> int:
        """Tokens that every pair can take before a column must grow."""
        if self._room is None:
            self._room = min(c.room(self.lengths, self.used) for c in self._columns())
        return self._room

    @property
    def capacity(self) -> int:
        return self.used + self.room

    @property
    def bounded(self) -> bool:
        return any(s.window is not None for s in self.spans)

    @property
    def nbytes(self) -> int:
        if self._allocated is None:
            loose = [*self.summaries.values(), self.index]
            self._allocated = sum(c.nbytes for c in self._columns()) + sum(t.numel() * t.element_size() for t in loose)
        lengths = self._device_lengths
        return self._allocated + (0 if lengths is None else lengths.numel() * lengths.element_size())

    @property
    def host_nbytes(self) -> int:
        """Bytes of keys and values that left the device."""
        return sum(c.host_nbytes for c in (self.k, self.v) if isinstance(c, PlacedColumn))

    @property
    def away(self) -> Counts:
        """Tokens of each pair that lie on the host, behind the first `place.sink` slots."""
        return self.k.away if isinstance(self.k, PlacedColumn) else np.zeros(len(self.pairs), dtype=np.int64)

    @property
    def device(self) -> torch.device:
        return self.index.device

    def device_lengths(self) -> Tensor:
        """int32 [P]."""
        if self._device_lengths is None:
            self._device_lengths = sent(self.lengths.astype(np.int32), self.device)
        return self._device_lengths

    def keys(self, first: int = 0) -> Tensor:
        """Slots from `first` on, [P, used - first, Dk], decoded, on the device."""
        return slots(self.k, self.used, first)

    def values(self, keys: Tensor | None = None, first: int = 0) -> Tensor:
        """[P, used - first, Dv], decoded; `keys` saves reading them twice where values are a slice of the keys."""
        if self.v is None:
            return (self.keys(first) if keys is None else keys)[..., : self.value_dim]
        return slots(self.v, self.used, first)

    def slot_positions(self) -> Tensor:
        """Logical position of each slot, int32 [P, used]."""
        if self.positions is None:
            return torch.arange(self.used, dtype=torch.int32, device=self.device).expand(len(self.pairs), -1)
        return self.positions.read(self.used)

    def _columns(self) -> list[AnyColumn]:
        return [c for c in (self.k, self.v, self.positions, *self.tags.values()) if c is not None]

    # -- arriving -----------------------------------------------------------------------------------------------------

    def append(self, k: Tensor, v: Tensor | None, counts: Counts | None) -> None:
        """Append the first counts[p] of N tokens (None: all of them): k [P, N, Dk], v [P, N, Dv]."""
        before, n = self.lengths, k.shape[1]
        need = self.used + n if counts is None else int((before + counts).max())
        coming = need - self.used
        if counts is not None and any(not isinstance(column, Column) for column in self._columns()):
            # Of a shorter pair more tokens may be exact still: the pair that takes most decides.
            coming = max(coming, int(counts.max()))
        if coming > self.room:
            # A prompt is allocated exactly; later tokens find spare slots that cost one copy per 16 or more of them.
            spare = max(GROWTH, need // 16) if self.used else 0
            if self.bounded:  # what a window will expire needs no room
                most = max(int(s.sink) + int(s.window) for s in self.spans if s.window is not None)
                spare = max(0, min(spare, most - need))
            self.reserve(need + spare, coming)
        new: list[tuple[AnyColumn, Tensor]] = [(self.k, k)]
        if self.v is not None and v is not None:
            new.append((self.v, v))
        if self.positions is not None:
            fresh = sent(self.seen[:, None] + np.arange(n), self.device).to(torch.int32)
            new.append((self.positions, fresh))
        for tag in self.tags.values():
            new.append((tag, tag.data.new_full((len(self.pairs), n, *tag.data.shape[2:]), tag.fill)))
        if counts is None and self.even:
            for column, x in new:
                column.write_level(x, self.used)
        else:
            for column, x in new:
                column.write(x, before, counts)
        if counts is None:
            self._advance(n)
        else:
            self.lengths = before + counts
            self.seen = self.seen + counts
        if self.declared:
            self.refold(int(before.min()))

    def _advance(self, n: int) -> None:
        """Every pair took n tokens."""
        self._room = self.room - n
        self._arrived += n
        self.used += n
        self._device_lengths = None

    def append_whole(self, k: Tensor, v: Tensor) -> bool:
        """`append` for k [B, Hs, N, Dk] and v [B, Hs, N, Dv], all of which arrive, in two copies and nothing more.

        False, and nothing done, if this band needs the long way.
        """
        n = k.shape[2]
        if n > self.room or self.grids is None:
            return False
        for grid, x in zip(self.grids, (k, v), strict=True):
            grid[:, :, self.used : self.used + n] = x
        self._advance(n)
        return True

    @property
    def grids(self) -> tuple[Tensor, Tensor] | None:
        """Keys and values as [B, Hs, C, D], if they are exact, slot = position, and nothing else is kept per slot."""
        if self._grids is None:
            plain = self.positions is None and not self.tags and not self.declared and self.even
            if plain and isinstance(self.k, Column) and isinstance(self.v, Column) and not len(self.pairs) % self.heads:
                k, v = (
                    c.data.view(len(self.pairs) // self.heads, self.heads, *c.data.shape[1:]) for c in (self.k, self.v)
                )
                self._grids = (k, v)
        return self._grids

    def reserve(self, capacity: int, coming: int = 0) -> None:
        """Grow every column to `capacity` slots, of which `coming` are about to be written."""
        used = self.used
        self._renew()
        for column in self._columns():
            column.reserve(capacity, used, coming, self.lengths)

    def refold(self, start: int = 0) -> None:
        """Recompute the summaries of every block that holds a slot >= start."""
        if self.summaries.refold(
            self.declared, start, self.used, self.device_lengths(), self.keys, lambda first: self.values(first=first)
        ):
            self._renew()

    # -- leaving ------------------------------------------------------------------------------------------------------

    def keep(self, slots: list[np.ndarray], spare: int = GROWTH, upcoming: Counts | None = None) -> None:
        """Hold only the listed slots of each pair (host, ascending), in fresh tensors with `spare` free slots.

        Tokens at or behind position upcoming[p] were all kept, so a crop may still go back to there.
        """
        self._renew()
        counts = np.array([len(s) for s in slots], dtype=np.int64)
        index = stack_index(slots, self.device)
        if self.positions is None:
            self.positions = Column(self.slot_positions().contiguous())
        for column in self._columns():
            assert not isinstance(column, PackedColumn), "a packed body is cut by whole groups only"
            column.gather(index, index.shape[1] + spare)
        self.lengths = counts
        self.floor = self.seen.copy() if upcoming is None else np.maximum(self.floor, upcoming)
        self.summaries = Summaries()
        self.refold()

    def drop_one(self, slots: Tensor, pairs: np.ndarray) -> None:
        """Free one slot [len(pairs)] of each named pair: its newest token moves there, nothing else is copied."""
        if self.positions is None:
            self._renew()
            self.positions = Column(self.slot_positions().contiguous())
            self.positions.reserve(self.k.data.shape[1] if isinstance(self.k, Column) else self.used, self.used)
        where = sent(pairs, self.device)
        last = sent(self.lengths[pairs] - 1, self.device)
        for column in self._columns():
            assert not isinstance(column, PackedColumn), "a packed body is cut by whole groups only"
            column.move(slots.long(), last, where)
        left = self.lengths.copy()
        left[pairs] -= 1
        self.lengths = left
        self.floor[pairs] = self.seen[pairs]
        if self.declared:
            self.refold(int(slots.min()))

    @property
    def settles(self) -> bool:
        """Whether tokens leave it (or its exact tail) as others arrive."""
        packing = any(isinstance(c, PackedColumn) and not c.closed for c in (self.k, self.v))
        placing = self.place is not None and self.place.steady
        return bool(self.spans and self.bounded) or packing or placing

    def settle(self, upcoming: Counts) -> None:
        """Free what no query at or behind position upcoming[p] can see, then pack what may leave the exact tail."""
        if self.bounded:
            self._expire(upcoming)
        for column in (self.k, self.v):
            if isinstance(column, PackedColumn):
                self._renew()
                column.settle(self.lengths)
        if self.place is not None and self.place.steady:
            self.depart()

    def depart(self) -> None:
        """Bring the tokens to the host that belong there."""
        if self.place is None or (self.bounded and not self.place.steady):
            return
        away = self.place.away(self.lengths)
        if (away <= self.away).all():
            return
        self._renew()
        self.k = placed(self.k, self.place, away, self.lengths)
        self.v = None if self.v is None else placed(self.v, self.place, away, self.lengths)

    def recall(self) -> None:
        """Bring everything back to the device."""
        self._renew()
        self.k, self.v = recalled(self.k, self.used), None if self.v is None else recalled(self.v, self.used)

    def _expire(self, upcoming: Counts) -> None:
        if self.positions is None:  # nothing to wait for
            held = np.arange(self.used)[None, :]
        else:
            held = self.slot_positions().cpu().numpy().astype(np.int64)
        alive = np.arange(self.used)[None, :] < self.lengths[:, None]
        for span in self.spans:
            if span.window is None:
                continue
            sink, window = int(span.sink), int(span.window)
            alive &= (held < sink) | (upcoming[:, None] - held < window)
        gone = self.lengths - alive.sum(1)
        if not gone.any():
            return
        if gone.max() == 1:
            pairs = np.nonzero(gone)[0]
            dead = ~alive[pairs] & (np.arange(self.used)[None, :] < self.lengths[pairs, None])
            self.drop_one(sent(dead.argmax(1), self.device), pairs)
            return
        # One spare slot is all that a window needs: a token arrives, then the oldest leaves.
        self.keep([np.nonzero(a)[0] for a in alive], spare=1, upcoming=upcoming)

    def pack(self, key_side: Side | None, value_side: Side | None, observed: Observed | None = None) -> None:
        """From now on hold keys and values as the codec's sides say."""
        self._renew()
        self.k = self._packed(self.k, key_side, observed)
        self.v = None if self.v is None else self._packed(self.v, value_side, observed)

    def swap(self, k: AnyColumn, v: AnyColumn | None) -> None:
        """Hold keys and values in other columns."""
        self._renew()
        self.k, self.v = k, v

    def _packed(self, column: AnyColumn, side: Side | None, observed: Observed | None) -> AnyColumn:
        if side is None or not isinstance(column, Column):
            return column
        heads = self.index % self.heads
        learned = fitted(side, column.read(self.used), self.device_lengths(), observed, heads)
        return PackedColumn(column, side, column.data.dtype, learned)

    def crop(self, removed: Counts) -> None:
        """Forget the newest removed[p] tokens of each pair (they are the last slots: nothing moved since)."""
        self.lengths = self.lengths - removed
        self.seen = self.seen - removed
        self._renew()
        for column in self._columns():
            column.truncate(self.lengths)
        if self.declared:
            self.refold(int(self.lengths.min()))

    def pick(self, source: np.ndarray, pairs: np.ndarray) -> Band:
        """A copy of local pairs `source` under the names `pairs`."""
        index = sent(source, self.device)
        new = Band.__new__(Band)
        new.spans, new.value_dim, new.place = self.spans, self.value_dim, self.place
        new._name(pairs, self.heads, self.device)
        new.k, new.v = self.k.pick(index), None if self.v is None else self.v.pick(index)
        new.positions = None if self.positions is None else self.positions.pick(index)
        new.tags = {name: c.pick(index) for name, c in self.tags.items()}
        new.declared = self.declared
        new.summaries = self.summaries.pick(index)
        new._arrived, new._seen, new.lengths = 0, self.seen[source], self.lengths[source]
        new.floor = self.floor[source]
        new._renew()
        return new
