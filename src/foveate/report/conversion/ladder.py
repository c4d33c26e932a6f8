"""`ladder.json` of a converted model, and how its numbers are written."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from foveate.errors import BadArgument
from foveate.report import quantities

LADDER = "ladder.json"

Record = Mapping[str, Any]


def read_ladder(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The record of a converted model.

    Raises:
        BadArgument: the folder holds none, or one that cannot be read.
    """
    path = Path(folder) / LADDER
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise BadArgument("folder", str(folder), f"holds no {LADDER}; give one that foveate convert wrote") from None
    except ValueError as error:
        raise BadArgument("folder", str(folder), f"its {LADDER} cannot be read ({error})") from None
    if not isinstance(record, dict) or not record.get("rungs"):
        raise BadArgument("folder", str(folder), f"its {LADDER} holds no rungs; give one that foveate convert wrote")
    return record


def number(value: float | None, digits: int = 2) -> str:
    """`12.34`, `1.2e+05`, or that it is not known."""
    if value is None:
        return quantities.MISSING
    return f"{value:.{digits}f}" if abs(value) < 1e4 else f"{value:.2g}"


def error(value: float | None) -> str:
    """An error of rounding: `3.1e-07`."""
    return quantities.MISSING if value is None else "0" if value == 0 else f"{value:.1e}"


def kl(value: float | None) -> str:
    """Nats: four decimals, and powers where they would be zeros."""
    if value is None:
        return quantities.MISSING
    return f"{value:.4f}" if abs(value) >= 1e-4 else "0" if abs(value) < 1e-12 else f"{value:.0e}"


def scalars(facts: Mapping[str, Any]) -> str:
    """What a stage said in single values: `rank 64 · rope_dim 16`."""
    named = ((name, value) for name, value in facts.items() if isinstance(value, int | float | str))
    return " · ".join(
        f"{name} {number(v, 4).rstrip('0').rstrip('.') if isinstance(v, float) else v}" for name, v in named
    )


def exact_error(record: Record, index: int) -> float | None:
    """By how much a stage that is exact moved the logits; None for the others.

    Behind a stage that is not exact the difference of both errors is all that is known of it.
    """
    rungs = record["rungs"]
    if not rungs[index]["exact"] or rungs[index]["error"] is None:
        return None
    if all(rung["exact"] for rung in rungs[:index]):
        return rungs[index]["error"]
    return abs(rungs[index]["error"] - rungs[index - 1]["error"])


def per_layer(record: Record) -> Iterator[tuple[str, str, list[float]]]:
    """(stage, what, one number a layer) of everything that stages told layer by layer."""
    for rung in record["rungs"]:
        for name, value in rung["facts"].items():
            if _numbers(value) and len(value) == record["layers"]:
                yield rung["stage"], name, value


def _numbers(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(each, int | float) for each in value)


def sentence(record: Record) -> str:
    """What came out, in one sentence."""
    first, last = record["rungs"][0], record["rungs"][-1]
    held = f"{quantities.bytes_text(last['kv_bytes'])} of cache per token instead of "
    held += f"{quantities.bytes_text(first['kv_bytes'])} ({quantities.percent(last['share'])})"
    return f"{held}, perplexity {number(last['perplexity'])} instead of {number(first['perplexity'])}."


def served(record: Record) -> list[tuple[str, str, str]]:
    """(what, before, after) of everything that was measured on both models in use."""
    before, after = record.get("before") or {}, record.get("after") or {}
    spelled = {
        "prefill_s": ("Prefill", quantities.seconds),
        "decode_ms": ("Decode, per token", quantities.milliseconds),
        "cache_bytes": ("Cache held, in all", quantities.bytes_text),
        "needles": ("Needles found", quantities.percent),
    }
    return [
        (words, text(before[name]), text(after[name]))
        for name, (words, text) in spelled.items()
        if before.get(name) is not None and after.get(name) is not None
    ]
