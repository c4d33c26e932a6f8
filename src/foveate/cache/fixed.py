"""A store as a captured decode step sees it: fixed addresses and shapes, lengths on the device.

The tensors are those of the store itself, so nothing is copied; what is here only says where the next token goes. One
step is the same sequence of device work whatever the lengths are, so it can be recorded once and replayed; the host's
own counts are brought up to date behind each replay (`FixedBand.arrived`).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from foveate.attention import Geometry, decoding
from foveate.cache.band import Band
from foveate.cache.column import Column
from foveate.cache.store import Store
from foveate.cache.view import View
from foveate.errors import Refused


class FixedBand:
    """A band whose every step appends one token to each pair.

    Where the band's window is full, the newest token overwrites the one that no query can see any more: the slots of
    the window are used in turn. Elsewhere it goes behind the last one.

    Args:
        band: what holds the tokens; it must have room for `room` more.
        room: steps that can be made.
        lengths: int32 [P], where it counts the slots in use.
        seen: int64 [P], where it counts tokens: the position of the next one.
        turn: int64 [P], where it counts those that a full window took.
    """

    def __init__(self, band: Band, room: int, lengths: Tensor, seen: Tensor, turn: Tensor) -> None:
        reason = refusal(band)
        if reason:
            raise Refused(reason)
        self.band, self.pairs, self.rows, self.index = band, band.pairs, band.rows, band.index
        self.heads, self.spans, self.declared = band.heads, (), band.declared
        self.cyclic = band.bounded
        if self.cyclic:
            _free_slot(band)
        elif band.room < room:
            band.reserve(band.used + room, room)
        _reserve_summaries(band)
        assert isinstance(band.k, Column) and (band.v is None or isinstance(band.v, Column))
        self.k, self.v, self.positions = band.k.data, None if band.v is None else band.v.data, band.positions
        self.used = int(self.k.shape[1])
        """Slots of every tensor: what is readable of them, the device knows."""
        self.even = False
        device = band.device
        self.pair = torch.arange(len(self.pairs), device=device)
        self.lengths, self.seen, self.turn = lengths, seen, turn
        self.ring = self._ring() if self.cyclic else None
        """Slots of the window in the order in which they are overwritten, int64 [P, W]."""
        self.steps = 0
        self.refresh()

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
        self.expected = self.band.used
        self.lengths.copy_(torch.from_numpy(self.band.lengths.astype(np.int32)))
        self.seen.copy_(torch.from_numpy(self.band.seen))

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
        moved = getattr(band.k, "data", None) is not self.k or band.positions is not self.positions
        if self.cyclic:
            return moved or band.used != self.expected
        return moved or band.room < 1

    @property
    def behind(self) -> bool:
        """The host counted tokens that came by another way."""
        return self.band.used != self.expected

    def arrived(self) -> None:
        """Count one replayed step on the host."""
        band = self.band
        if self.cyclic:
            self.steps += 1
            if self.steps == 1:
                band.lengths = band.lengths + 1
            band.seen = band.seen + 1
            band.floor = band.seen
        else:
            band._advance(1)
        self.expected = band.used

    # -- what a step does ---------------------------------------------------------------------------------------------

    def append(self, k: Tensor, v: Tensor | None) -> None:
        """One token of each pair: k [P, 1, Dk], v [P, 1, Dv]."""
        if self.ring is None:
            slot = self.lengths.long()
            self.lengths += 1
        else:
            slot = self.ring.gather(1, (self.turn % self.ring.shape[1]).unsqueeze(1))[:, 0]
            self.turn += 1
            self.lengths.fill_(self.used)
        self.k[self.pair, slot] = k[:, 0]
        if self.v is not None and v is not None:
            self.v[self.pair, slot] = v[:, 0]
        if self.positions is not None:
            self.positions.data[self.pair, slot] = self.seen.to(torch.int32)
        self.seen += 1
        self.note(slot)

    def note(self, slot: Tensor) -> None:
        """Tags and summaries of the newest tokens, which went to these slots [P]."""
        for tag in self.band.tags.values():
            tag.data[self.pair, slot] = tag.fill
        for name, spec in self.declared.items():
            block = slot // spec.size
            inside = block[:, None] * spec.size + torch.arange(spec.size, device=slot.device)
            valid = inside < self.lengths[:, None]
            where = inside.clamp_max(self.used - 1)
            keys = self.k[self.pair[:, None], where].unsqueeze(1)
            if self.v is None:
                values = keys[..., : self.band.value_dim]
            else:
                values = self.v[self.pair[:, None], where].unsqueeze(1)
            self.band.summaries[name][self.pair, block] = spec.fold(keys, values, valid.unsqueeze(1))[:, 0]

    def keys(self) -> Tensor:
        """[P, C, Dk]; behind the lengths there is anything finite."""
        return self.k

    def values(self, keys: Tensor | None = None) -> Tensor:
        """[P, C, Dv]."""
        return self.k[..., : self.band.value_dim] if self.v is None else self.v

    def device_lengths(self) -> Tensor:
        """int32 [P]."""
        return self.lengths

    def slot_positions(self) -> Tensor:
        """Logical position of each slot, int32 [P, C]."""
        if self.positions is None:
            return torch.arange(self.used, dtype=torch.int32, device=self.k.device).expand(len(self.pairs), -1)
        return self.positions.data

    def geometry(self, placed: bool) -> Geometry:
        """Where the one query of each pair and the held keys stand.

        Args:
            placed: whether the read depends on positions.
        """
        now = (self.seen - 1).unsqueeze(1) if placed else None
        slots = self.slot_positions().unsqueeze(1) if placed and self.positions is not None else None
        return Geometry(
            len(self.pairs), 1, self.used, self.lengths.unsqueeze(1), None, now, slots, device=self.k.device
        )


def refusal(band: Band) -> str:
    """Why one-token steps of this band cannot be recorded now; empty if they can."""
    if not isinstance(band.k, Column) or not (band.v is None or isinstance(band.v, Column)):
        return "a packed store moves tokens between its parts while it decodes"
    if band.bounded:
        windows = [s for s in band.spans if s.window is not None]
        if len(windows) > 1:
            return "several windows bound one head"
        if band.declared:
            return "a window's blocks change at both ends"
        if not band.even or band.used != int(windows[0].sink) + int(windows[0].window or 0) - 1:
            return "a window is not full yet"
    return ""


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


def _reserve_summaries(band: Band) -> None:
    """Room for the summaries of all blocks that the slots can hold."""
    slots = band.capacity
    for name, spec in band.declared.items():
        kept, blocks = band.summaries[name], -(-slots // spec.size)
        if kept.shape[1] < blocks:
            bigger = kept.new_zeros(kept.shape[0], blocks, kept.shape[2])
            bigger[:, : kept.shape[1]] = kept
            band.summaries[name] = bigger
            band._renew()


class FixedStore(Store):
    """A layer's store inside a captured step."""

    bands: list[FixedBand]  # type: ignore[assignment]

    def __init__(self, store: Store, room: int) -> None:
        self.spec, self.rows = store.spec, store.rows
        counts = [len(band.pairs) for band in store.bands]
        device = store.bands[0].device
        self.lengths_of_all = torch.zeros(sum(counts), dtype=torch.int32, device=device)
        """Slots in use by every pair, int32, band by band."""
        self.seen_of_all, self.turn_of_all = torch.zeros(2, sum(counts), dtype=torch.int64, device=device).unbind(0)
        parts = zip(*(x.split(counts) for x in (self.lengths_of_all, self.seen_of_all, self.turn_of_all)), strict=True)
        self.bands = [FixedBand(band, room, *part) for band, part in zip(store.bands, parts, strict=True)]
        self._kernels: decoding.Held | None = None
        self.whole = store.aligned and not any(band.bounded for band in store.bands)

    @property
    def aligned(self) -> bool:
        return self.whole

    @property
    def kernels(self) -> decoding.Held | None:
        """All bands as the kernels read and fill them, or None where there are no kernels for this device."""
        if self._kernels is None and decoding.serves(self.bands[0].k)[0]:
            self._kernels = decoding.held(
                [(b.keys(), b.values(), b.index) for b in self.bands],
                (self.lengths_of_all, self.seen_of_all, self.turn_of_all),
                [b.ring for b in self.bands],
                [None if b.positions is None else b.positions.data for b in self.bands],
            )
        return self._kernels

    def attend(self, q: Tensor, scale: float, softcap: float | None, sinks: Tensor | None) -> Tensor | None:
        """All that is held, of all bands in one launch, q [B, H, 1, Dk] -> [B, H, 1, Dv]; None where no kernel can."""
        kernels = self.kernels
        return None if kernels is None else kernels.attend(q, scale, softcap, sinks)

    def append(self, k: Tensor, v: Tensor | None, fresh: object = None) -> None:
        """Append one token of every row: k [B, Hs, 1, Dk], v [B, Hs, 1, Dv]."""
        kernels = self.kernels
        if kernels is not None:
            kernels.arrive(k, v)
            for band, slot in zip(self.bands, kernels.slots, strict=True):
                if band.tags or band.declared:
                    band.note(slot.long())
            return
        flat_k, flat_v = k.flatten(0, 1), None if v is None else v.flatten(0, 1)
        for band in self.bands:
            if len(band.pairs) == flat_k.shape[0]:
                band.append(flat_k, flat_v)
            else:
                band.append(flat_k[band.index], None if flat_v is None else flat_v[band.index])


class FixedView(View):
    """What a method sees of a layer inside a captured step: device values only, the newest token included."""

    def __init__(self, store: FixedStore) -> None:
        super().__init__(store, np.ones(store.rows, dtype=np.int64))
        self._fixed = store

    @property
    def lengths(self) -> Tensor:
        bands = [band.device_lengths().unsqueeze(1) for band in self._fixed.bands]
        return self._fixed.grid(bands, fill=0).squeeze(2)

    @property
    def fresh(self) -> Tensor:
        return torch.ones(self._fixed.rows, dtype=torch.int32, device=self._fixed.bands[0].index.device)

    @property
    def seen(self) -> Tensor:
        """Position of the next token, int64 [B]."""
        heads = self._fixed.spec.heads
        out = torch.empty(self._fixed.rows * heads, dtype=torch.int64, device=self._fixed.bands[0].index.device)
        for band in self._fixed.bands:
            out[band.index] = band.seen
        return out.view(-1, heads)[:, 0]

    @property
    def host_lengths(self) -> np.ndarray:
        raise Refused("a captured step knows no lengths on the host")

    @property
    def longest(self) -> int:
        raise Refused("a captured step knows no lengths on the host")
