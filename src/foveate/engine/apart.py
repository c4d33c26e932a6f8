"""Reading a band whose tokens lie in two places: each part is attended where it lies, one softmax is merged of both."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from foveate.attention import Geometry, Partial, Selection, Span, attend
from foveate.attention.sent import sent
from foveate.cache import Band, PlacedColumn


class Part(NamedTuple):
    """The tokens of a band in one place.

    Args:
        near: whether that is the model's device.
        k, v: [P, n, D] there.
        slots: which slots of the band these are, int64 [P or 1, n], on the device of the band.
        counts: how many of the n are real, int64 [P, 1], there.
        first: which of the n the first query would be, int64 [P, 1], there; beyond the counts where it lies elsewhere.
    """

    near: bool
    k: Tensor
    v: Tensor
    slots: Tensor
    counts: Tensor
    first: Tensor


def is_apart(band: object) -> bool:
    """Whether some tokens of a band are not on the model's device."""
    return isinstance(band, Band) and isinstance(band.k, PlacedColumn)


def attend_apart(
    band: Band,
    q: Tensor,
    selection: Selection,
    geometry: Geometry,
    visible: Sequence[Span],
    *,
    scale: float,
    softcap: float | None,
) -> list[Partial]:
    """Attend q [P, G, N, Dk] to what is selected of a band, as one part for each place; both are on the device of q.

    Args:
        selection: of the band's pairs, in its slots; keys stay at their own angle.
        geometry: of the whole band.
    """
    slots = None if selection.lists is None else _slots(selection, band)
    spans = [*visible, *([] if selection.span is None else [selection.span])]
    spans = [span for span in spans if not span.unbounded]
    found = []
    for part in _parts(band, geometry):
        there, device = selection, part.k.device
        if slots is not None:
            lists = _listed(slots, part, band).to(device)
            if device.type == "cpu":  # no list is longer than its longest, and most of a list may be elsewhere
                width = int((lists >= 0).sum(-1).max()) if lists.numel() else 0
                if width == 0 and selection.span is None:
                    continue
                lists = lists[..., : max(1, width)]
            there = replace(selection, lists=lists, k_block=1, counts=None)
        got = attend(
            q.to(device),
            part.k.unsqueeze(1),
            part.v.unsqueeze(1),
            there,
            _geometry(part, geometry, band, bool(spans)),
            visible=visible,
            scale=scale,
            softcap=softcap,
        )
        found.append(Partial(got.out.to(q.device), got.lse.to(q.device)))
    if not found:  # nobody reads anything
        lse = torch.full(q.shape[:3], -torch.inf, dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
        found.append(Partial(q.new_zeros(*q.shape[:3], band.value_dim), lse))
    return found


def _parts(band: Band, geometry: Geometry) -> Iterator[Part]:
    """What lies on the device, then what lies on the host."""
    k, v, sink = band.k, band.v, band.k.place.sink if isinstance(band.k, PlacedColumn) else 0
    assert isinstance(k, PlacedColumn) and (v is None or isinstance(v, PlacedColumn))
    device, host = band.device, k.far.data.device
    away = torch.from_numpy(k.away)[:, None]
    width, most = int((band.lengths - k.away).max()), int(k.away.max())
    here = away.to(device)
    first = geometry.first
    if first is None:
        first = torch.full((1, 1), geometry.keys - geometry.queries, device=device)
    slot = torch.arange(width, device=device)
    keys = k.near.data[:, :width]
    yield Part(
        True,
        keys,
        keys[..., : band.value_dim] if v is None else v.near.data[:, :width],
        torch.where(slot < sink, slot, slot + here),
        band.device_lengths().long()[:, None] - here,
        first - here,
    )
    if most:
        keys, counts = k.far.data[:, :most], away.to(host)
        yield Part(
            False,
            keys,
            keys[..., : band.value_dim] if v is None else v.far.data[:, :most],
            sink + torch.arange(most, device=device)[None],
            counts,
            counts,  # every query stands behind what was sent away
        )


def _geometry(part: Part, whole: Geometry, band: Band, spans: bool) -> Geometry:
    """Where queries and keys stand in one place."""
    device, keys, queries = part.k.device, part.k.shape[1], whole.queries
    level = whole.plain and (band.away == band.away[0]).all()
    if level and not spans and (part.near or queries == 1):
        return Geometry(whole.batch, queries, keys, device=device)
    q_positions = k_positions = None
    if spans:
        at, held = whole.positions()
        q_positions = at[:, 0].expand(whole.batch, -1).to(device)
        held = held[:, 0].expand(whole.batch, -1)
        slots = part.slots.expand(whole.batch, -1).clamp_max(held.shape[1] - 1)
        k_positions = held.gather(1, slots).unsqueeze(1).to(device)
    first = part.first.expand(whole.batch, 1)
    return Geometry(whole.batch, queries, keys, part.counts, first, q_positions, k_positions, device)


def _slots(selection: Selection, band: Band) -> Tensor:
    """The lists of a selection in slots, -1 where there is none: int64 [P, h, nq, K * k_block]."""
    assert selection.lists is not None
    lists, size = selection.lists.long(), selection.k_block
    if size > 1:
        inside = torch.arange(size, device=lists.device)
        lists = torch.where(lists.unsqueeze(-1) < 0, -1, lists.unsqueeze(-1) * size + inside).flatten(-2)
    return lists.masked_fill(lists >= band.device_lengths().view(-1, 1, 1, 1), -1)


def _listed(slots: Tensor, part: Part, band: Band) -> Tensor:
    """The listed slots that are in one place, in its own count: int32, ascending, -1 behind the end."""
    assert isinstance(band.k, PlacedColumn)
    sink, away = band.k.place.sink, sent(band.away, slots.device).view(-1, 1, 1, 1)
    gone = (slots >= sink) & (slots < sink + away)
    if part.near:
        found = torch.where(gone | (slots < 0), -1, torch.where(slots < sink, slots, slots - away))
    else:
        found = torch.where(gone, slots - sink, -1)
    last = torch.iinfo(torch.int32).max
    found = found.masked_fill(found < 0, last).sort(dim=-1).values
    return found.masked_fill(found == last, -1).to(torch.int32)
