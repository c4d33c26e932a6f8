"""`ladder.json` of a converted model, and how its numbers are written."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foveate.errors import BadArgument
from foveate.report import quantities

LADDER = "ladder.json"

QUESTIONS = {"needles": "needles found", "retrieval": "passages found"}
"""What may be asked after every stage, by the rung's field, and the words for an answer."""

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Column:
    """One thing that was measured after every stage.

    Args:
        name: of the rung's field. heading: over the column.
        values: one a rung. cells: each value written out, and how it compares with the first, or nothing.
    """

    name: str
    heading: str
    values: list[Any]
    cells: list[tuple[str, str]]


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


def columns(record: Record) -> list[Column]:
    """What is known of the rungs beside their names, as far as anything is."""
    rungs, first = record["rungs"], record["rungs"][0]

    def against_first(name: str, rung: Record) -> str:
        known = rung is not first and rung.get(name) is not None and first.get(name)
        return quantities.times(rung[name] / first[name]) if known else ""

    written: list[tuple[str, str, Callable[[int, Record], tuple[str, str]]]] = [
        ("error", "Error", lambda index, rung: (error(exact_error(record, index)), "")),
        ("kl", "KL", lambda index, rung: (kl(rung["kl"]), "")),
        ("perplexity", "Perplexity", lambda i, rung: (number(rung["perplexity"]), against_first("perplexity", rung))),
        ("similarity", "Similarity", lambda index, rung: (number(rung["similarity"], 4), "")),
        ("needles", "Needles", lambda index, rung: (quantities.percent(rung["needles"]), "")),
        ("retrieval", "Retrieved", lambda index, rung: (quantities.percent(rung["retrieval"]), "")),
        ("kv_bytes", "Cache per token", lambda i, rung: (quantities.bytes_text(rung["kv_bytes"]), "")),
        ("parameters", "Parameters", lambda index, rung: (f"{rung['parameters']:,}", "")),
        ("share", "Share", lambda index, rung: (quantities.percent(rung["share"]), "")),
        ("seconds", "Time", lambda index, rung: (quantities.seconds(rung["seconds"]), "")),
    ]
    return [
        Column(name, heading, [rung.get(name) for rung in rungs], [spell(i, rung) for i, rung in enumerate(rungs)])
        for name, heading, spell in written
        if all(name in rung for rung in rungs) and any(rung[name] is not None for rung in rungs)
    ]


def per_layer(record: Record) -> Iterator[tuple[str, str, list[Any]]]:
    """(stage, what, one number a layer, or one list of shares a layer) of what stages told layer by layer."""
    for rung in record["rungs"]:
        for name, value in rung["facts"].items():
            if isinstance(value, list) and len(value) == record["layers"] and (_numbers(value) or _shares(value)):
                yield rung["stage"], name, value


def _shares(value: list[Any]) -> bool:
    """Lists of shares of one whole each, all of as many."""
    return all(_numbers(each) and len(each) == len(value[0]) and abs(sum(each) - 1) < 1e-3 for each in value)


def _numbers(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(each, int | float) for each in value)


def sentence(record: Record) -> str:
    """What came out, in one sentence."""
    first, last = record["rungs"][0], record["rungs"][-1]
    said = []
    if "kv_bytes" in last:
        held = f"{quantities.bytes_text(last['kv_bytes'])} of cache per token instead of "
        said.append(held + f"{quantities.bytes_text(first['kv_bytes'])} ({quantities.percent(last['share'])})")
    else:
        fewer = f"{last['parameters']:,} parameters instead of {first['parameters']:,}"
        said.append(f"{fewer} ({quantities.percent(last['parameters'] / first['parameters'])})")
    if "perplexity" in last:
        said.append(f"perplexity {number(last['perplexity'])} instead of {number(first['perplexity'])}")
    if "similarity" in last:
        said.append(f"vectors {number(last['similarity'], 4)} alike")
    for name, what in QUESTIONS.items():
        if last.get(name) is not None and first.get(name) is not None:
            said.append(f"{quantities.percent(last[name])} of {what} instead of {quantities.percent(first[name])}")
    return ", ".join(said) + "."


def asked(record: Record) -> str:
    """What was asked after every stage, in words; nothing where nothing was."""
    told = record.get("questions")
    if not told:
        return ""
    if "samples" in told:
        return (
            f"Needles: {told['samples']:,} prompts of {told['length']:,} tokens ({told['task']}), the same each time."
        )
    return f"Retrieved: of {told['passages']:,} held-out passages ({told['task']}), the same each time."


def served(record: Record) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """When models were measured in use, and (what, the figure at each of these times) as far as all are known."""
    times = {"before": record.get("before"), "after": record.get("after")}
    if record.get("converted"):
        times = {"before": times["before"], "converted": record["converted"], "healed": times["after"]}
    spelled = {
        "prefill_s": ("Prefill", quantities.seconds),
        "decode_ms": ("Decode, per token", quantities.milliseconds),
        "encode_ms": ("Encode, per sequence", quantities.milliseconds),
        "cache_bytes": ("Cache held, in all", quantities.bytes_text),
    }
    rows = [
        (words, [text(each[name]) for each in times.values() if each])
        for name, (words, text) in spelled.items()
        if all((each or {}).get(name) is not None for each in times.values())
    ]
    return list(times), rows


def how_served(record: Record) -> str:
    """Behind how much text, and how often, the models in use were timed."""
    after = record.get("after") or {}
    said = []
    if after.get("batch"):
        said.append(f"{after['batch']} sequences of {after['context']:,} tokens at a time")
    elif after.get("context"):
        said.append(f"with transformers' own cache behind {after['context']:,} tokens")
    if after.get("repeats"):
        said.append(f"the median of {after['repeats']}")
    return ", ".join([*said, f"on {record['device']} in {record['dtype']}"])
