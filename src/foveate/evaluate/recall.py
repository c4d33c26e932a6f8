"""Selection recall: whether what an answer needs is still held, and whether decoding reads it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from foveate.attention import Geometry, Selection, Span
from foveate.cache import Band, FoveateCache
from foveate.tasks import Sample


class Evidence:
    """Where the evidence of each row stands, as positions in the cache.

    Args:
        samples: one per row of the batch; rows without known evidence have no recall.
        read: what was read of each; evidence that was left out is held and read by nobody.
    """

    def __init__(self, samples: Sequence[Sample], read: Sequence[Sample] | None = None) -> None:
        self.marked = _marked(samples if read is None else read)
        self.tokens = _marked(samples).sum(1)

    @property
    def known(self) -> bool:
        return bool((self.tokens > 0).any())

    def hits(self, band: Band) -> Tensor:
        """Which slots of a band hold evidence, bool [P, used]."""
        positions = band.slot_positions().long().cpu()
        rows = torch.from_numpy(band.rows)
        inside = positions < self.marked.shape[1] - 1
        found = self.marked[rows[:, None], positions.clamp_max(self.marked.shape[1] - 1)] & inside
        return found & (torch.arange(band.used) < torch.from_numpy(band.lengths)[:, None])

    def held(self, cache: FoveateCache, full: Sequence[int]) -> list[float | None]:
        """Share of the evidence that each row holds, over layers `full` and their heads."""
        total = torch.zeros(len(self.tokens), dtype=torch.float64)
        heads = 0
        for courier in cache.couriers():
            if courier.index not in full:
                continue
            heads += courier.store.spec.heads
            for band in courier.store.bands:
                total.index_add_(0, torch.from_numpy(band.rows), self.hits(band).sum(1).double())
        return self.shares(total, heads)

    def shares(self, total: Tensor, heads: int) -> list[float | None]:
        pairs = zip(total.tolist(), self.tokens.tolist(), strict=True)
        return [round(found / (n * heads), 6) if n and heads else None for found, n in pairs]

    def watch(self, full: Sequence[int]) -> Reads:
        return Reads(self, frozenset(full))


def _marked(samples: Sequence[Sample]) -> Tensor:
    """Which positions hold evidence, bool [B, N + 1]."""
    length = max((len(s.context_ids) + len(s.question_ids) for s in samples), default=0)
    marked = torch.zeros(len(samples), length + 1, dtype=torch.bool)
    for row, sample in enumerate(samples):
        for start, stop in sample.evidence:
            marked[row, start:stop] = True
    return marked


class Reads:
    """A trace (see `FoveateCache.trace`) that counts how much of the evidence the query heads read in one step.

    What a method attends by itself is not seen; a layer in which it did so makes the recall unknown.
    """

    def __init__(self, evidence: Evidence, full: frozenset[int]) -> None:
        self.evidence, self.full = evidence, full
        self.found = torch.zeros(len(evidence.tokens), dtype=torch.float64)
        self.heads: dict[tuple[int, int], int] = {}
        """Query heads whose read was seen, by layer and band."""

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
        if layer not in self.full:
            return
        seen = selection.mask(geometry, group, visible)[:, :, -1].cpu()
        hits = (self.evidence.hits(band)[:, None] & seen).sum((1, 2)).double()
        self.found.index_add_(0, torch.from_numpy(band.rows), hits)  # the parts of one read are disjoint
        self.heads[layer, id(band)] = len(band.pairs) * group

    def shares(self) -> list[float | None]:
        """Share of the evidence that each row's step read, over layers and query heads."""
        rows = len(self.evidence.tokens)
        if {layer for layer, _ in self.heads} != self.full:
            return [None] * rows
        return self.evidence.shares(self.found, sum(self.heads.values()) // rows)
