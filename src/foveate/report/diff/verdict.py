"""What changed in a few sentences, and in JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

from foveate.evaluate.statistics import LEVEL
from foveate.report.diff.changes import COSTS, SAME_BYTES, Change, Difference
from foveate.report.quantities import signed


def verdict(found: Difference) -> list[str]:
    """The answer in sentences: scores, what the samples cannot show, bytes, times, and what did not match."""
    if not found.cells:
        lone = len(found.only_a) + len(found.only_b) + len(found.refusals)
        return [f"Nothing can be compared: no cell was run in both, {lone} are in one only or were refused in one."]
    said = [_scores(found)]
    blind = [cell for cell in found.cells if cell.smallest_p * len(found.cells) >= 1 - LEVEL and not cell.identical]
    if blind:
        sizes = sorted({min(cell.n, cell.n_b) for cell in blind})
        many = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
        said.append(
            f"In {len(blind)} of {len(found.cells)} cells n={many} samples could not show any change by themselves; "
            "look at the rows over all cells, or give more samples."
        )
    loose = [cell for cell in found.cells if not cell.paired]
    if loose:
        said.append(
            f"{_share(loose, found.cells)} compared without pairing, as their samples are not the same "
            "(other seed, corpus or references): much larger changes are needed to be seen."
        )
    said.append(_bytes(found))
    times = _times(found)
    if times:
        said.append(times)
    for count, words in (
        (len(found.only_a), "in a only"),
        (len(found.only_b), "in b only"),
        (len(found.refusals), "refused in one of the two"),
    ):
        if count:
            said.append(f"{_cells(count)} {words}.")
    return said


def _cells(count: int) -> str:
    return "1 cell is" if count == 1 else f"{count} cells are"


def _share(some: Sequence[Change], every: Sequence[Change]) -> str:
    if len(some) == len(every):
        return "All cells are" if len(every) > 1 else "The cell is"
    return f"{_cells(len(some)).rpartition(' ')[0]} of {len(every)} {'is' if len(some) == 1 else 'are'}"


def _scores(found: Difference) -> str:
    cells, rows = found.changed, [row for row in found.rows if row.significant]
    if cells or rows:
        parts = []
        for some, every, name in ((rows, found.rows, "rows"), (cells, found.cells, "cells")):
            worse, better = sum(c.worse for c in some), sum(c.better for c in some)
            parts.append(f"{len(some)} of {len(every)} {name} ({worse} worse, {better} better)")
        return f"Scores changed beyond noise in {' and '.join(parts)}, after Holm's correction."
    count = f"{len(found.cells)} cell{'s' * (len(found.cells) > 1)}"
    if all(cell.identical for cell in found.cells):
        return f"Nothing changed: every score of {count} is the same."
    largest = max(found.cells, key=lambda cell: abs(cell.difference))
    return (
        f"Nothing changed beyond noise in {count}; the largest difference is {signed(largest.difference)} "
        f"({largest.name}, {largest.task} at {largest.length or 0:,} tokens, corrected p {largest.corrected:.2g})."
    )


def _bytes(found: Difference) -> str:
    ratios = [(cell.kv_bytes.ratio, cell) for cell in found.cells if cell.kv_bytes is not None]
    moved = [(ratio, cell) for ratio, cell in ratios if abs(ratio - 1) > SAME_BYTES]
    if not moved:
        return "KV bytes are the same in all cells."
    ratio, cell = max(moved, key=lambda each: abs(each[0] - 1))
    where = f"{cell.name} at {cell.length or 0:,} tokens"
    return f"KV bytes differ in {len(moved)} of {len(ratios)} cells, most in {where}: {ratio:.2f}×."


def _times(found: Difference) -> str:
    parts = []
    for name, words in (("prefill_s", "prefill"), ("decode_ms", "decode")):
        ratios = [ratio.ratio for row in found.rows if (ratio := getattr(row, name)) is not None]
        if ratios:
            parts.append(f"{words} {median(ratios):.2f}× (rows {min(ratios):.2f} to {max(ratios):.2f})")
    if not parts:
        return ""
    warning = (
        "" if found.same_machine else "; the machines or number formats differ, so times say nothing of the method"
    )
    return f"Times of b over a, median of rows: {', '.join(parts)}{warning}."


def _change(change: Change) -> dict[str, Any]:
    data = asdict(change)
    for name in COSTS:
        cost = getattr(change, name)
        data[name] = None if cost is None else {"a": cost.a, "b": cost.b, "ratio": cost.ratio}
    return {"name": change.name, "verdict": change.word, **data}


def diff_json(found: Difference) -> dict[str, Any]:
    """Everything as plain JSON values."""
    return {
        "a": found.a.path,
        "b": found.b.path,
        "verdict": verdict(found),
        "changed": len(found.changed) + sum(row.significant for row in found.rows) > 0,
        "facts": [asdict(fact) for fact in found.facts],
        "rows": [_change(row) for row in found.rows],
        "cells": [_change(cell) for cell in found.cells],
        "only_a": [asdict(lone) for lone in found.only_a],
        "only_b": [asdict(lone) for lone in found.only_b],
        "refusals": [asdict(lone) for lone in found.refusals],
    }
