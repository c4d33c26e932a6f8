"""The table of kernels in docs/speed.md, from a record of `foveate bench kernels`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

COLUMNS = [
    ("ms", "ms", 1, ".3f"),
    ("20 % to 80 %", "", 1, ""),
    ("floor", "floor_ms", 1, ".3f"),
    ("of the floor", "floor_share", 100, ".0f"),
    ("x dense", "times_dense", 1, ".2f"),
    ("of ideal", "of_ideal", 100, ".0f"),
]
"""Title, key, factor and format; the spread is made of two keys."""
MISSING = "–"
TITLES = {
    "decode": "Decoding over what heads hold",
    "listed": "Decoding over lists",
    "latent": "Decoding over latents",
    "packed": "Decoding over few bits",
    "columns": "Column sums",
    "select": "Choosing pages and tokens",
    "prefill": "Prompts, dense",
    "block-sparse": "Prompts, block-sparse",
}


def kernels_part(data: dict[str, Any]) -> str:
    """A table for each family, what could not be timed, and how all was measured."""
    lines: list[str] = []
    for family in dict.fromkeys(row["family"] for row in data["rows"]):
        rows = [row for row in data["rows"] if row["family"] == family]
        if any(row.get("ms") for row in rows):
            lines += [f"**{TITLES.get(family, family)}**", "", *table(rows), ""]
    bounds = list(tiles(data["rows"]))
    if bounds:
        lines += ["**What tiles allow**", "", *bounds, ""]
    refused = [row for row in data["rows"] if row.get("refused")]
    lines += [f"- {place(row)}: {row['refused']}" for row in refused]
    machine, versions = data["rates"], ", ".join(f"{n} {v}" for n, v in sorted(data["versions"].items()))
    speed = f"reads {machine['bytes_per_s'] / 1e12:.2f} TB/s and multiplies at {machine['flops'] / 1e12:.0f} TFLOP/s"
    cache = "cold cache" if data["cold"] else "warm cache"
    absent = f" Not installed: {', '.join(data['absent'])}." if data["absent"] else ""
    made = f"{data['sizes']}, {cache}; {data['device']}, which {speed}; {versions}.{absent} `{data['command']}`"
    return "\n".join([*lines, *([""] if refused else []), made, ""])


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """One family; columns that no row fills are left out."""
    shown = [column for column in COLUMNS if not column[1] or any(row.get(column[1]) for row in rows)]
    yield f"| case | tokens | kernel | {' | '.join(title for title, *_ in shown)} |"
    yield f"|---|--:|---|{'--:|' * len(shown)}"
    for row in rows:
        if row.get("ms"):
            cells = " | ".join(cell(row, key, factor, how) for _, key, factor, how in shown)
            yield f"| {row['case']} | {row['length']:,} | {row['kernel']} | {cells} |"


def cell(row: dict[str, Any], key: str, factor: float, how: str) -> str:
    if not key:
        return f"{row['ms_low']:.3f} to {row['ms_high']:.3f}"
    return format(row[key] * factor, how) + (" %" if factor == 100 else "") if row.get(key) else MISSING


def place(row: dict[str, Any]) -> str:
    """A row in words."""
    kernel = f", {row['kernel']}" if row["kernel"] else ""
    return f"{row['family']}, {row['case']}, {row['length']:,} tokens{kernel}"


def tiles(rows: list[dict[str, Any]]) -> Iterator[str]:
    """What pairs promise of each selection, and what is left of it in tiles."""
    found = {(row["case"], row["length"]): row["tiles"] for row in rows if row.get("tiles")}
    if found:
        one = next(iter(found.values()))
        yield f"| selection | tokens | pairs | tiles of {one['q']} x {one['k']} | tiles filled with listed keys |"
        yield "|---|--:|--:|--:|--:|"
    for (case, length), each in found.items():
        cells = (f"{each[key]:.1f} x" for key in ("pair_speed_up", "speed_up", "gathered_speed_up"))
        yield f"| {case} | {length:,} | {' | '.join(cells)} |"
