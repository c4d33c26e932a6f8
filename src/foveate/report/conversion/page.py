"""A conversion as one HTML page that needs no network, made of `ladder.json` alone."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from foveate.evaluate.record import write_atomically
from foveate.report import quantities
from foveate.report.conversion import ladder
from foveate.report.conversion.ladder import Record, read_ladder
from foveate.report.conversion.picture import bars, curve, stacks
from foveate.report.html import PAGE, environment


def render_conversion(record: Record) -> str:
    """The page as text."""
    healing = record.get("healing")
    return (
        environment()
        .get_template("conversion/conversion.html.j2")
        .render(
            record=record,
            rungs=record["rungs"],
            last=record["rungs"][-1],
            first=record["rungs"][0],
            sentence=ladder.sentence(record),
            tiles=_tiles(record),
            columns=ladder.columns(record),
            pictures=_pictures(record),
            served=ladder.served(record),
            layers=[(stage, what, _by_layer(values, what)) for stage, what, values in ladder.per_layer(record)],
            loss=_loss(healing) if healing else None,
            healing=healing,
            export=record.get("export"),
            settings=_spelled(record["settings"]),
            n=ladder,
        )
    )


def write_conversion(folder: str | os.PathLike[str]) -> Path:
    """Writes `report.html` beside a folder's `ladder.json`, whole or not at all, and returns its path.

    Raises:
        BadArgument: the folder holds no ladder.
        FoveateError: the folder cannot be written or the disk is full.
    """
    path = Path(folder) / PAGE
    write_atomically(path, render_conversion(read_ladder(folder)).encode())
    return path


def _tiles(record: Record) -> list[tuple[str, str, str]]:
    """(heading, figure, note)."""
    first, last = record["rungs"][0], record["rungs"][-1]
    tiles = []
    if "kv_bytes" in last:
        held = f"{quantities.bytes_text(last['kv_bytes'])} of dense {quantities.bytes_text(first['kv_bytes'])}"
        tiles.append(("Cache per token", quantities.percent(last["share"]), held))
    else:
        share = quantities.percent(last["parameters"] / first["parameters"])
        tiles.append(("Parameters", share, f"{last['parameters']:,} of {first['parameters']:,}"))
    if "perplexity" in last:
        note = f"original {ladder.number(first['perplexity'])}"
        tiles.append(("Perplexity", ladder.number(last["perplexity"]), note))
    if "similarity" in last:
        tiles.append(("Similarity", ladder.number(last["similarity"], 4), "mean cosine to the original's vectors"))
    for name, words in ladder.QUESTIONS.items():
        if last.get(name) is not None and first.get(name) is not None:
            note = f"original {quantities.percent(first[name])}"
            tiles.append((words.capitalize(), quantities.percent(last[name]), note))
    before, after = record.get("before") or {}, record.get("after") or {}
    if before.get("decode_ms") and after.get("decode_ms"):
        ratio = after["decode_ms"] / before["decode_ms"]
        note = f"per token on {record['device']} behind {after['context']:,} tokens, as a share of the original's time"
        tiles.append(("Decode", quantities.times(ratio), note))
    if before.get("encode_ms") and after.get("encode_ms"):
        note = f"per sequence of {after['context']:,} tokens on {record['device']}, as a share of the original's time"
        tiles.append(("Encode", quantities.times(after["encode_ms"] / before["encode_ms"]), note))
    return tiles


def _pictures(record: Record) -> list[tuple[str, Any]]:
    """(what, a bar a stage) of what the ladder is read for."""
    stages = [f"{number} {rung['stage']}" for number, rung in enumerate(record["rungs"])]
    made = []
    for column in ladder.columns(record):
        if column.name not in ("perplexity", "similarity", *ladder.QUESTIONS, "kv_bytes", "parameters"):
            continue
        values, what = [value for value in column.values if value is not None], column.heading
        if len(values) != len(stages) or (column.name == "parameters" and len(set(values)) == 1):
            continue
        if column.name == "perplexity" and max(values) > 20 * min(values):
            values, what = [math.log10(value) for value in values], f"{what}, as a power of ten"
        elif column.name == "kv_bytes":
            values, what = [value / 1024 for value in values], f"{what}, KiB"
        elif column.name == "parameters":
            values, what = [value / 1e6 for value in values], f"{what}, millions"
        made.append((what, bars(values, f"{what}, stage by stage", stages)))
    return made


def _by_layer(values: list[Any], what: str) -> Any:
    return stacks(values, what) if isinstance(values[0], list) else bars(values, f"{what}, layer by layer")


def _loss(healing: dict[str, Any]) -> Any:
    points = [(entry["tokens"], entry["loss"]) for entry in healing["curve"] if entry["loss"] is not None]
    return curve(points, "loss by tokens trained on") if len(points) > 1 else None


def _spelled(settings: dict[str, Any]) -> list[tuple[str, str]]:
    return [(name, quantities.MISSING if value is None else str(value)) for name, value in settings.items()]
