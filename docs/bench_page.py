"""The table of a generation bench in docs/speed.md, from a record of `foveate bench e2e`, `decode` or `prefill`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from foveate.bench.crossing import sentence
from foveate.report import quantities as q

COLUMNS = [
    ("prompt, s", "prefill_ms", 1e-3, ".2f"),
    ("times its floor", "prefill_of_floor", 1, ".2f"),
    ("pairs read", "prefill_density", 100, ".0f"),
    ("x dense", "prefill_faster", 1, ".2f"),
    ("ms per token", "decode_ms", 1, ".2f"),
    ("floor", "decode_floor_ms", 1, ".2f"),
    ("times the floor", "decode_of_floor", 1, ".2f"),
    ("x dense", "decode_faster", 1, ".2f"),
    ("read per token, GB", "read_bytes", 1e-9, ".2f"),
    ("held, GB", "kv_bytes", 1e-9, ".2f"),
    ("peak, GB", "peak_bytes", 1e-9, ".1f"),
]
"""Title, key, unit and format; columns that no row has are left out, and those of dense beside itself."""
DENSE = "dense"


def bench_part(data: dict[str, Any]) -> str:
    """The rows as a Markdown table, what could not be had below it, and how all was measured."""
    rows = [row | dict(beside_dense(row, data["rows"])) for row in data["rows"]]
    shown = [column for column in COLUMNS if any(row.get(column[1]) for row in rows)]
    lines = [
        f"| method | tokens | {' | '.join(title for title, *_ in shown)} |",
        f"|---|--:|{'--:|' * len(shown)}",
    ]
    notes = []
    for row in rows:
        if row.get("refused"):
            notes.append(f"- {label(row)}, {row['length']:,} tokens: {row['refused']}.")
            continue
        values = (
            format(row[key] * unit, how) + (" %" if unit == 100 else "") if row.get(key) else q.MISSING
            for _, key, unit, how in shown
        )
        lines.append(f"| {label(row)} | {row['length']:,} | {' | '.join(values)} |")
    if any(row.get("arbitrary") for row in rows):
        notes.append("- \\* The calibration is made up: random weights have nothing to calibrate on.")
    shortest = min(row["length"] for row in rows)
    lengths = {row["length"] for row in rows}
    crossed = [f"- {sentence(found, shortest)}." for found in data.get("crossovers", []) if len(lengths) > 1]
    spent = [line for row in rows for line in where(row)]
    below = [part for part in ("\n".join(notes), "\n".join(crossed), "\n".join(spent), made(data)) if part]
    return "\n".join([*lines, "", "\n\n".join(below), ""])


def where(row: dict[str, Any], most: int = 6) -> Iterator[str]:
    """What the device did in the time of a row, the prompt and a token a line each."""
    for name, part in (("prefill", "prompt"), ("decode", "token")):
        if work := row.get(f"{name}_profile"):
            spent = (
                f"`{cut(each['name'])}` {each['ms']:,.2f} ms ({each['launches']:,.6g} x)" for each in work["kernels"]
            )
            shown = ", ".join(list(spent)[:most])
            yield f"- **{label(row)}**, {part} of {row['length']:,}: {shown}, idle {work['idle_ms']:,.2f} ms."


def cut(name: str, most: int = 32) -> str:
    """A kernel's name, as much of it as tells kernels apart for a reader."""
    return name if len(name) <= most else f"{name[: most - 1]}…"


def made(data: dict[str, Any]) -> str:
    """How the figures came about."""
    machine, versions = data["rates"], ", ".join(f"{n} {v}" for n, v in sorted(data["versions"].items()))
    speed = f"reads {machine['bytes_per_s'] / 1e12:.2f} TB/s and multiplies at {machine['flops'] / 1e12:.0f} TFLOP/s"
    model = f"{data['shape']} with random weights, {data['layers']} layers, bf16"
    note = f" {data['note']}" if data.get("note") else ""
    return f"{model}; {data['device']}, which {speed}; {versions}. `{data['command']}`{note}"


def label(row: dict[str, Any]) -> str:
    """The method with the settings that are not its defaults, and a star if its calibration was made up."""
    parts = []
    for name in row["method"].split("|"):
        given = row.get("settings", {}).get(name, {})
        text = ", ".join(f"{key}={value}" for key, value in given.items())
        parts.append(f"{name}({text})" if text else name)
    return "\\|".join(parts) + (" \\*" if row.get("arbitrary") else "")


def beside_dense(row: dict[str, Any], rows: list[dict[str, Any]]) -> Iterator[tuple[str, float]]:
    """How many times as fast as dense attention of the same record and length."""
    base = next((x for x in rows if x["method"] == DENSE and x["length"] == row["length"]), None)
    if base is None or row is base or not any(x["method"] not in (DENSE, "transformers") for x in rows):
        return
    for part in ("prefill", "decode"):
        if row.get(f"{part}_ms") and base.get(f"{part}_ms"):
            yield f"{part}_faster", base[f"{part}_ms"] / row[f"{part}_ms"]
