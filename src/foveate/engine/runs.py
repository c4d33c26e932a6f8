"""Reads of recorded steps that kernels make by slots alone: everything, runs of a full window, and both of its ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from foveate.attention import ALL, Partial, Selection
from foveate.cache import Store
from foveate.cache.fixed import FixedBand

if TYPE_CHECKING:
    from foveate.engine.read import Reading


def at_once(band: FixedBand, rows: Tensor, part: Selection, how: Reading) -> Partial | None:
    """A part that kernels read by slots alone: everything, or a run of a full window; None if it is none."""
    if part is ALL:
        return band.attend(rows, how.scale, how.softcap)
    if part.lists is not None or part.span is None:
        return None
    run = band.run(part.span)
    return None if run is None else band.attend_run(rows, run, how.scale, how.softcap)


def turned_window(store: Store, q: Tensor, parts: Sequence[Selection | Partial], how: Reading) -> Partial | None:
    """A full window, and the first tokens that stand in front of it, which the one query of each row meets from
    elsewhere, in one read; None if the parts are others, or no kernel can."""
    band = store.bands[0]
    if len(parts) != 2 or len(store.bands) > 1 or not isinstance(band, FixedBand) or how.spans != ():
        return None
    near, far = parts
    if not isinstance(near, Selection) or not isinstance(far, Selection) or near.span is None or far.span is None:
        return None
    place, plain = far.frame.query, near.frame.query is None and near.frame.keys is None and far.frame.keys is None
    if place is None or how.angles is None or not plain or near.lists is not None or far.lists is not None:
        return None
    window, first = band.run(near.span), band.run(far.span)
    if window is None or first is None or first[1] != window[0]:
        return None
    return band.attend_turned(q, window[0], place[:, 0], *how.angles(), how.scale, how.softcap)
