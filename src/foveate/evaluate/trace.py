"""What a method computes, holds and reads on one prompt, recorded from the reads themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from foveate.attention import Geometry, Selection, Span
from foveate.attention.drawing import shares
from foveate.cache import Band
from foveate.engine.binding import Binding
from foveate.evaluate.batch import Batch
from foveate.models.shape import ModelShape

CELLS = 64
"""Rows and columns of a picture at most."""


class Trace:
    """One prompt under one method.

    Attributes:
        density: pairs computed inside the prompt over causal pairs, float64 [layers, heads]; NaN in layers that are not
            Foveate's.
        picture: share of causal pairs computed, [rows of queries, columns of keys], NaN in the future; of the layer and
            head that were asked for.
        held: which positions are held once the prompt is over, bool [layers, kv heads, tokens].
        read: which of them the next token reads, its own position behind, bool [layers, heads, tokens + 1].
        nbytes: held after that token; dense_nbytes: what dense keys and values of as many tokens take.
    """

    def __init__(self, shape: ModelShape, tokens: int, layer: int, head: int | None) -> None:
        heads = max(each.num_heads for each in shape.layers)
        stores = max(each.store_heads for each in shape.layers)
        self.shape, self.tokens, self.layer, self.head = shape, tokens, layer, head
        self.pairs = torch.zeros(shape.num_layers, heads, dtype=torch.float64)
        self.causal = torch.zeros(shape.num_layers, heads, dtype=torch.float64)
        self.held = torch.zeros(shape.num_layers, stores, tokens, dtype=torch.bool)
        self.read = torch.zeros(shape.num_layers, heads, tokens + 1, dtype=torch.bool)
        self.nbytes = 0
        self.dense_nbytes = shape.dense_kv_bytes(tokens + 1)
        self._cells: list[Tensor] = []

    @property
    def density(self) -> Tensor:
        return self.pairs / self.causal

    @property
    def picture(self) -> Tensor:
        """Parts of a read add up; heads are averaged."""
        heads = 1 if self.head is not None else self.shape.layers[self.layer].num_heads
        return torch.stack(self._cells).sum(0) / heads

    def __call__(
        self,
        layer: int,
        phase: str,
        band: Band,
        selection: Selection,
        geometry: Geometry,
        visible: Sequence[Span],
        group: int,
    ) -> None:
        """Takes note of one read of one band."""
        if phase == "prompt":
            heads = _heads(band, group)
            self.pairs[layer, heads] += selection.pairs(geometry, group, visible).flatten().double().cpu()
            n = geometry.queries
            self.causal[layer, heads] = float(n * geometry.keys - n * (n - 1) // 2)
            if layer == self.layer:
                self._draw(band, selection, geometry, visible, group)
            return
        seen = selection.mask(geometry, group, visible)[:, :, -1]
        positions = band.slot_positions().long()
        for pair, head in enumerate(band.pairs):
            for member in range(group):
                self.read[layer, int(head) * group + member, positions[pair][seen[pair, member]].cpu()] = True

    def _draw(self, band: Band, selection: Selection, geometry: Geometry, visible: Sequence[Span], group: int) -> None:
        for pair, first in enumerate(band.pairs):
            for member in range(group):
                if self.head is None or int(first) * group + member == self.head:
                    cells = shares(
                        selection, geometry, group, row=pair, head=member, rows=CELLS, cols=CELLS, visible=visible
                    )
                    self._cells.append(cells.cpu())


def _heads(band: Band, group: int) -> list[int]:
    return [int(head) * group + member for head in band.pairs for member in range(group)]


def trace(
    model: Any, shape: ModelShape, binding: Binding, ids: Sequence[int], *, layer: int, head: int | None = None
) -> Trace:
    """Read a prompt and one token more, and tell what happened.

    Args:
        ids: the prompt's tokens.
        layer, head: whose picture is drawn; head None: the mean over the layer's heads.
    """
    found = Trace(shape, len(ids), layer, head)
    batch = Batch(model, binding.cache(), 1, shape)
    batch.cache.trace = found
    with torch.inference_mode():
        logits = batch.prompt([ids])
        for courier in batch.cache.couriers():
            for band in courier.store.bands:
                positions = band.slot_positions().long().cpu()
                for pair, store_head in enumerate(band.pairs):
                    found.held[courier.index, int(store_head), positions[pair, : int(band.lengths[pair])]] = True
        batch.step([int(logits.argmax(-1))])
    found.nbytes = batch.cache.nbytes
    return found
