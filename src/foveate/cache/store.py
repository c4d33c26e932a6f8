"""The one store of a layer: bands of keys and values, whatever method is at work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from foveate.attention import Span
from foveate.attention.sent import sent
from foveate.cache.band import GROWTH, Band
from foveate.cache.column import Column, Counts, Observed, Side
from foveate.cache.place import Place
from foveate.cache.state import Blocks, Tag
from foveate.cache.summaries import Summaries


@dataclass(frozen=True)
class StoreSpec:
    """What a layer's store is made of, settled before any token.

    Args:
        heads: store heads Hs (kv heads; 1 for MLA).
        spans: visibility promises, intersected; sinks and windows may differ per store head.
        tags, blocks: values per slot and per block.
        value_dim: Dv when values are the first Dv channels of the keys (MLA), else None.
        place: which tokens leave the device, or None.
    """

    heads: int
    spans: tuple[Span, ...] = ()
    tags: Mapping[str, Tag] = field(default_factory=dict)
    blocks: Mapping[str, Blocks] = field(default_factory=dict)
    value_dim: int | None = None
    place: Place | None = None

    def classes(self) -> list[tuple[tuple[Span, ...], tuple[int, ...]]]:
        """Heads grouped by the spans they promise, in host integers."""
        groups: dict[tuple[tuple[int, int | None], ...], tuple[tuple[Span, ...], list[int]]] = {}
        for head in range(self.heads):
            spans = tuple(_tight(s.for_head(head)) for s in self.spans)
            spans = tuple(s for s in spans if s.window is not None)
            key = tuple((int(s.sink), None if s.window is None else int(s.window)) for s in spans)
            groups.setdefault(key, (spans, []))[1].append(head)
        return [(spans, tuple(heads)) for spans, heads in groups.values()]


UNBOUNDED = 1 << 30
"""A window of this size or more is no window (per-head tensors have no None)."""


def _tight(span: Span) -> Span:
    return Span(span.sink, None, span.beyond) if isinstance(span.window, int) and span.window >= UNBOUNDED else span


class Store:
    """All held tokens of one layer, for B rows and Hs store heads.

    Bands partition the (row, head) pairs. Rows begin at slot 0; padding never enters.
    """

    def __init__(self, spec: StoreSpec) -> None:
        self.spec = spec
        self.rows = 0
        self.bands: list[Band] = []
        self.seen: Counts = np.zeros(0, dtype=np.int64)
        """Tokens of each row so far, evicted ones counted: the next position."""
        self.packing: tuple[Side | None, Side | None] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors on the device: keys, values, positions, tags, summaries, spare slots."""
        return self.bands[0].nbytes if len(self.bands) == 1 else sum(band.nbytes for band in self.bands)

    @property
    def host_nbytes(self) -> int:
        """Bytes of the tokens that left the device."""
        return 0 if self.spec.place is None else sum(band.host_nbytes for band in self.bands)

    @property
    def aligned(self) -> bool:
        """Every head of a row holds the same tokens in the same slots (nothing was evicted)."""
        return all(band.positions is None for band in self.bands)

    def newest(self, fresh: Counts) -> Tensor:
        """Position of the first of the newest fresh[b] tokens of each row, int64 [B], on the device."""
        return sent(self.seen - fresh, self.bands[0].device)

    @property
    def lengths(self) -> np.ndarray:
        """Slots in use, host int64 [B, Hs]."""
        return self._grid([band.lengths for band in self.bands])

    @property
    def away(self) -> np.ndarray:
        """Tokens on the host, host int64 [B, Hs]."""
        return self._grid([band.away for band in self.bands])

    def _grid(self, values: Sequence[np.ndarray]) -> np.ndarray:
        out = np.zeros(self.rows * self.spec.heads, dtype=np.int64)
        for band, value in zip(self.bands, values, strict=True):
            out[band.pairs] = value
        return out.reshape(self.rows, self.spec.heads)

    def append(self, k: Tensor, v: Tensor | None, fresh: Counts | None) -> None:
        """Append the first fresh[b] of N tokens of every row (None: all): k [B, Hs, N, Dk], v [B, Hs, N, Dv]."""
        if not self.bands:
            self._create(k, v)
        if fresh is None and v is not None and len(self.bands) == 1 and self.bands[0].append_whole(k, v):
            self.seen = self.seen + k.shape[2]
            return
        flat_k, flat_v = k.flatten(0, 1), None if v is None else v.flatten(0, 1)
        for band in self.bands:
            counts = None if fresh is None else fresh[band.rows]
            if len(band.pairs) == flat_k.shape[0]:
                band.append(flat_k, flat_v, counts)
            else:
                band.append(flat_k[band.index], None if flat_v is None else flat_v[band.index], counts)
        self.seen = self.seen + (k.shape[2] if fresh is None else fresh)

    def _create(self, k: Tensor, v: Tensor | None) -> None:
        self.rows = k.shape[0]
        self.seen = np.zeros(self.rows, dtype=np.int64)
        rows = np.arange(self.rows)[:, None] * self.spec.heads
        for spans, heads in self.spec.classes():
            pairs = np.sort((rows + np.array(heads)[None, :]).ravel())
            empty = k.new_empty(len(pairs), 0, k.shape[-1])
            empty_v = None if v is None else v.new_empty(len(pairs), 0, v.shape[-1])
            dim = self.spec.value_dim or (0 if v is None else v.shape[-1])
            spec = self.spec
            self.bands.append(Band(pairs, spec.heads, spans, empty, empty_v, spec.tags, spec.blocks, dim, spec.place))

    @property
    def settles(self) -> bool:
        """Whether tokens leave it, or its exact tail, as others arrive."""
        return any(band.settles for band in self.bands)

    def settle(self, upcoming: Counts) -> None:
        """Free what no query at or behind position upcoming[b] can see; pack what may leave the exact tail."""
        for band in self.bands:
            if band.settles:
                band.settle(upcoming[band.rows])

    def depart(self) -> None:
        """Bring the tokens to the host that belong there."""
        for band in self.bands:
            band.depart()

    def keep(self, slots: Mapping[int, np.ndarray], upcoming: Counts) -> None:
        """Hold only the listed slots (ascending) of each (row, head) pair; others of the store stay whole.

        Pairs whose counts differ by more than the growth step part into bands of their own, so that no head is padded
        to the longest. Tokens at or behind upcoming[b] must be among the kept.
        """
        bands: list[Band] = []
        for band in self.bands:
            listed = [slots.get(int(p), np.arange(n)) for p, n in zip(band.pairs, band.lengths, strict=True)]
            if all(len(s) == n for s, n in zip(listed, band.lengths, strict=True)):
                bands.append(band)
                continue
            sizes = np.array([-(-len(s) // GROWTH) for s in listed])
            for size in np.unique(sizes):
                local = np.nonzero(sizes == size)[0]
                part = band if len(local) == len(listed) else band.pick(local, band.pairs[local])
                part.keep([listed[i] for i in local], upcoming=upcoming[part.rows])
                bands.append(part)
        self.bands = bands

    def pack(
        self, key_side: Side | None, value_side: Side | None, q: Tensor | None = None, real: Tensor | None = None
    ) -> None:
        """Hold heads without a window as the codec says; windowed heads hold a constant few tokens and stay exact.

        Args:
            q: [B, H, W, D] the prompt's last queries, of which real [B, W] are, for sides that are fitted to them.
        """
        self.packing = (key_side, value_side)
        for band in self.bands:
            if band.bounded:
                continue
            observed = None
            if q is not None and real is not None:
                by_pair = q.reshape(self.rows * self.spec.heads, -1, *q.shape[2:])
                observed = Observed(by_pair[band.index], real[band.index // self.spec.heads])
            band.pack(key_side, value_side, observed)

    def crop(self, removed: Counts) -> None:
        """Forget the newest removed[b] tokens of every row."""
        for band in self.bands:
            band.crop(removed[band.rows])
        self.seen = self.seen - removed

    def croppable(self, removed: Counts) -> bool:
        """False when the crop would need tokens that were freed."""
        return all((band.seen - removed[band.rows] >= band.floor).all() for band in self.bands)

    def select_rows(self, rows: np.ndarray) -> None:
        """New row r is a copy of old row rows[r]: beam reorder, repeat and batch selection are one operation."""
        heads = self.spec.heads
        bands = []
        for band in self.bands:
            local = {int(pair): i for i, pair in enumerate(band.pairs)}
            source, pairs = [], []
            for new, old in enumerate(rows):
                for head in range(heads):
                    i = local.get(int(old) * heads + head)
                    if i is not None:
                        source.append(i)
                        pairs.append(new * heads + head)
            if source:
                bands.append(band.pick(np.array(source), np.array(pairs)))
        self.bands, self.rows, self.seen = bands, len(rows), self.seen[rows]

    def fork(self, spec: StoreSpec | None = None) -> Store:
        """A deep copy; with another spec the tokens are banded, tagged and summarised anew.

        Only a store that evicted nothing can take another spec.
        """
        if spec is None:
            new = Store(self.spec)
            new.rows, new.seen, new.packing = self.rows, self.seen.copy(), self.packing
            new.bands = [band.pick(np.arange(len(band.pairs)), band.pairs) for band in self.bands]
            return new
        new = Store(spec)
        if not self.bands:
            return new
        new.rows, new.seen = self.rows, self.seen.copy()
        (source,) = self.bands
        for spans, heads in spec.classes():
            local = np.nonzero(np.isin(source.pairs % spec.heads, heads))[0]
            band = source.pick(local, source.pairs[local])
            band.recall()
            band.spans, band.declared, band.summaries, band.place = spans, dict(spec.blocks), Summaries(), spec.place
            k = band.keys()
            band.tags = {
                name: band.tags.get(name)
                or Column(k.new_full((*k.shape[:2], tag.width), tag.fill, dtype=tag.dtype), tag.fill)
                for name, tag in spec.tags.items()
            }
            band.refold()
            new.bands.append(band)
        return new

    def grid(self, per_band: Sequence[Tensor], fill: float) -> Tensor:
        """Per-band tensors [P, n, ...] as one [B, Hs, max n, ...], short ones filled; no copy for a single band."""
        if len(per_band) == 1:
            x = per_band[0]
            return x.view(self.rows, self.spec.heads, *x.shape[1:])
        width = max(x.shape[1] for x in per_band)
        tail = per_band[0].shape[2:]
        out = per_band[0].new_full((self.rows * self.spec.heads, width, *tail), fill)
        for band, x in zip(self.bands, per_band, strict=True):
            out[band.index.to(x.device), : x.shape[1]] = x
        return out.view(self.rows, self.spec.heads, width, *tail)

    def scatter(self, x: Tensor) -> list[Tensor]:
        """Inverse of `grid`: [B, Hs, C, ...] -> one [P, used, ...] per band."""
        flat = x.flatten(0, 1)
        return [flat[band.index, : band.used] for band in self.bands]
