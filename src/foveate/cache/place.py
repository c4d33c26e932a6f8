"""Tokens in two places: what is needed at every step on the model's device, the rest in the host's memory."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from foveate.attention.sent import sent
from foveate.cache.column import SPARE, Column, Counts, PackedColumn

HOST = torch.device("cpu")


@dataclass(frozen=True)
class Place:
    """Which tokens of a layer leave the model's device. Those behind the first `sink` go, oldest first.

    What lies on the host is attended there: queries go out, outputs and lse come back, and one softmax is merged from
    both parts.

    Args:
        sink: first slots of each head that stay.
        recent: at most this many of the others stay, the newest.
        block: tokens leave in whole blocks of this many.
        steady: tokens leave whenever there are too many on the device, in the prompt and behind it. False: once, when
            the prompt is over; later tokens stay, and heads with a window, whose tokens come and go, stay as a whole.
        limit: tokens of a row that both places together can take; a forward that brings more is refused. None: no end.
        device: where they go.
    """

    sink: int = 0
    recent: int = 0
    block: int = 1
    steady: bool = False
    limit: int | None = None
    device: torch.device = field(default=HOST)

    def away(self, lengths: Counts) -> Counts:
        """Tokens that belong on the host, for pairs that hold so many."""
        behind = np.maximum(lengths - self.sink, 0)
        due = np.maximum(behind - self.recent, 0)
        return np.minimum(-(-due // self.block), behind // self.block) * self.block


class PlacedColumn:
    """A column in two places, with the surface of a `Column`: slots sink..sink + away[p] of pair p lie on the host, one
    behind the other; those around them on the device, without a gap."""

    def __init__(self, near: Column, place: Place) -> None:
        self.near, self.place = near, place
        self.far = Column(near.data.new_zeros((near.data.shape[0], 0, *near.data.shape[2:]), device=place.device))
        self.away = np.zeros(near.data.shape[0], dtype=np.int64)
        """Tokens of each pair that lie on the host. Never changed in place."""

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return self.near.nbytes

    @property
    def host_nbytes(self) -> int:
        return self.far.nbytes

    def send(self, away: Counts, lengths: Counts) -> None:
        """Bring the tokens on the host to away[p] of the pairs' lengths[p]; what is there already stays there."""
        away = np.maximum(away, self.away)
        due = away - self.away
        if not due.any():
            return
        sink, old, need = self.place.sink, self.near.data, int(away.max())
        if self.far.data.shape[1] < need:
            spare = 0 if not self.away.any() else max(SPARE, need // 16)
            self.far.reserve(need + spare, int(self.away.max()))
        for amount in np.unique(due[due > 0]):
            pairs = np.nonzero(due == amount)[0]
            if len(pairs) == len(due) and (self.away == self.away[0]).all():
                self.far.write_level(old[:, sink : sink + amount].to(self.far.data.device), int(self.away[0]))
                continue
            leaving = old[sent(pairs, old.device), sink : sink + amount].to(self.far.data.device)
            slots = torch.from_numpy(self.away[pairs])[:, None] + torch.arange(amount)
            at = torch.from_numpy(pairs)[:, None]
            self.far.data[at.to(self.far.data.device), slots.to(self.far.data.device)] = leaving
        # What stays closes the gap, in a buffer of its own size.
        width = int((lengths - away).max())
        slot = torch.arange(width, device=old.device).expand(len(due), -1)
        source = torch.where(slot < sink, slot, slot + sent(due, old.device)[:, None])
        self.near.gather(source.clamp_max(old.shape[1] - 1), width + SPARE)
        self.away = away

    def read(self, used: int, first: int = 0) -> Tensor:
        """Slots first..used - 1 of every pair, on the device: [P, used - first, ...], a transient copy."""
        away, sink, near = self.away, self.place.sink, self.near.data
        if not away.any():
            return near[:, first:used]
        if (away == away[0]).all():
            same = int(away[0])
            if first >= sink + same:
                return near[:, first - same : used - same]
            far = self.far.data[:, :same].to(near.device)
            return torch.cat([near[:, :sink], far, near[:, sink : used - same]], dim=1)[:, first:]
        count = sent(away, near.device)[:, None]
        slot = torch.arange(first, used, device=near.device)
        on_host = (slot >= sink) & (slot < sink + count)
        local = torch.where(slot < sink, slot, slot - count).clamp(0, near.shape[1] - 1)
        source = torch.where(on_host, near.shape[1] + slot - sink, local)
        both = torch.cat([near, self.far.data[:, : int(away.max())].to(near.device)], dim=1)
        return both.gather(1, _wide(source, both))

    def reserve(self, capacity: int, used: int, coming: int = 0, lengths: Counts | None = None) -> None:
        """`capacity` and `used` are slots; the device needs those that are not away, what comes, and few to spare."""
        here = int(((used if lengths is None else lengths) - self.away).max(initial=0))
        spare = max(coming, min(capacity - used, SPARE))
        self.near.reserve(max(here + spare, self.near.data.shape[1]), min(here, self.near.data.shape[1]))

    def room(self, lengths: Counts, used: int) -> int:
        return self.near.data.shape[1] - int((lengths - self.away).max(initial=0))

    def write(self, x: Tensor, starts: Counts, counts: Counts | None) -> None:
        self.near.write(x, starts - self.away, counts)

    def write_level(self, x: Tensor, first: int) -> None:
        self.near.write(x, first - self.away, None)

    def gather(self, index: Tensor, capacity: int) -> None:
        """Keep slots index [P, n] in that order; all of them are on the device then."""
        used = int(index.max()) + 1 if index.numel() else 0
        host = PlacedColumn(Column(self.near.data.to(self.far.data.device), self.near.fill), self.place)
        host.far, host.away = self.far, self.away
        kept = Column(host.read(used), self.near.fill)  # put together on the host: it may not fit the device
        kept.gather(index.to(kept.data.device), capacity)
        self.__init__(Column(kept.data.to(self.near.data.device), self.near.fill), self.place)

    def move(self, target: Tensor, source: Tensor, pairs: Tensor) -> None:
        """Slot source[i] of pair pairs[i], its last, takes slot target[i]."""
        to, at, pair = (x.cpu().long() for x in (target, source, pairs))
        away, sink = torch.from_numpy(self.away)[pair], self.place.sink
        near, far = self.near.data, self.far.data
        from_far, to_far = ((x >= sink) & (x < sink + away) for x in (at, to))
        here = torch.where(at < sink, at, at - away).masked_fill(from_far, 0).to(near.device)
        value = near[pair.to(near.device), here]
        if from_far.any():
            last = far[pair[from_far].to(far.device), (at - sink)[from_far].to(far.device)]
            value[from_far.to(near.device)] = last.to(near.device)
        local = torch.where(to < sink, to, to - away)[~to_far].to(near.device)
        near[pair[~to_far].to(near.device), local] = value[(~to_far).to(near.device)]
        if to_far.any():
            gone = value[to_far.to(near.device)].to(far.device)
            far[pair[to_far].to(far.device), (to - sink)[to_far].to(far.device)] = gone
        if from_far.any():
            left = self.away.copy()
            left[pair[from_far].numpy()] -= 1
            self.away = left

    def pick(self, pairs: Tensor) -> PlacedColumn:
        new = PlacedColumn(self.near.pick(pairs), self.place)
        new.far, new.away = self.far.pick(pairs.to(self.far.data.device)), self.away[pairs.cpu().numpy()]
        return new

    def truncate(self, lengths: Counts) -> None:
        """Tokens on the host that lie behind lengths[p] are forgotten."""
        self.away = np.minimum(self.away, np.maximum(lengths - self.place.sink, 0))


AnyColumn = Column | PackedColumn | PlacedColumn


def slots(column: AnyColumn, used: int, first: int) -> Tensor:
    """Slots first..used - 1 of any column, on the device."""
    return column.read(used, first) if isinstance(column, PlacedColumn) else column.read(used)[:, first:]


def placed(column: AnyColumn, place: Place, away: Counts, lengths: Counts) -> PlacedColumn:
    """A column of which away[p] tokens lie on the host."""
    assert not isinstance(column, PackedColumn), "what is packed stays where it is"
    column = PlacedColumn(column, place) if isinstance(column, Column) else column
    column.send(away, lengths)
    return column


def recalled(column: AnyColumn, used: int) -> AnyColumn:
    """A column that is on the device as a whole."""
    return Column(column.read(used).clone(), column.near.fill) if isinstance(column, PlacedColumn) else column


def _wide(index: Tensor, x: Tensor) -> Tensor:
    """An index [P, n] for x [P, C, ...] along its slots."""
    return index.view(*index.shape, *[1] * (x.dim() - 2)).expand(-1, -1, *x.shape[2:])
