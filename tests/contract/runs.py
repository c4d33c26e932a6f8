"""Prompts and decode steps by plain forwards, and what a cache holds afterwards."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from foveate.cache import FoveateCache, View
from foveate.cache.band import GROWTH
from foveate.cache.remembered import state_tensors
from foveate.models.shape import ModelShape

EXACT = 1e-5
"""Relative RMS that float32 may show."""


class Run(NamedTuple):
    """Logits of a prompt [B, N, V] and of the decode steps behind it [B, n, V]."""

    prompt: Tensor
    steps: Tensor


def tokens(seed: int, *shape: int, vocab: int = 256) -> Tensor:
    """Random ids, none of them a special token."""
    return torch.randint(3, vocab, shape, generator=torch.Generator().manual_seed(seed))


def left_padded(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Rows [n_b] as one batch [B, N] with its mask."""
    width = max(len(row) for row in rows)
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for b, row in enumerate(rows):
        ids[b, width - len(row) :], mask[b, width - len(row) :] = row, 1
    return ids, mask


@torch.no_grad()
def forward(model: nn.Module, cache: FoveateCache, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """One forward of new ids [B, N]; mask [B, all columns so far and these] where there is padding."""
    extra: dict[str, Any] = {}
    if mask is not None:
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        extra = {"attention_mask": mask, "position_ids": positions[:, -ids.shape[1] :]}
    out = model(ids, past_key_values=cache, use_cache=True, **extra)
    assert out.past_key_values is cache
    return out.logits


def prompt(
    model: nn.Module, cache: FoveateCache, ids: Tensor, mask: Tensor | None = None, chunk: int | None = None
) -> Tensor:
    """An announced prompt, whole or in pieces."""
    before = cache.get_seq_length()
    cache.expect(ids.shape[1])
    pieces = []
    for start in range(0, ids.shape[1], chunk or ids.shape[1]):
        piece = ids[:, start : start + (chunk or ids.shape[1])]
        seen = None if mask is None else mask[:, : before + start + piece.shape[1]]
        pieces.append(forward(model, cache, piece, seen))
    return torch.cat(pieces, dim=1)


def decode(model: nn.Module, cache: FoveateCache, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Given tokens [B, n], one at a time."""
    steps = []
    for i in range(ids.shape[1]):
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        steps.append(forward(model, cache, ids[:, i : i + 1], mask))
    return torch.cat(steps, dim=1)


def run(
    model: nn.Module,
    cache: FoveateCache,
    ids: Tensor,
    then: Tensor,
    mask: Tensor | None = None,
    chunk: int | None = None,
) -> Run:
    """A prompt and decode steps."""
    first = prompt(model, cache, ids, mask, chunk)
    return Run(first, decode(model, cache, then, mask))


@torch.no_grad()
def plain(model: nn.Module, ids: Tensor, then: Tensor) -> Run:
    """The same by transformers alone: one forward over everything, nothing cached."""
    logits = model(torch.cat([ids, then], dim=1), use_cache=False).logits
    return Run(logits[:, : ids.shape[1]], logits[:, ids.shape[1] :])


def held(cache: FoveateCache, row: int) -> list[list[list[int]]]:
    """Positions that one row holds, by layer and store head, ascending."""
    layers = []
    for layer in cache.couriers():
        heads: list[list[int]] = [[] for _ in range(layer.store.spec.heads)]
        for band in layer.store.bands:
            positions = band.slot_positions()
            for i, pair in enumerate(band.pairs):
                b, head = divmod(int(pair), layer.store.spec.heads)
                if b == row:
                    heads[head] = sorted(positions[i, : int(band.lengths[i])].tolist())
        layers.append(heads)
    return layers


def dense_bytes(model: nn.Module, cache: FoveateCache) -> int:
    """What keys and values of this batch would weigh in transformers' cache, the model's own windows counted in."""
    first = next(iter(cache.couriers()))
    return ModelShape.of(model).dense_kv_bytes(first.columns, first.store.rows)


def spare_bytes(model: nn.Module, cache: FoveateCache) -> int:
    """One block of spare slots per row and head, with position and tags, and the head's number and length: what a
    growing cache may hold beside its budget."""
    shape = ModelShape.of(model)
    total = 0
    for layer in cache.couriers():
        beside = 4 + sum(tag.width * tag.dtype.itemsize for tag in layer.store.spec.tags.values())
        slot = shape.kv_bytes_per_slot(layer.index) + beside * layer.store.spec.heads
        total += layer.store.rows * (GROWTH * slot + layer.store.spec.heads * (8 + 4))
    return total


def assert_used(model: nn.Module, cache: Any, *, less: bool) -> None:
    """Our cache did the work, and holds less than a dense one where the method says so."""
    assert isinstance(cache, FoveateCache)
    for layer in cache.couriers():
        assert layer.columns and layer.store.bands, f"layer {layer.index} was served by somebody else"
        assert int(layer.store.seen.max()) <= layer.columns
    if less:
        dense = dense_bytes(model, cache)
        assert cache.nbytes < dense, f"holds {cache.nbytes} of {dense} bytes"


def state(cache: FoveateCache) -> dict[str, Tensor]:
    """Everything a cache holds, by name; slots behind the end of a row as zeros."""
    found: dict[str, Tensor] = {}
    for layer in cache.couriers():
        view = View(layer.store, np.zeros(layer.store.rows, dtype=np.int64))
        there = view.valid().unsqueeze(-1)
        values = {"k": view.k(), "v": view.v(), "positions": view.positions.unsqueeze(-1)}
        values |= {f"tag {name}": view.tag(name) for name in layer.store.spec.tags}
        found |= {f"{layer.index} {name}": x.masked_fill(~there, 0) for name, x in values.items()}
        found |= {f"{layer.index} blocks {name}": view.blocks(name) for name in layer.store.spec.blocks}
        found |= {f"{layer.index} mine {name}": x for name, x in state_tensors(layer.mine)}
        found[f"{layer.index} seen"] = view.seen
    return found | {f"shared {name}": x for name, x in state_tensors(cache.shared)}
