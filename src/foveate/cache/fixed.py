"""A band as a captured decode step sees it: fixed addresses and shapes, lengths on the device.

The tensors are those of the store itself, so nothing is copied; what is here only says where the next token goes. One
step is the same sequence of device work whatever the lengths are, so it can be recorded once and replayed; the host's
own counts are brought up to date behind each replay (`FixedBand.arrived`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from foveate.attention import Geometry, Partial, Span, coded, decoding, thinned
from foveate.cache.band import Band
from foveate.cache.column import Column, PackedColumn
from foveate.cache.fixed_column import AnyFixed, FixedColumn, FixedPacked
from foveate.errors import Refused


class FixedBand:
    """A band whose every step appends one token to each pair.

    Where the band's window is full, the newest token overwrites the one that no query can see any more: the slots of
    the window are used in turn. Elsewhere it goes behind the last one; where each step frees a token (`evicting`), it
    then takes that one's slot.

    Args:
        band: what holds the tokens; it must have room for `room` more.
        room: steps that can be made.
        lengths: int32 [P], where it counts the slots in use.
        seen: int64 [P], where it counts tokens: the position of the next one.
        turn: int64 [P], where it counts those that a full window took.
        evicting: whether `drop` is called in each step.
    """

    def __init__(
        self, band: Band, room: int, lengths: Tensor, seen: Tensor, turn: Tensor, evicting: bool = False
    ) -> None:
        reason = refusal(band)
        if reason:
            raise Refused(reason)
        self.band, self.pairs, self.rows, self.index = band, band.pairs, band.rows, band.index
        self.heads, self.spans, self.declared = band.heads, (), band.declared
        self.declared_spans = band.spans
        self._runs: dict[tuple[int, int], Tensor] = {}
        """Lengths of runs of slots that were read, int32 [P]."""
        self.cyclic, self.evicting = band.bounded, evicting
        self.lengths, self.seen, self.turn = lengths, seen, turn
        device = band.device
        self.pair = torch.arange(len(self.pairs), device=device)
        if self.cyclic:
            _free_slot(band)
        else:
            _provide(band, 1 if evicting else room, placed=evicting)
        plain = [c.data.shape[1] for c in band._columns() if isinstance(c, Column)]
        self.used = min(plain, default=band.used + room)
        """Slots of every tensor: what is readable of them, the device knows."""
        if not self.cyclic and band.summaries.reserve(band.declared, self.used):
            band._renew()
        self.k = self._fixed(band.k, room)
        self.v = None if band.v is None else self._fixed(band.v, room)
        self.positions = None if band.positions is None else FixedColumn(band.positions)
        self.marks = {name: FixedColumn(tag) for name, tag in band.tags.items()}
        self.even = False
        self.ring = self._ring() if self.cyclic else None
        """Slots of the window in the order in which they are overwritten, int64 [P, W]."""
        self.steps = 0
        self.sides = self._sides()
        """Keys and values as the kernel takes tokens in that packs, or None where it cannot."""
        self.refresh()

    def _fixed(self, column: Any, room: int) -> AnyFixed:
        if isinstance(column, PackedColumn):
            return FixedPacked(column, self.band.lengths, room, self.band.device)
        return FixedColumn(column)

    def _sides(self) -> list[tuple[Any, ...]] | None:
        found = [c.arrival() for c in (self.k, self.v) if c is not None]
        if self.exact or self.cyclic or self.evicting or not decoding.serves(found[0][0] if found[0] else self.seen)[0]:
            return None
        known = [side for side in found if side is not None]
        return known if len(known) == len(found) else None

    def _columns(self) -> list[AnyFixed]:
        return [c for c in (self.k, self.v, self.positions, *self.marks.values()) if c is not None]

    @property
    def exact(self) -> bool:
        """Keys and values are held as they came."""
        return isinstance(self.k, FixedColumn) and (self.v is None or isinstance(self.v, FixedColumn))

    def _ring(self) -> Tensor:
        """The free slot comes first, then the window's tokens from the oldest on."""
        band = self.band
        (span,) = (s for s in band.spans if s.window is not None)
        held = band.slot_positions()[:, : int(band.lengths[0])]
        order = held.masked_fill(held < int(span.sink), torch.iinfo(torch.int32).max).argsort(dim=1, stable=True)
        window = order[:, : int(band.lengths[0]) - int(span.sink)]
        return torch.cat([torch.full_like(window[:, :1], int(band.lengths[0])), window], dim=1).contiguous()

    def refresh(self) -> None:
        """Take over the host's counts, after steps that were not replayed."""
        lengths = self.band.lengths
        self.expected = self._counted()
        self.lengths.copy_(torch.from_numpy(lengths.astype(np.int32)))
        self.seen.copy_(torch.from_numpy(self.band.seen))
        for column in self._columns():
            column.refresh(lengths)

    def _counted(self) -> tuple[int, int]:
        """What tells whether the host counted a token: slots in use, or tokens where each one takes another's slot."""
        return self.band.used, int(self.band.seen[0]) if self.evicting else 0

    @property
    def tags(self) -> dict[str, Column]:
        return self.band.tags

    @property
    def summaries(self) -> dict[str, Tensor]:
        return self.band.summaries

    @property
    def stale(self) -> bool:
        """The band's tensors are others now, or cannot take one more token."""
        band = self.band
        now = [band.k, band.v, band.positions, *band.tags.values()]
        mine = self._columns()
        if any(c.moved for c in mine) or [c for c in now if c is not None] != [c.column for c in mine]:
            return True
        if self.cyclic:
            return self.behind
        if self.evicting:
            return band.used != self.expected[0]
        return min(c.room(band.lengths, band.used) for c in mine) < 1

    @property
    def behind(self) -> bool:
        """The host counted tokens that came by another way."""
        return self._counted() != self.expected

    @property
    def counters(self) -> list[Tensor]:
        """What a step counts on the device."""
        return [self.lengths, self.seen, self.turn, *(t for c in self._columns() for t in c.counters)]

    def arrived(self) -> None:
        """Count one replayed step on the host."""
        band = self.band
        if self.cyclic or self.evicting:
            self.steps += 1
            if self.cyclic and self.steps == 1:
                band.lengths = band.lengths + 1
            band.seen = band.seen + 1
            band.floor = band.seen
        else:
            band._advance(1)
            if not self.exact:
                for column in self._columns():
                    column.arrived(band.lengths)
                band._renew()
        self.expected = self._counted()

    # -- what a step does ---------------------------------------------------------------------------------------------

    def append(self, k: Tensor, v: Tensor | None) -> None:
        """One token of each pair: k [P, 1, Dk], v [P, 1, Dv]."""
        if self.sides is not None:
            placed = None if self.positions is None else self.positions.data
            decoding.arrive_packed(k, v, self.sides, self.lengths, self.seen, placed)
            if self.marks or self.declared:
                self.note(self.lengths.long() - 1)
            return
        if self.ring is None:
            slot = self.lengths.long()
            self.lengths += 1
        else:
            slot = self.ring.gather(1, (self.turn % self.ring.shape[1]).unsqueeze(1))[:, 0]
            self.turn += 1
            self.lengths.fill_(self.used)
        self.k.write(k[:, 0], slot, self.pair)
        if self.v is not None and v is not None:
            self.v.write(v[:, 0], slot, self.pair)
        if self.positions is not None:
            self.positions.data[self.pair, slot] = self.seen.to(torch.int32)
        self.seen += 1
        self.note(slot)

    def note(self, slot: Tensor, *, tagged: bool = False, folded: str = "") -> None:
        """Tags (if not `tagged` yet) and summaries of the newest tokens, which went to these slots [P].

        Args:
            folded: the summary that knows of them already; "": none does.
        """
        for tag in () if tagged else self.marks.values():
            tag.data.index_put_((self.pair, slot), tag.data.new_full((), tag.column.fill))
        self._fold(slot, folded)

    def _fold(self, slot: Tensor, folded: str = "") -> None:
        """Summaries, but for the one named `folded`, of the blocks that hold these slots [P]."""
        due = {name: spec for name, spec in self.declared.items() if name != folded}
        keys = self.keys() if due else None
        for name, spec in due.items():
            assert keys is not None
            block = slot // spec.size
            inside = block[:, None] * spec.size + torch.arange(spec.size, device=slot.device)
            valid = inside < self.lengths[:, None]
            where = self.pair[:, None], inside.clamp_max(self.used - 1)
            k, v = (x[where].unsqueeze(1) for x in (keys, self.values(keys)))
            self.band.summaries[name][self.pair, block] = spec.fold(k, v, valid.unsqueeze(1))[:, 0]

    def drop(self, slot: Tensor) -> None:
        """Free one slot [P] of each pair: its newest token moves there."""
        self.lengths -= 1
        last = self.lengths.long()
        for column in (self.k, self.v, self.positions):
            assert column is None or isinstance(column, FixedColumn), "a packed body is cut by whole groups only"
            if column is not None:
                column.data[self.pair, slot] = column.data[self.pair, last]
        self.dropped(slot)

    def dropped(self, slot: Tensor, *, tagged: bool = False) -> None:
        """Tags (if they are not where they belong, `tagged`) and summaries, when the newest tokens moved to these slots
        [P] and are counted there."""
        last = self.lengths.long()
        for tag in () if tagged else self.marks.values():
            tag.data[self.pair, slot] = tag.data[self.pair, last]
        for changed in (slot, last) if self.declared else ():
            self._fold(changed)

    def settle(self, rehearsing: bool = False) -> None:
        """What is packed token by token, behind attention, unless it was when the token arrived."""
        for column in (self.k, self.v):
            if column is not None and self.sides is None:
                column.settle(self.lengths, self.pair, rehearsing)

    def keys(self) -> Tensor:
        """[P, C, Dk]; behind the lengths there is anything finite."""
        return self.k.read(self.used)

    def values(self, keys: Tensor | None = None) -> Tensor:
        """[P, C, Dv]."""
        if self.v is None:
            return (self.keys() if keys is None else keys)[..., : self.band.value_dim]
        return self.v.read(self.used)

    def attend(self, q: Tensor, scale: float, softcap: float | None) -> Partial | None:
        """q [P, G, 1, Dk] over all that is held, unpacked where it is read; None where no kernel can."""
        thin = self.k.thin() if isinstance(self.k, FixedPacked) and isinstance(self.v, FixedColumn) else None
        if thin is not None and self.v is not None:
            return thinned.attend(q, thin, self.v.read(self.used), self.lengths, scale, softcap)
        keys, values = (x.coded() if isinstance(x, FixedPacked) else None for x in (self.k, self.v))
        if keys is not None and values is not None:
            return coded.attend(q, keys, values, self.lengths, scale, softcap)
        sides = []
        for column, per_channel in ((self.k, True), (self.v, False)):
            side = column.low_bit(per_channel) if isinstance(column, FixedPacked) else None
            if side is None or not decoding.serves(q)[0]:
                return None
            sides.append(side)
        return decoding.packed(q, sides[0], sides[1], self.lengths, scale, softcap)

    def run(self, span: Span) -> tuple[int, int] | None:
        """First slot and end of those that the newest query sees by this span; None if they are no run. Of a full
        window the first tokens stand in front, and all others are within its reach."""
        if not self.cyclic or not all(isinstance(x, int) for x in (span.sink, span.window, span.beyond)):
            return None
        bound = next(s for s in self.declared_spans if s.window is not None)
        sink, window = int(bound.sink), int(bound.window or 0)
        if span == Span(window=window):
            return sink, self.used
        return (0, sink) if span == Span(sink, window=0, beyond=window) else None

    def attend_run(self, q: Tensor, run: tuple[int, int], scale: float, softcap: float | None) -> Partial | None:
        """q [P, G, 1, D] over a run of slots of each pair; None where no kernel can."""
        if not self.exact or not decoding.serves(q)[0]:
            return None
        if run not in self._runs:
            self._runs[run] = torch.full_like(self.lengths, run[1] - run[0])
        keys = self.keys()
        k, v = (x[:, slice(*run)] for x in (keys, self.values(keys)))
        return decoding.ragged(q, k, v, self._runs[run], scale, softcap)

    def attend_turned(
        self, q: Tensor, sink: int, place: Tensor, frequencies: Tensor, last: bool, scale: float, softcap: float | None
    ) -> Partial | None:
        """q [B, H, 1, D] over all slots of a full window of every pair, whose first `sink` it meets from position
        `place` [B]; None where no kernel can."""
        if not self.exact or not decoding.serves(q)[0]:
            return None
        keys, place, speeds = self.keys(), place.long(), frequencies.to(q.device).float()
        values = self.values(keys)
        return decoding.window(q, keys, values, sink, place, self.seen, speeds, last=last, scale=scale, softcap=softcap)

    def device_lengths(self) -> Tensor:
        """int32 [P]."""
        return self.lengths

    def slot_positions(self) -> Tensor:
        """Logical position of each slot, int32 [P, C]."""
        if self.positions is None:
            return torch.arange(self.used, dtype=torch.int32, device=self.lengths.device).expand(len(self.pairs), -1)
        return self.positions.data[:, : self.used]

    def geometry(self, spanned: bool, placed: bool) -> Geometry:
        """Where the one query of each pair and the held keys stand.

        Args:
            spanned, placed: whether the read depends on the position of the query, and on those of keys.
        """
        now = (self.seen - 1).unsqueeze(1) if spanned else None
        slots = self.slot_positions().unsqueeze(1) if placed and self.positions is not None else None
        return Geometry(
            len(self.pairs), 1, self.used, self.lengths.unsqueeze(1), None, now, slots, device=self.lengths.device
        )


def refusal(band: Band) -> str:
    """Why one-token steps of this band cannot be recorded now; empty if they can."""
    if not all(isinstance(c, Column | PackedColumn) for c in (band.k, band.v) if c is not None):
        return "tokens lie in the host's memory and are attended there"
    if band.bounded:
        windows = [s for s in band.spans if s.window is not None]
        if len(windows) > 1:
            return "several windows bound one head"
        if band.declared:
            return "a window's blocks change at both ends"
        if not band.even or band.used != int(windows[0].sink) + int(windows[0].window or 0) - 1:
            return "a window is not full yet"
    return ""


def _provide(band: Band, room: int, *, placed: bool) -> None:
    """Room for `room` more tokens in all that is exact, and each token's position if they change their slots."""
    band._renew()
    if placed and band.positions is None:
        band.positions = Column(band.slot_positions().contiguous())
    for column in band._columns():
        if isinstance(column, Column) and column.data.shape[1] < band.used + room:
            column.reserve(band.used + room, min(band.used, column.data.shape[1]))


def _free_slot(band: Band) -> None:
    """A full window needs one slot for the newest token, and knows each token's position from now on."""
    if band.room < 1:
        band.reserve(band.used + 1, 1)
    if band.positions is None:
        band._renew()
        band.positions = Column(band.slot_positions().contiguous())
        band.positions.reserve(band.used + band.room, band.used)
    spare = band.capacity
    if spare > band.used + 1:  # one slot is all that a window ever uses
        band._renew()
        for column in band._columns():
            assert isinstance(column, Column)
            column.data = column.data[:, : band.used + 1].contiguous()
