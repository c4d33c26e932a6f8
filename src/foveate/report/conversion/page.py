"""A conversion as one HTML page that needs no network, made of `ladder.json` alone."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from foveate.evaluate.record import write_atomically
from foveate.report import quantities
from foveate.report.conversion import ladder
from foveate.report.conversion.ladder import Record, read_ladder
from foveate.report.conversion.picture import bars, curve
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
            served=ladder.served(record),
            layers=[(stage, what, bars(values, what)) for stage, what, values in ladder.per_layer(record)],
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
    held = f"{quantities.bytes_text(last['kv_bytes'])} of dense {quantities.bytes_text(first['kv_bytes'])}"
    tiles = [
        ("Cache per token", quantities.percent(last["share"]), held),
        ("Perplexity", ladder.number(last["perplexity"]), f"original {ladder.number(first['perplexity'])}"),
    ]
    before, after = record.get("before") or {}, record.get("after") or {}
    if before.get("decode_ms") and after.get("decode_ms"):
        ratio = after["decode_ms"] / before["decode_ms"]
        note = f"per token on {record['device']} behind {after['context']:,} tokens, as a share of the original's time"
        tiles.append(("Decode", quantities.times(ratio), note))
    if before.get("needles") is not None and after.get("needles") is not None:
        note = f"original {quantities.percent(before['needles'])}, of {after['needle_samples']}"
        tiles.append(("Needles found", quantities.percent(after["needles"]), note))
    return tiles


def _loss(healing: dict[str, Any]) -> Any:
    points = [(entry["tokens"], entry["loss"]) for entry in healing["curve"] if entry["loss"] is not None]
    return curve(points, "loss by tokens trained on") if len(points) > 1 else None


def _spelled(settings: dict[str, Any]) -> list[tuple[str, str]]:
    return [(name, quantities.MISSING if value is None else str(value)) for name, value in settings.items()]
