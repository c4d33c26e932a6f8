"""Reading a store: the parts a method selected, band by band, merged by lse."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from foveate.attention import ALL, Geometry, Partial, Parts, Selection, Span, attend, framed, merge, sdpa
from foveate.attention.angles import Angles
from foveate.attention.columns import columns
from foveate.attention.pairs import pairs as count_pairs
from foveate.attention.sent import sent
from foveate.cache import Band, Store
from foveate.cache.fixed import FixedBand
from foveate.engine.apart import attend_apart, is_apart
from foveate.engine.rows import Rows
from foveate.engine.runs import at_once, turned_window
from foveate.methods.base import Result


@dataclass(slots=True)
class Reading:
    """Everything about one layer's read that is not the selection.

    Args:
        rows: where the new tokens of each row stand among the N columns.
        spans: spans to intersect; None: those of each band (what its heads promise).
        scale, softcap: of the logits.
        sinks: learned logits [H] that take softmax mass without a value (gpt-oss), or None.
        move: turns rotated queries by delta positions.
        meter: called with the pairs read when somebody counts; of other costs with their amount and name.
        trace: called with (band, selection, geometry, visible spans, query heads of a pair) when somebody looks.
        angles: says by how much `move` turns.
    """

    rows: Rows
    spans: tuple[Span, ...] | None
    scale: float
    softcap: float | None = None
    sinks: Tensor | None = None
    move: Callable[[Tensor, Tensor], Tensor] | None = None
    meter: Callable[..., None] | None = None
    trace: Callable[[Band, Selection, Geometry, Sequence[Span], int], None] | None = None
    angles: Callable[[], Angles] | None = None

    @property
    def fresh(self) -> np.ndarray:
        """New tokens of each row, host int64 [B]."""
        return self.rows.fresh


def read(
    store: Store,
    q: Tensor,
    parts: Parts,
    how: Reading,
    *,
    lse: bool = False,
    probs: bool = False,
    keys_instead: Tensor | None = None,
) -> Result:
    """Attend q [B, H, N, Dk] to the selected parts of what the store holds.

    Parts must be disjoint; they are intersected with causality, the spans and what is held.

    Args:
        keys_instead: [B, Hs, C, Dk], what the queries meet in place of the held keys, slot by slot.
    """
    batch, heads, queries, _ = q.shape
    group = heads // store.spec.heads
    if parts is ALL and not lse and not probs and _all_visible(store, q, how):
        grids = store.bands[0].grids if len(store.bands) == 1 else None
        if grids is not None:
            k, v = (grid[:, :, : store.bands[0].used] for grid in grids)
            return Result(sdpa.everything(q, k, v, how.scale, False).out, None, None)
        by_band = [(band, _everything(band, q, group, store, how)) for band in store.bands]
        return Result(_assemble(by_band, store, heads), None, None)
    listed: list[Selection | Partial] = [parts] if isinstance(parts, Selection | Partial) else list(parts)
    window = None if probs or keys_instead is not None else turned_window(store, q, listed, how)
    listed = listed if window is None else [window]
    lse = lse or len(listed) > 1 or how.sinks is not None or probs
    moved = [_moved(q, part, store, how) for part in listed]
    spanned = bool(how.spans) or any(_spanned(part) for part in listed)
    placed = spanned or any(isinstance(part, Selection) and part.frame.keys is not None for part in listed)
    outs: list[tuple[Band, Partial]] = []
    weights: list[Tensor] = []
    others = [None] * len(store.bands) if keys_instead is None else store.scatter(keys_instead)
    for band, other in zip(store.bands, others, strict=True):
        apart = is_apart(band) and other is None
        keys, values = (None, None) if apart or isinstance(band, FixedBand) else _held(band)
        keys = keys if other is None else other.unsqueeze(1)
        geometry = band.geometry(spanned, placed) if isinstance(band, FixedBand) else _geometry(band, how, queries)
        visible = how.spans if how.spans is not None else band.spans
        got: list[Partial] = []
        chosen: list[tuple[Tensor, Selection]] = []
        for part, turned in zip(listed, moved, strict=True):
            if isinstance(part, Partial):
                got.append(Partial(_rows(part.out, band, group, store), _rows(part.lse, band, group, store)))
                continue
            selection = _local(part, band, group, store)
            rows = _rows(turned, band, group, store)
            if isinstance(band, FixedBand) and other is None and how.spans is not None and not how.spans:
                whole = at_once(band, rows, part, how)
                if whole is not None:
                    got.append(whole)
                    chosen.append((rows, selection))
                    continue
            if apart and selection.frame.keys is None:
                got += attend_apart(band, rows, selection, geometry, visible, scale=how.scale, softcap=how.softcap)
                chosen.append((rows, selection))
                _note(band, selection, geometry, visible, group, store, how)
                continue
            if keys is None or values is None:  # of two places only keys that are turned are brought together
                held, values = _held(band)
                keys = held if keys is None else keys
            if selection.frame.keys is not None:
                assert how.move is not None, "a frame needs the model's rotary embedding"
                got.append(
                    framed.read(
                        rows,
                        keys,
                        values,
                        selection,
                        geometry,
                        visible,
                        scale=how.scale,
                        softcap=how.softcap,
                        move=how.move,
                        angles=None if how.angles is None else how.angles(),
                    )
                )
            else:
                got.append(
                    attend(
                        rows,
                        keys,
                        values,
                        selection,
                        geometry,
                        visible=visible,
                        scale=how.scale,
                        softcap=how.softcap,
                        lse=lse,
                    )
                )
            chosen.append((rows, selection))
            _note(band, selection, geometry, visible, group, store, how)
        if how.sinks is not None:
            mass = _rows(how.sinks.view(1, heads, 1).expand(batch, heads, queries).float(), band, group, store)
            got.append(Partial(torch.zeros_like(got[0].out), mass))
        part = got[0] if len(got) == 1 else merge(got)
        outs.append((band, part))
        if probs:
            weights.append(_probs(chosen, _held(band)[0] if keys is None else keys, part.lse, geometry, visible, how))
    out = _assemble([(b, p.out) for b, p in outs], store, heads)
    total = _assemble([(b, p.lse) for b, p in outs], store, heads) if lse else None
    rows = _assemble_probs(weights, store, heads) if probs else None
    return Result(out, total, rows)


def _held(band: Band) -> tuple[Tensor, Tensor]:
    """Keys and values of a band [P, 1, used, D], on the device."""
    keys = band.keys()
    return keys.unsqueeze(1), band.values(keys).unsqueeze(1)


def _note(
    band: Band,
    selection: Selection,
    geometry: Geometry,
    visible: Sequence[Span],
    group: int,
    store: Store,
    how: Reading,
) -> None:
    """Tell those who count or look what was read."""
    if how.meter is not None:
        how.meter(float(_real_pairs(selection, geometry, group, visible, band, how, store)))
    if how.trace is not None:
        how.trace(band, selection, geometry, visible, group)


def _all_visible(store: Store, q: Tensor, how: Reading) -> bool:
    """Whether every new token reads all that its head holds, by the kernel that is best for that, and nobody counts."""
    if how.softcap is not None or how.sinks is not None or how.meter is not None or how.trace is not None:
        return False
    for band in store.bands:
        if not band.even or (band.spans if how.spans is None else how.spans) or not sdpa.is_best(q, band.used):
            return False
        if is_apart(band):
            return False
    return how.rows.whole


def _everything(band: Band, q: Tensor, group: int, store: Store, how: Reading) -> Tensor:
    """What `attend` would give, by its shortest way: a decode step waits for the host."""
    keys = band.keys()
    values = band.values(keys)
    rows = _rows(q, band, group, store)
    return sdpa.everything(rows, keys.unsqueeze(1), values.unsqueeze(1), how.scale, False).out


def column_sums(
    store: Store, q: Tensor, parts: Parts, total: Tensor, how: Reading, *, each: bool = False
) -> list[Tensor]:
    """Attention mass of each held key over the real queries, query heads of a group added: [P, used] per band.

    Args:
        each: a sum for each query head: [P, G, used]; of parts without moved keys.
    """
    heads, queries = q.shape[1:3]
    group = heads // store.spec.heads
    listed = [parts] if isinstance(parts, Selection | Partial) else list(parts)
    sums = []
    for band in store.bands:
        geometry = _geometry(band, how, queries)
        visible = how.spans if how.spans is not None else band.spans
        valid = sent(how.fresh[band.rows], q.device)
        mass = torch.zeros(len(band.pairs), group if each else 1, band.used, device=q.device)
        for part in (p.over if isinstance(p, Partial) else p for p in listed):
            if part is not None:
                rows = _rows(_moved(q, part, store, how), band, group, store)
                selection = _local(part, band, group, store)
                if selection.frame.keys is not None:
                    turned = _pieces(rows, band.keys().unsqueeze(1), selection, geometry, visible, how)
                    mass += framed.columns(band.used, _rows(total, band, group, store), turned, valid)
                    continue
                mass += columns(
                    rows,
                    band.keys().unsqueeze(1),
                    _rows(total, band, group, store),
                    selection,
                    geometry,
                    visible=visible,
                    scale=how.scale,
                    softcap=how.softcap,
                    valid=valid,
                    each=each,
                )
        sums.append(mass if each else mass.squeeze(1))
    return sums


def head_columns(store: Store, q: Tensor, parts: Parts, total: Tensor, how: Reading) -> Tensor:
    """`column_sums` of each query head as one tensor, [B, H, C]; 0 behind the end of a head."""
    sums = column_sums(store, q, parts, total, how, each=True)
    grid = store.grid([x.transpose(1, 2) for x in sums], fill=0.0)  # [B, Hs, C, G]
    return grid.transpose(2, 3).flatten(1, 2)


def _geometry(band: Band, how: Reading, queries: int) -> Geometry:
    pairs, used, device = len(band.pairs), band.used, band.device
    even = band.even and how.rows.whole
    if even and band.positions is None:
        return Geometry(pairs, queries, used, device=device)
    fresh = how.fresh[band.rows]
    lengths = first = None
    if not even:
        lengths = band.device_lengths().unsqueeze(1)
        first = sent(band.lengths - fresh, device).unsqueeze(1)
    q_positions = k_positions = None
    if band.positions is not None or not even:
        start = sent(band.seen - fresh, device)
        q_positions = start.unsqueeze(1) + torch.arange(queries, device=device)
    if band.positions is not None:
        k_positions = band.slot_positions().unsqueeze(1)
    return Geometry(pairs, queries, used, lengths, first, q_positions, k_positions, device)


def _moved(q: Tensor, part: Selection | Partial, store: Store, how: Reading) -> Tensor:
    if isinstance(part, Partial) or part.frame.query is None:
        return q
    assert how.move is not None, "a frame needs the model's rotary embedding"
    start = store.newest(how.fresh).to(q.device)
    positions = start.unsqueeze(1) + torch.arange(q.shape[2], device=q.device)
    return how.move(q, part.frame.query.to(q.device) - positions)


def _spanned(part: Selection | Partial) -> bool:
    """Whether what is read of a part depends on where its queries stand: lists alone name slots."""
    return isinstance(part, Selection) and part is not ALL and part.span is not None


def _rows(x: Tensor, band: Band, group: int, store: Store) -> Tensor:
    """[B, H, ...] -> [P, G, ...], the query heads of each of the band's pairs."""
    flat = x.reshape(x.shape[0] * store.spec.heads, group, *x.shape[2:])
    return flat if len(band.pairs) == flat.shape[0] else flat[band.index]


def _local(part: Selection, band: Band, group: int, store: Store) -> Selection:
    """A layer's selection in terms of one band's pairs."""
    if part.lists is None:
        return part
    lists = _local_lists(part.lists, band, group, store)
    counts = None if part.counts is None else _local_lists(part.counts, band, group, store)
    if part.frame.keys is None:
        return replace(part, lists=lists, counts=counts)
    keys = _local_lists(part.frame.keys.expand_as(part.lists), band, group, store)
    return replace(part, lists=lists, frame=replace(part.frame, keys=keys), counts=counts)


def _local_lists(lists: Tensor, band: Band, group: int, store: Store) -> Tensor:
    """[B, h, ...] -> [P, 1 or G, ...], what the band's pairs have of h lists."""
    batch, h = lists.shape[:2]
    heads = store.spec.heads
    if h == 1 and heads * group > 1:
        if len(band.pairs) == batch * heads:  # all heads share the one list as it lies
            return lists.unsqueeze(1).expand(batch, heads, *lists.shape[1:]).flatten(0, 1)
        return lists[band.index // heads]
    flat = lists.reshape(batch * heads, 1 if h == heads else group, *lists.shape[2:])
    return flat if len(band.pairs) == flat.shape[0] else flat[band.index]


def _pieces(
    rows: Tensor, keys: Tensor, selection: Selection, geometry: Geometry, visible: Sequence[Span], how: Reading
) -> Iterator[framed.Piece]:
    """A band's read of keys that stand elsewhere."""
    assert how.move is not None, "a frame needs the model's rotary embedding"
    return framed.pieces(rows, keys, selection, geometry, visible, scale=how.scale, softcap=how.softcap, move=how.move)


def _probs(
    chosen: Sequence[tuple[Tensor, Selection]],
    keys: Tensor,
    total: Tensor,
    geometry: Geometry,
    visible: Sequence[Span],
    how: Reading,
) -> Tensor:
    """Probabilities over the slots, [P, G, N, used] float32; decode only, where N is small."""
    out = None
    for rows, selection in chosen:
        if selection.frame.keys is not None:
            turned = _pieces(rows, keys, selection, geometry, visible, how)
            part = framed.probabilities(rows, keys.shape[2], total.float(), turned)
            out = part if out is None else out + part
            continue
        logits = torch.einsum("pgnd,pmd->pgnm", rows.float(), keys.squeeze(1).float()) * how.scale
        if how.softcap is not None:
            logits = torch.tanh(logits / how.softcap) * how.softcap
        part = (logits - total.float().unsqueeze(-1)).exp()
        part = part.masked_fill(~selection.mask(geometry, rows.shape[1], visible), 0.0)
        out = part if out is None else out + part
    assert out is not None, "a read without selections has no probabilities over slots"
    return out


def _assemble(parts: Sequence[tuple[Band, Tensor]], store: Store, heads: int) -> Tensor:
    if len(parts) == 1:
        x = parts[0][1]
        return x.reshape(store.rows, heads, *x.shape[2:])
    first = parts[0][1]
    out = first.new_empty(store.rows * store.spec.heads, *first.shape[1:])
    for band, x in parts:
        out[band.index] = x
    return out.view(store.rows, heads, *first.shape[2:])


def _assemble_probs(parts: Sequence[Tensor], store: Store, heads: int) -> Tensor:
    width = max(x.shape[-1] for x in parts)
    padded = [x if x.shape[-1] == width else torch.nn.functional.pad(x, (0, width - x.shape[-1])) for x in parts]
    return _assemble(list(zip(store.bands, padded, strict=True)), store, heads)


def _real_pairs(
    selection: Selection,
    geometry: Geometry,
    group: int,
    visible: Sequence[Span],
    band: Band,
    how: Reading,
    store: Store,
) -> int:
    """Pairs of real queries only (padding queries read too, but nobody asked them to): the first of each pair."""
    fresh = how.fresh[band.rows]
    real = None if (fresh == geometry.queries).all() else sent(fresh, band.device)
    return int(count_pairs(selection, geometry, group, visible, real).sum())
