"""Pictures of a selection: which share of the causal pairs is read, cell by cell."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from foveate.attention.at_once import at_once
from foveate.attention.scores import to_heads
from foveate.attention.selection import ALL, Geometry, Selection, Span
from foveate.errors import BadArgument

_SHADES = ":-=+*#%@"


def shares(
    selection: Selection,
    geometry: Geometry,
    num_heads: int,
    *,
    row: int = 0,
    head: int | None = None,
    rows: int = 32,
    cols: int = 64,
    visible: Sequence[Span] = (),
) -> Tensor:
    """The share of causal pairs that is read in each cell, float32 [rows, cols]; NaN where all is in the future.

    Args:
        row: which row of the batch; head: which query head, None for the mean of all.
        rows, cols: cells, at most N and M; each stands for N / rows queries and M / cols slots.

    Raises:
        BadArgument: a row, head or number of cells that does not exist.
    """
    g = geometry
    if not 0 <= row < g.batch:
        raise BadArgument("row", row, f"choose one of 0..{g.batch - 1}")
    if head is not None and not 0 <= head < num_heads:
        raise BadArgument("head", head, f"choose one of 0..{num_heads - 1}, or None for the mean")
    if rows < 1 or cols < 1:
        raise BadArgument("rows, cols", (rows, cols), "a picture has at least one cell")
    rows, cols = min(rows, g.queries), min(cols, g.keys)
    column = torch.arange(g.keys, device=g.device) * cols // g.keys
    read, causal = (torch.zeros(rows, cols, dtype=torch.float64, device=g.device) for _ in range(2))
    step = max(1, at_once(g.device) // (num_heads * g.batch * g.keys))
    for cell in range(rows):
        begin, end = -(-cell * g.queries // rows), -(-(cell + 1) * g.queries // rows)
        for start in range(begin, end, step):
            stop = min(start + step, end)
            here = g.rows(start, stop)
            for total, what, spans in ((read, selection, visible), (causal, ALL, ())):
                seen = what.rows(start, stop).seen(here, spans)
                seen = to_heads(seen[min(row, seen.shape[0] - 1)].unsqueeze(0), num_heads)[0]
                # A mask that all heads share has one head, which is every head's.
                seen = seen if head is None else seen[min(head, seen.shape[0] - 1)].unsqueeze(0)
                total[cell].index_add_(0, column, seen.double().mean(0).sum(0))
    return torch.where(causal > 0, read / causal, torch.nan).float()


def draw(selection: Selection, geometry: Geometry, num_heads: int, **how: object) -> str:
    """The selection in characters: rows of queries, columns of slots, blank for the future, `.` for nothing read, then
    `:-=+*#%@` by the share of causal pairs read. Arguments as for `shares`."""
    cells = shares(selection, geometry, num_heads, **how)  # type: ignore[arg-type]
    lines = []
    for line in cells.tolist():
        marks = [
            " " if share != share else "." if share == 0 else _SHADES[min(int(share * len(_SHADES)), len(_SHADES) - 1)]
            for share in line
        ]
        lines.append("".join(marks).rstrip())
    return "\n".join(lines)


def image(selection: Selection, geometry: Geometry, num_heads: int, **how: object) -> np.ndarray:
    """The selection as grey values, uint8 [rows, cols]: 0 for the future and for nothing read, 255 for every causal
    pair read. Arguments as for `shares`."""
    cells = shares(selection, geometry, num_heads, **how)  # type: ignore[arg-type]
    return (cells.nan_to_num(0.0) * 255).round().to(torch.uint8).cpu().numpy()
