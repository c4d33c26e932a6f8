"""Columns as a captured decode step sees them: fixed addresses, counts on the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.attention import decoding
from foveate.attention.coded import CodedSide
from foveate.cache.column import Column, Counts, LowBit, PackedColumn


class FixedColumn:
    """An exact column: slot i holds token i."""

    counters: Sequence[Tensor] = ()
    """What a step counts on the device."""

    def __init__(self, column: Column) -> None:
        self.column, self.data = column, column.data

    @property
    def moved(self) -> bool:
        """It lies elsewhere now."""
        return self.column.data is not self.data

    def room(self, lengths: Counts, used: int) -> int:
        """Tokens that can come before it has to grow."""
        return self.data.shape[1] - used

    def arrival(self) -> tuple[Any, ...] | None:
        """What the kernel through which tokens arrive in packed stores has to know of it; None if it knows no such."""
        return (self.data,)

    def write(self, x: Tensor, slot: Tensor, pair: Tensor) -> None:
        """One token of each pair: x [P, D], to slot [P]."""
        self.data[pair, slot] = x

    def read(self, slots: int) -> Tensor:
        """The first `slots` slots [P, slots, D]; behind the end of a pair there is anything finite."""
        return self.data[:, :slots]

    def settle(self, lengths: Tensor, pair: Tensor, rehearsing: bool) -> None:
        """What a step does when it has attended; one that rehearses must be able to do so again."""

    def arrived(self, lengths: Counts) -> None:
        """What the host does behind a replayed step."""

    def refresh(self, lengths: Counts) -> None:
        """Take over the host's counts."""


class FixedPacked:
    """A packed body and an exact tail.

    A side that packs token by token does so within the step: what it packed stays in the tail, too, rounded as it will
    be read, until the host moves the tail on. A side that packs whole groups waits for the host, which knows without a
    look at the device when one is complete. Both move nothing that a recorded step knows the address of.

    Where a kernel takes tokens in (`arrival`), it packs as well, and rounds what stays in the tail when the next token
    comes: nobody reads it before.
    """

    def __init__(self, column: PackedColumn, lengths: Counts, room: int, device: torch.device) -> None:
        column.provide(lengths, room)
        self.column, self.tail, self.body = column, column.tail.data, column.body
        self.single = not column.closed and column.side.flush == 1
        self.counters = torch.zeros(2, len(column.packed), dtype=torch.int32, device=device).unbind(0)
        self.start, self.packed = self.counters
        """Token in the tail's first slot, and the first that is not in the body, int32 [P]."""
        self.refresh(lengths)

    @property
    def moved(self) -> bool:
        same = self.column.tail.data is self.tail and len(self.column.body) == len(self.body)
        return not same or any(a is not b for a, b in zip(self.column.body, self.body, strict=True))

    def low_bit(self, per_channel: bool) -> tuple[Tensor | int, ...] | None:
        """Codes, scale, zero point, tail, packed tokens, bits and group, as the kernel for few bits reads them; None
        where the side holds something else."""
        form: LowBit | None = getattr(self.column.side, "low_bit", None)
        if form is None or form.per_channel != per_channel:
            return None
        group = self.column.rates[1] if per_channel else self.tail.shape[2] // self.body[1].shape[2]
        return (*self.body, self.tail, self.start, form.bits, group)

    def thin(self) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        """Body, its channels, tail and packed tokens, as the kernel for keys that lost channels reads them; None where
        the side holds something else."""
        channels = getattr(self.column.side, "channels", None)
        if channels is None or not self.column.closed or not self.body:
            return None
        return self.body[0], channels(*self.column.fitted), self.tail, self.start

    def coded(self) -> CodedSide | None:
        """Codes, tail and packed tokens, as the kernel for components in a basis reads them; None where the side holds
        something else."""
        known = getattr(self.column.side, "coded", None)
        if known is None or not self.body:
            return None
        return CodedSide(self.body[0], self.tail, self.start, *known(self.column.dtype, *self.column.fitted))

    def arrival(self) -> tuple[Any, ...] | None:
        """See `FixedColumn.arrival`: where whole groups are packed between steps, the tail alone."""
        if not self.single:
            return self.tail, self.start
        form: LowBit | None = getattr(self.column.side, "low_bit", None)
        if form is None or form.per_channel:
            return None
        group = self.tail.shape[2] // self.body[1].shape[2]
        exact = self.column.side.tail
        if not decoding.packs(form.bits, group, exact):
            return None
        return self.tail, self.start, self.packed, *self.body, form.bits, group, exact

    def room(self, lengths: Counts, used: int) -> int:
        if self.column.closed:
            return self.column.room(lengths, used)
        return min(t.shape[1] * rate for t, rate in zip(self.body, self.column.rates, strict=True)) - used

    def write(self, x: Tensor, slot: Tensor, pair: Tensor) -> None:
        self.tail[pair, slot - self.start] = x

    def read(self, slots: int) -> Tensor:
        if not self.body and not self.column.packed.any():
            return F.pad(self.tail, (0, 0, 0, max(0, slots - self.tail.shape[1])))[:, :slots]
        body = self.column.unpacked()[:, :slots]
        out = F.pad(body, (0, 0, 0, slots + 1 - body.shape[1]))
        here = torch.arange(self.tail.shape[1], device=out.device) + self.start[:, None]
        where = here.clamp_max(slots).unsqueeze(-1).expand(-1, -1, out.shape[2])
        return out.scatter_(1, where.long(), self.tail)[:, :slots]

    def settle(self, lengths: Tensor, pair: Tensor, rehearsing: bool) -> None:
        if not self.single:
            return
        column = self.column
        due = lengths - self.packed > column.side.tail
        slot = (self.packed - self.start).clamp(0, self.tail.shape[1] - 1).long()
        exact = self.tail[pair, slot].unsqueeze(1)
        fresh = column.side.pack(exact, *column.fitted)
        for held, new in zip(self.body, fresh, strict=True):
            held[pair, self.packed.long()] = new[:, 0]
        rounded = column.side.unpack(fresh, column.dtype, *column.fitted)
        self.tail[pair, slot] = torch.where(due[:, None, None], exact if rehearsing else rounded, exact)[:, 0]
        self.packed += due

    def arrived(self, lengths: Counts) -> None:
        column = self.column
        before = column.packed
        if self.single:
            column.packed = before + column.due(lengths)
        elif not column.closed and column.due(lengths).any():
            column.settle(lengths)
        full = not column.closed and column.room(lengths, 0) < 1
        if full or (not self.single and column.packed is not before):
            self.refresh(lengths)

    def refresh(self, lengths: Counts) -> None:
        column = self.column
        if (column.start < column.packed).any():
            column.to_front(lengths)
        for there, here in ((self.start, column.start), (self.packed, column.packed)):
            there.copy_(torch.from_numpy(here.astype(np.int32)))


AnyFixed = FixedColumn | FixedPacked
