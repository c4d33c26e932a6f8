"""From which length on a method beats dense attention: measured, and predicted from the bytes that were counted."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from foveate.bench.generation import PLAIN

QUANTITIES = {"prefill": None, "decode": "decode_floor_ms"}
"""What is timed, and the floor that predicts it; how many pairs of a prompt are read is not counted."""


def crossings(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One entry for each method and quantity that was timed beside dense attention.

    Args:
        rows: of a bench (`Row.as_json`).

    Returns:
        JSON values: method, settings, quantity, `against` (the dense row that served), `measured`, the shortest length
        from which on the method was faster at every longer one, None if it was not at the longest; `predicted`, where
        the straight lines through the floors meet, None if they do not or nothing was counted at two lengths.
    """
    named: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        named.setdefault((row["method"], json.dumps(row.get("settings", {}), sort_keys=True)), []).append(row)
    base = next((key for name in ("dense", PLAIN) for key in named if key[0] == name), None)
    if base is None:
        return []
    found = []
    for key, own in named.items():
        if key[0] in (PLAIN, base[0]):
            continue
        for quantity, floor in QUANTITIES.items():
            mine, theirs = (_by_length(x, f"{quantity}_ms") for x in (own, named[base]))
            lengths = sorted(mine.keys() & theirs.keys())
            if not lengths:
                continue
            found.append(
                {
                    "method": key[0],
                    "settings": json.loads(key[1]),
                    "quantity": quantity,
                    "against": base[0],
                    "measured": first_faster((n, mine[n], theirs[n]) for n in lengths),
                    "predicted": None
                    if floor is None
                    else lines_meet(*(_by_length(x, floor) for x in (own, named[base]))),
                }
            )
    return found


def first_faster(points: Iterable[tuple[int, float, float]]) -> int | None:
    """The shortest length from which on the first time is below the second at every longer one.

    Args:
        points: (length, first time, second time), lengths ascending.
    """
    first = None
    for length, mine, theirs in points:
        first = (length if first is None else first) if mine < theirs else None
    return first


def lines_meet(mine: Mapping[int, float], theirs: Mapping[int, float]) -> float | None:
    """The length beyond which the line through the first and the last point of `mine` stays below that of `theirs`; 0
    if it is below from the start, None if it never stays below or there is one length only.

    A step's bytes grow in a straight line with the context, or not at all, which two lengths show.
    """
    lengths = sorted(mine.keys() & theirs.keys())
    if len(lengths) < 2:
        return None
    short, long = lengths[0], lengths[-1]
    gap = {n: mine[n] - theirs[n] for n in (short, long)}
    slope = (gap[long] - gap[short]) / (long - short)
    if slope >= 0:
        return 0.0 if gap[short] < 0 and gap[long] < 0 and slope == 0 else None
    return max(0.0, short - gap[short] / slope)


def sentence(found: Mapping[str, Any], shortest: int) -> str:
    """One crossing in words.

    Args:
        shortest: the shortest length that was measured.
    """
    at = found["measured"]
    if at is None:
        seen = "not faster at the longest length"
    else:
        seen = f"faster {'at every length' if at == shortest else f'from {at:,} tokens on'}"
    predicted = found["predicted"]
    said = (
        ""
        if predicted is None
        else f"; bytes alone say {f'from {predicted:,.0f} tokens on' if predicted else 'always'}"
    )
    return f"{found['method']}, {found['quantity']}: {seen} than {found['against']}{said}"


def _by_length(rows: Iterable[Mapping[str, Any]], key: str) -> dict[int, float]:
    return {row["length"]: row[key] for row in rows if row.get(key)}
