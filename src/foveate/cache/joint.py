"""Tokens that several layers hold together: one vector per token for all of them, and a matrix per layer that makes the
layer's own keys or values of it."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from foveate.cache.column import Column, Counts, PackedColumn
from foveate.cache.store import Store


class JointSide(Protocol):
    """How one side (keys or values) of several layers is held together."""

    def pack(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens x [n, W] of one row, the heads of all layers side by side, float32 -> a [n, r] and b [r, W] whose
        product stands for them. r follows from n and W alone."""
        ...


class Rope(Protocol):
    """Turns rotated x [B, H, n, D] by delta [B, n] positions."""

    def move(self, x: Tensor, delta: Tensor) -> Tensor: ...


class Basis:
    """The vectors [B, n, r] that layers share. They are never changed; the same rows asked for again are one object as
    long as somebody holds them, so that layers that are copied one by one go on sharing."""

    def __init__(self, data: Tensor) -> None:
        self.data = data
        self._copy: tuple[tuple[int, ...], weakref.ref[Basis]] | None = None

    def pick(self, rows: Sequence[int]) -> Basis:
        """Rows taken (and repeated) in the order given."""
        wanted = tuple(rows)
        if wanted == tuple(range(len(self.data))):
            return self
        found = self._copy[1]() if self._copy is not None and self._copy[0] == wanted else None
        if found is None:
            index = torch.tensor(wanted, dtype=torch.int64, device=self.data.device)
            found = Basis(self.data.index_select(0, index))
            self._copy = (wanted, weakref.ref(found))
        return found


class JointColumn(PackedColumn):
    """One layer's part of what its group holds together, and an exact tail of whatever comes later.

    Args:
        tail: exact tokens [P, n, D] behind those that are held together; P = B * heads, row by row.
        basis: shared by the layers of the group on one device; first: whether this layer counts it.
        mix: [B, r, heads * w]: makes the first w channels of each token of each head.
        rest: [P, n, D - w], the other channels, exact.
        packed: tokens of each pair that are held together.
        rope: turns those channels from position 0 to where the tokens stand (slot = position); None: they stand there.
    """

    def __init__(
        self, tail: Column, basis: Basis, mix: Tensor, rest: Tensor, packed: Counts, heads: int, first: bool,
        rope: Rope | None,
    ) -> None:  # fmt: skip
        side: Any = None  # nothing is packed any more
        super().__init__(tail, side, tail.data.dtype)
        self.basis, self.mix, self.rest, self.heads, self.first, self.rope = basis, mix, rest, heads, first, rope
        self.packed, self.start, self.closed = packed, packed, True

    @property
    def nbytes(self) -> int:
        held = [self.mix, self.rest, *([self.basis.data] if self.first else [])]
        return self.tail.nbytes + sum(t.numel() * t.element_size() for t in held)

    def unpacked(self, tokens: int | None = None) -> Tensor:
        n = int(self.packed.max()) if tokens is None else tokens
        made = (self.basis.data[:, :n] @ self.mix).unflatten(2, (self.heads, -1)).transpose(1, 2)
        if self.rope is not None:
            made = self.rope.move(made, torch.arange(n, device=made.device).unsqueeze(0))
        made = made.flatten(0, 1)
        return torch.cat([made, self.rest[:, :n]], dim=-1) if self.rest.shape[-1] else made

    def pick(self, pairs: Tensor) -> JointColumn:
        rows = pairs[:: self.heads] // self.heads
        assert torch.equal(pairs.view(-1, self.heads) // self.heads, rows[:, None].expand(-1, self.heads)), "whole rows"
        basis, mix = self.basis.pick(rows.tolist()), self.mix.index_select(0, rows)
        packed = self.packed[pairs.cpu().numpy()]
        rest = self.rest.index_select(0, pairs)
        return JointColumn(self.tail.pick(pairs), basis, mix, rest, packed, self.heads, self.first, self.rope)

    def truncate(self, lengths: Counts) -> None:
        """What is cut off the tokens held together is not looked at again, and later tokens are exact."""
        self.packed = np.minimum(self.packed, lengths)
        self.start = self.packed


def hold_together(stores: Sequence[Store], keys: JointSide | None, values: JointSide | None, rope: Rope | None) -> None:
    """Hold the prompt of several layers as the sides say; a side of None stays as it is.

    The tokens are those that the last layer holds; others behind them stay exact. Nothing was evicted. Under MLA `keys`
    holds the latents, which serve as values too, and leaves the rotated channels beside them exact.

    Args:
        rope: keys are held without their positions and turned to them when they are read.
    """
    counts = stores[-1].lengths[:, 0]
    made: list[list[JointColumn | None]] = []
    for side, of_keys in ((keys, True), (values, False)):
        if side is None:
            made.append([None] * len(stores))
            continue
        turn = rope if of_keys else None
        parts = [_side_by_side(store, of_keys, counts, turn) for store in stores]
        packed = [side.pack(row) for row in torch.cat([part.to(parts[0].device) for part in parts], dim=2)]
        dtype = stores[0].bands[0].keys().dtype
        basis = torch.stack([a for a, _ in packed]).to(dtype)
        mixes = torch.stack([b for _, b in packed]).to(dtype).split([part.shape[2] for part in parts], dim=2)
        bases: dict[torch.device, Basis] = {}  # layers may lie on several devices; each of these has a copy
        columns: list[JointColumn | None] = []
        for store, mix, part in zip(stores, mixes, parts, strict=True):
            first = part.device not in bases
            if first:
                bases[part.device] = Basis(basis.to(part.device))
            columns.append(_column(store, of_keys, counts, bases[part.device], mix.to(part.device), turn, first))
        made.append(columns)
    for store, k, v in zip(stores, *made, strict=True):
        (band,) = store.bands
        band.swap(k or band.k, v or band.v)


def _side_by_side(store: Store, of_keys: bool, counts: Counts, rope: Rope | None) -> Tensor:
    """The first counts[b] tokens of each row, heads side by side, zeros behind: [B, n, heads * w], at least float32."""
    (band,) = store.bands
    assert band.positions is None, "tokens were evicted"
    x = (band.keys() if of_keys else band.values())[:, : int(counts.max())]
    x = x[..., : band.value_dim] if band.v is None else x
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if rope is not None:
        x = rope.move(x.unsqueeze(0), -torch.arange(x.shape[1], device=x.device).unsqueeze(0))[0]
    x = x.unflatten(0, (-1, store.spec.heads)).transpose(1, 2).flatten(2)
    there = torch.arange(x.shape[1]) < torch.from_numpy(counts)[:, None]
    return x.masked_fill(~there.to(x.device).unsqueeze(-1), 0.0)


def _column(
    store: Store, of_keys: bool, counts: Counts, basis: Basis, mix: Tensor, rope: Rope | None, first: bool
) -> JointColumn:
    (band,) = store.bands
    x, heads = band.keys() if of_keys else band.values(), store.spec.heads
    packed = counts.repeat(heads)
    left, width = band.lengths - packed, mix.shape[2] // heads
    tail = x.new_zeros(x.shape[0], int(left.max()), x.shape[2])
    for i in left.nonzero()[0]:
        tail[i, : left[i]] = x[i, packed[i] : packed[i] + left[i]]
    rest = x[:, : int(counts.max()), width:].clone()
    return JointColumn(Column(tail), basis, mix.contiguous(), rest, packed, heads, first, rope)
