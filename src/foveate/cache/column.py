"""One growable value per slot: keys, values, positions and tags are all columns, exact or packed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from foveate.attention.sent import sent

SPARE = 16
"""Tokens that a growing column finds room for beyond what it needs, so that growing is not done per token."""

Counts = np.ndarray
"""Host counts, int64 [P]: one per (row, store head) pair."""


class Side(Protocol):
    """How one side (keys or values) is held once it left the exact tail.

    `pack` may be called with any number of tokens that is a multiple of `unit`; packed tensors carry tokens on
    dimension 1 at a rate of one row per `rows(tensor)` tokens, so that they grow and are cut like any column.

    A side whose form depends on the tokens it will hold has a method `fit` besides (see `FittedSide`); what that
    returns is handed to `pack` and `unpack` behind their arguments. A side that differs from kv head to kv head states
    `per_head` = True: the number of each pair's head, int16 [P], is then handed over before that. A side whose packed
    tensor holds some channels of the tokens as they came has a method `channels`: (what it was fitted to) -> which
    these are, int16 [P, kept]; those that are missing unpack to 0. A side whose one packed tensor is rows of bits
    that stand for components in a basis has a method `coded`: (dtype, what it was fitted to) -> heads, first tokens and
    coding, as `attention.coded.CodedSide` has them.
    """

    @property
    def tail(self) -> int:
        """Newest tokens that are never packed (KIVI's values: R)."""
        ...

    @property
    def flush(self) -> int:
        """Tokens leave the tail in units of this many (KIVI's keys: R; its values: 1). 0: all that may leave it do so
        when the prompt is over, and none later."""
        ...

    @property
    def unit(self) -> int:
        """Tokens that share one packed row of some tensor: the packed body is cut only at multiples of it."""
        ...

    @property
    def pack(self) -> Callable[..., tuple[Tensor, ...]]:
        """([P, n, D] exact) -> tensors [P, n or n / unit, ...]."""
        ...

    @property
    def unpack(self) -> Callable[..., Tensor]:
        """Inverse of `pack`: (tensors, dtype) -> [P, n, D] in this dtype."""
        ...


class LowBit(NamedTuple):
    """What a side states as `low_bit` if its body is codes, scales and zero points in the layout of the decode kernel.

    Args:
        bits: of a code: 2, 4 or 8.
        per_channel: tokens share a scale, channel by channel; False: channels of a token do.
    """

    bits: int
    per_channel: bool


class Observed(NamedTuple):
    """The prompt's last queries, as far as somebody needs them (`Needs.window`), right-aligned.

    Args:
        q: [P, G, W, D], of the query heads of each pair.
        real: bool [P, W]; prompts may be shorter than the window.
    """

    q: Tensor
    real: Tensor


class FittedSide(Side, Protocol):
    """A side that looks at what it will hold before anything is packed."""

    def fit(self, x: Tensor, lengths: Tensor, observed: Observed | None) -> tuple[Tensor, ...]:
        """Tensors [P, ...] that decide how each pair is packed, from its tokens x [P, n, D], of which lengths [P] are
        real; they are held (and counted) with the pair for good."""
        ...


def fitted(
    side: Side, x: Tensor, lengths: Tensor, observed: Observed | None, heads: Tensor | None = None
) -> tuple[Tensor, ...]:
    """What a side learns from the tokens, behind the numbers of the pairs' kv heads [P] if it differs between them;
    nothing for sides that are the same for all."""
    fit = getattr(side, "fit", None)
    learned = () if fit is None else fit(x, lengths, observed)
    return (heads.to(torch.int16), *learned) if heads is not None and getattr(side, "per_head", False) else learned


def slot_index(starts: Counts, counts: Counts) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Coordinates (pair, slot, token) of appending `counts` tokens behind `starts`."""
    width = int(counts.max(initial=0))
    token = np.arange(width)
    pair, column = np.nonzero(token[None, :] < counts[:, None])
    return pair, starts[pair] + column, column


class Column:
    """A tensor [P, C, ...] of which pair p uses the first slots. It knows no lengths: its band does."""

    def __init__(self, data: Tensor, fill: float = 0.0) -> None:
        self.data, self.fill = data, fill

    @property
    def nbytes(self) -> int:
        return self.data.numel() * self.data.element_size()

    def reserve(self, capacity: int, used: int, coming: int = 0, lengths: Counts | None = None) -> None:
        """Grow to `capacity` slots, keeping the first `used`; `coming` of the others are about to be written.

        Args:
            lengths: slots in use by each pair; None: `used` by all.
        """
        if capacity == self.data.shape[1]:
            return
        new = self.data.new_full((self.data.shape[0], capacity, *self.data.shape[2:]), self.fill)
        new[:, :used] = self.data[:, :used]
        self.data = new

    def write(self, x: Tensor, starts: Counts, counts: Counts | None) -> None:
        """Write x [P, N, ...]: the first counts[p] of its tokens (None: all) behind slot starts[p]."""
        if counts is None:
            counts = np.full(len(starts), x.shape[1])
        first = int(starts[0])
        if (counts == x.shape[1]).all() and (starts == first).all():
            self.write_level(x, first)
            return
        # Slots that become readable through longer pairs hold nothing of old in shorter ones.
        self.data[:, int(starts.max()) : int((starts + counts).max())] = self.fill
        pair, slot, token = (sent(i, self.data.device) for i in slot_index(starts, counts))
        self.data[pair, slot] = x[pair, token].to(self.data.dtype)

    def write_level(self, x: Tensor, first: int) -> None:
        """Write x [P, N, ...] behind slot `first` of every pair."""
        self.data[:, first : first + x.shape[1]] = x

    def read(self, used: int) -> Tensor:
        """The first `used` slots [P, used, ...]; a view."""
        return self.data[:, :used]

    def gather(self, index: Tensor, capacity: int) -> None:
        """Keep slots index [P, n] in that order, in a fresh tensor of `capacity` slots."""
        tail = self.data.shape[2:]
        new = self.data.new_full((self.data.shape[0], capacity, *tail), self.fill)
        new[:, : index.shape[1]] = self.data.gather(1, index.view(*index.shape, *[1] * len(tail)).expand(-1, -1, *tail))
        self.data = new

    def move(self, target: Tensor, source: Tensor, pairs: Tensor) -> None:
        """data[pairs, target] = data[pairs, source]: the newest token takes a freed slot."""
        self.data[pairs, target] = self.data[pairs, source]

    def pick(self, pairs: Tensor) -> Column:
        """A copy with pairs taken (and repeated) in the order given."""
        return Column(self.data.index_select(0, pairs), self.fill)

    def truncate(self, lengths: Counts) -> None:
        """Forget what lies behind lengths[p] (nothing to do: writing starts there again)."""

    def room(self, lengths: Counts, used: int) -> int:
        """Tokens that fit before the column must grow, for the fullest pair (it uses `used` slots)."""
        return self.data.shape[1] - used


class PackedColumn:
    """A packed body and an exact tail, with the surface of a `Column`.

    Slot 0 of the tail holds token start[p] of pair p. Between start[p] and packed[p] are tokens that the body holds by
    now: what is left moves to the front only when the tail has no room for the next ones.
    """

    def __init__(self, exact: Column, side: Side, dtype: torch.dtype, fitted: tuple[Tensor, ...] = ()) -> None:
        self.tail, self.side, self.dtype, self.fitted = exact, side, dtype, fitted
        self.body: tuple[Tensor, ...] = ()
        self.rates: tuple[int, ...] = ()
        """Tokens per packed row of each body tensor."""
        self.packed = np.zeros(exact.data.shape[0], dtype=np.int64)
        """Tokens of each pair that are in the body. Never changed in place."""
        self.start = self.packed
        """Tokens of each pair before the first of the tail. Never changed in place."""
        self.closed = False
        """Nothing is packed any more."""

    @property
    def nbytes(self) -> int:
        return self.tail.nbytes + sum(t.numel() * t.element_size() for t in (*self.body, *self.fitted))

    def due(self, lengths: Counts) -> Counts:
        """Tokens of each pair that the side's tail and flush rules release."""
        free = np.maximum(lengths - self.packed - self.side.tail, 0)
        unit = self.side.flush or self.side.unit
        return free // unit * unit

    def settle(self, lengths: Counts) -> None:
        """Pack every token that may leave the tail, and shrink the tail when the prompt has left it."""
        if self.closed:
            return
        self.closed = self.side.flush == 0
        due = self.due(lengths)
        if not due.any():
            return
        for amount in np.unique(due[due > 0]):
            self._pack(np.nonzero(due == amount)[0], int(amount))
        width = int((lengths - self.packed).max())
        # The tail never grows beyond its exact tokens and one flush, whatever the prompt left behind; what is no longer
        # than that stays where it is.
        room = most = width + SPARE
        if not self.closed:
            full = self.side.tail + max(self.side.flush, self._slack)
            room, most = min(room, max(width, full)), max(width, full) + SPARE
        if self.tail.data.shape[1] > most:
            self.to_front(lengths, room)
        elif width == 0:
            self.start = self.packed

    @property
    def _slack(self) -> int:
        """Slots of the tail for tokens that are packed by now, where they are packed one or a few at a time."""
        return SPARE if 0 < self.side.flush < SPARE else 0

    def to_front(self, lengths: Counts, capacity: int | None = None) -> None:
        """Move what is not packed to the front of the tail, or of a new one of `capacity` slots."""
        capacity = self.tail.data.shape[1] if capacity is None else capacity
        old, width = self.tail.data, int((lengths - self.packed).max(initial=0))
        kept = self._exact(width)
        if capacity == old.shape[1]:
            kept = kept.clone()
        if capacity != old.shape[1]:
            self.tail.data = old.new_zeros(old.shape[0], capacity, old.shape[-1])
        self.tail.data[:, :width] = kept
        self.start = self.packed

    def _exact(self, width: int) -> Tensor:
        """The first tokens of each pair that are not packed [P, width, D]; anything behind a pair's last."""
        gone, data = self.packed - self.start, self.tail.data
        if (gone == gone[0]).all() and int(gone[0]) + width <= data.shape[1]:
            return data[:, int(gone[0]) : int(gone[0]) + width]
        slot = sent(gone, data.device)[:, None] + torch.arange(width, device=data.device)
        slot = slot.clamp_max(data.shape[1] - 1)
        return data.gather(1, slot.unsqueeze(-1).expand(-1, -1, data.shape[-1]))

    def _pack(self, pairs: np.ndarray, amount: int) -> None:
        index, data = sent(pairs, self.tail.data.device), self.tail.data
        first = (self.packed - self.start)[pairs]
        if (first == first[0]).all():
            leaving = data[:, first[0] : first[0] + amount]
            leaving = leaving if len(pairs) == data.shape[0] else leaving[index]
        else:
            slot = sent(first, data.device)[:, None] + torch.arange(amount, device=data.device)
            leaving = data[index[:, None], slot]
        fresh = self.side.pack(leaving, *(t[index] for t in self.fitted))
        end = int(self.packed[pairs].max()) + amount
        often = bool(self.body) and self.body[0].shape[1] > 0 and self.side.flush < SPARE
        self._widen(fresh, amount, end, max(SPARE, end // 16) if often else 0)
        for held, new, rate in zip(self.body, fresh, self.rates, strict=True):
            starts = self.packed[pairs] // rate
            if (starts == starts[0]).all() and len(pairs) == held.shape[0]:
                held[:, starts[0] : starts[0] + new.shape[1]] = new
            else:
                slots = sent(starts, held.device)[:, None] + torch.arange(new.shape[1], device=held.device)
                held[index[:, None], slots] = new
        packed = self.packed.copy()
        packed[pairs] += amount
        self.packed = packed

    def _widen(self, like: tuple[Tensor, ...], amount: int, tokens: int, spare: int) -> None:
        """A body with room for so many tokens, and a few to spare if it has to grow; `like` are `amount` tokens."""
        if not self.body:
            self.body = tuple(t.new_zeros((len(self.packed), 0, *t.shape[2:])) for t in like)
            self.rates = tuple(amount // t.shape[1] for t in like)
        grown = []
        for held, rate in zip(self.body, self.rates, strict=True):
            need = tokens // rate
            if held.shape[1] < need:
                bigger = held.new_zeros((held.shape[0], need + spare // rate, *held.shape[2:]))
                bigger[:, : held.shape[1]] = held
                held = bigger
            grown.append(held)
        self.body = tuple(grown)

    def provide(self, lengths: Counts, room: int) -> None:
        """Room for `room` more tokens of each pair: in the body where tokens are packed, else in the tail."""
        if self.closed or self.side.flush == 0:
            most = int((lengths - self.start).max(initial=0))
            self.tail.reserve(max(self.tail.data.shape[1], most + room), min(most, self.tail.data.shape[1]))
            return
        like: tuple[Tensor, ...] = ()
        if not self.body:
            some = self.tail.data.new_zeros(self.tail.data.shape[0], self.side.unit, self.tail.data.shape[2])
            like = self.side.pack(some, *self.fitted)
        unit = self.side.unit
        self._widen(like, unit, -(-(int(lengths.max(initial=0)) + room) // unit) * unit, 0)
        exact = int((lengths - self.packed).max(initial=0))
        most = max(exact + 1, self.side.tail + max(self.side.flush, self._slack))
        if self.tail.data.shape[1] < most or self.room(lengths, 0) < 1:
            self.to_front(lengths, max(most, self.tail.data.shape[1]))

    def unpacked(self, tokens: int | None = None) -> Tensor:
        """The first tokens of the body [P, tokens, D]; None: all that it has room for."""
        if tokens is None:
            tokens = min((t.shape[1] * rate for t, rate in zip(self.body, self.rates, strict=True)), default=0)
        body = tuple(t[:, : tokens // rate] for t, rate in zip(self.body, self.rates, strict=True))
        return self.side.unpack(body, self.dtype, *self.fitted)

    def read(self, used: int) -> Tensor:
        """Unpacked tokens in slot order [P, used, D]: one layer's transient copy."""
        first = int(self.start[0])
        if not self.packed.any():
            return self.tail.read(used)
        body = self.unpacked(int(self.packed.max()))
        same = int(self.packed[0])
        if (self.packed == same).all() and (self.start == first).all():
            return torch.cat([body[:, :same], self.tail.data[:, same - first : used - first]], dim=1)
        out = body.new_zeros(body.shape[0], max(used, body.shape[1]), body.shape[2])
        out[:, : body.shape[1]] = body
        counts = np.minimum(used - self.packed, self.tail.data.shape[1] - self.packed + self.start)
        Column(out).write(self._exact(int(counts.max())), self.packed, counts)
        return out[:, :used]

    def reserve(self, capacity: int, used: int, coming: int = 0, lengths: Counts | None = None) -> None:
        """`capacity` and `used` are slots; the tail needs only what is not packed, what comes, and few spare slots."""
        counts = np.full(len(self.packed), used) if lengths is None else lengths
        exact, here = int((counts - self.packed).max(initial=0)), self.tail.data.shape[1]
        most = max(exact + max(coming, min(capacity - used, SPARE)), here)
        if (self.start < self.packed).any():
            self.to_front(counts, None if exact + coming <= here else most)
        else:
            self.tail.reserve(most, min(exact, here))

    def room(self, lengths: Counts, used: int) -> int:
        return self.tail.data.shape[1] - int((lengths - self.start).max(initial=0))

    def write(self, x: Tensor, starts: Counts, counts: Counts | None) -> None:
        self.tail.write(x, starts - self.start, counts)

    def write_level(self, x: Tensor, first: int) -> None:
        self.tail.write(x, first - self.start, None)

    def pick(self, pairs: Tensor) -> PackedColumn:
        held = tuple(t.index_select(0, pairs) for t in self.fitted)
        new = PackedColumn(self.tail.pick(pairs), self.side, self.dtype, held)
        new.body, new.rates = tuple(t.index_select(0, pairs) for t in self.body), self.rates
        local = pairs.cpu().numpy()
        new.packed, new.start, new.closed = self.packed[local], self.start[local], self.closed
        return new

    def truncate(self, lengths: Counts) -> None:
        """Packed groups that are cut open return to the tail (at packed precision)."""
        cut = self.packed > lengths
        if not cut.any():
            return
        keep = np.where(cut, lengths // self.side.unit * self.side.unit, self.packed)
        opened = self.packed - keep
        body = self.unpacked(int(self.packed.max()))
        width = int((lengths - keep).max())
        old = self.tail.data
        new = old.new_zeros(old.shape[0], max(width + 16, old.shape[1]), old.shape[2])
        for p in np.nonzero(cut)[0]:
            n = int(lengths[p] - keep[p])
            new[p, :n] = body[p, keep[p] : keep[p] + n]
        same = sent(np.nonzero(opened == 0)[0], old.device)
        new[same, : old.shape[1]] = old[same]
        self.tail.data, self.packed, self.start = new, keep, np.where(cut, keep, self.start)


def stack_index(lists: Sequence[np.ndarray], device: torch.device) -> Tensor:
    """Ragged host lists as one index [P, max], short ones padded with their last element (or 0)."""
    width = max((len(x) for x in lists), default=0)
    index = np.zeros((len(lists), width), dtype=np.int64)
    for i, x in enumerate(lists):
        index[i, : len(x)] = x
    return sent(index, device)
