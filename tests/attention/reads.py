"""Random reads: queries, keys, values, a selection and a geometry that could occur together in a cache."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from foveate.attention import ALL, Geometry, Partial, Selection, Span, attend, reference


@dataclass
class Read:
    """The arguments of one attention call."""

    q: Tensor
    k: Tensor
    v: Tensor
    selection: Selection = ALL
    geometry: Geometry | None = None
    visible: tuple[Span, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)

    def attend(self, dtype: torch.dtype | None = None, **options: Any) -> Partial:
        q, k, v = (self.q, self.k, self.v) if dtype is None else (x.to(dtype) for x in (self.q, self.k, self.v))
        return attend(q, k, v, self.selection, self.geometry, visible=self.visible, **self.options, **options)

    def truth(self, dtype: torch.dtype | None = None) -> Partial:
        """The reference in float64, for inputs rounded to `dtype`."""
        q, k, v = ((x if dtype is None else x.to(dtype)).double() for x in (self.q, self.k, self.v))
        return reference(q, k, v, self.selection, self.geometry, visible=self.visible, **self.options)

    @property
    def heads(self) -> int:
        return self.q.shape[1]

    def places(self) -> Geometry:
        return self.geometry or Geometry(self.q.shape[0], self.q.shape[2], self.k.shape[2])


def tensors(
    batch: int, heads: int, k_heads: int, queries: int, keys: int, k_dim: int, v_dim: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v in float64; queries are large enough for attention to be uneven."""
    q = 2 * torch.randn(batch, heads, queries, k_dim, dtype=torch.float64)
    k = torch.randn(batch, k_heads, keys, k_dim, dtype=torch.float64)
    return q, k, torch.randn(batch, k_heads, keys, v_dim or k_dim, dtype=torch.float64)


def random_lists(rng: random.Random, shape: tuple[int, int, int], blocks: int, width: int) -> Tensor:
    """Ascending, unique block numbers, -1 behind them; empty lists occur."""
    lists = torch.full((*shape, width), -1, dtype=torch.int32)
    for one in lists.view(-1, width) if width else []:
        count = rng.randint(0, min(width, blocks))
        one[:count] = torch.tensor(sorted(rng.sample(range(blocks), count)), dtype=torch.int32)
    return lists


def random_span(rng: random.Random, store_heads: int) -> Span:
    def ints(low: int, high: int) -> int | Tensor:
        if rng.random() < 0.3:
            return torch.tensor([rng.randint(low, high) for _ in range(store_heads)])
        return rng.randint(low, high)

    kind = rng.randrange(6)
    if kind == 0:
        return Span()
    if kind == 1:
        return Span(beyond=ints(0, 60))
    if kind == 2:  # sinks far back, the other half of a read in two frames
        return Span(rng.randint(0, 9), 0, rng.randint(0, 90))
    if kind == 3:
        return Span(ints(0, 5), rng.randint(1, 40), ints(0, 20))
    return Span(ints(0, 5), ints(0, 40))


def random_selection(rng: random.Random, read: tuple[int, int, int, int, int]) -> Selection:
    batch, heads, k_heads, queries, keys = read
    if rng.random() < 0.15:
        return ALL
    if rng.random() < 0.3:
        return Selection(span=random_span(rng, k_heads))
    q_block = rng.choice([None, 1, 3, 16, 64])
    k_block = rng.choice([1, 4, 7, 16])
    blocks, lists = -(-keys // k_block), 1 if q_block is None else -(-queries // q_block)
    width = rng.choice([0, 1, 3, min(blocks, 40), min(blocks, 40) + 2])
    shape = (batch, rng.choice([1, k_heads, heads]), lists)
    span = random_span(rng, k_heads) if rng.random() < 0.5 else None
    return Selection(random_lists(rng, shape, blocks, width), q_block, k_block, span)


def random_geometry(rng: random.Random, read: tuple[int, int, int, int, int]) -> Geometry | None:
    """Plain, or rows and heads of their own length, or slots in no order of position."""
    batch, _, k_heads, queries, keys = read
    if rng.random() < 0.4:
        return None
    heads = rng.choice([1, k_heads])
    lengths: Tensor | None = torch.randint(max(1, keys - 20), keys + 1, (batch, heads))
    first: Tensor | None = lengths - queries
    if rng.random() < 0.3:  # rows with fewer new tokens than others: their last queries are padding
        first = torch.randint(-2, keys, (batch, heads))
    if rng.random() < 0.2:  # rows that hold little or nothing
        lengths = torch.randint(0, keys + 1, (batch, heads))
    if rng.random() < 0.2:
        first = None
    if rng.random() < 0.2:
        lengths = None
    q_positions = k_positions = None
    if rng.random() < 0.6:
        start = keys + torch.randint(0, 30, (batch,))
        q_positions = start.unsqueeze(1) + torch.arange(queries)
        if rng.random() < 0.6:
            begins = torch.full((batch, heads), keys - queries) if first is None else first
            k_positions = torch.stack([_held(int(start[b]), begins[b].tolist(), queries, keys) for b in range(batch)])
    return Geometry(batch, queries, keys, lengths, first, q_positions, k_positions)


def _held(start: int, begins: list[int], queries: int, keys: int) -> Tensor:
    """Positions of the slots of one row: older tokens in no order, then the new ones from `start` on."""
    rows = []
    for begin in begins:
        row = torch.randperm(start)[:keys]
        for i in range(queries):
            if 0 <= begin + i < keys:
                row[begin + i] = start + i
        rows.append(row)
    return torch.stack(rows)


def random_read(seed: int, *, options: bool = True) -> Read:
    """Everything at once, chosen by the seed."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    batch, k_heads, group = rng.choice([1, 2, 3]), rng.choice([1, 2, 3]), rng.choice([1, 3, 8])
    queries = rng.choice([1, 1, 2, 7, 63, 130])
    keys = queries + rng.choice([0, 0, 1, 5, 64, 200])
    k_dim = rng.choice([8, 24])
    v_dim = rng.choice([k_dim, k_dim, 16, 40, 8])
    shape = (batch, k_heads * group, k_heads, queries, keys)
    q, k, v = tensors(*shape, k_dim, v_dim)
    if v_dim <= k_dim and rng.random() < 0.3:
        v = k[..., :v_dim]
    read = Read(q, k, v, random_selection(rng, shape), random_geometry(rng, shape))
    read.visible = tuple(random_span(rng, k_heads) for _ in range(rng.choice([0, 0, 1, 2])))
    if options and rng.random() < 0.2:
        read.options["softcap"] = 3.0
    if options and rng.random() < 0.2:
        bias = (
            rng.choice([1, batch]),
            rng.choice([1, k_heads, shape[1]]),
            rng.choice([1, queries]),
            rng.choice([1, keys]),
        )
        read.options["bias"] = torch.randn(bias, dtype=torch.float64)
    if options and rng.random() < 0.2:
        read.options["scale"] = 0.2
    return read
