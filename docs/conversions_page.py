"""Tables of measured conversions in docs/*.md: ladders and healing, and checkpoints beside inference methods."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from foveate.evaluate.record import RECORDS, Record, read
from foveate.report import quantities as q


def conversions_part(folder: Path) -> str:
    """What the folder's ladders and records say."""
    ladders = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    ladders = [data for data in ladders if "ladder" in data]
    lines = [*_ladders(ladders), ""] if ladders else []
    if (folder / RECORDS).is_file():
        lines += [*_beside(read(folder)), ""]
    return "\n".join(lines)


def _ladders(ladders: Sequence[dict[str, Any]]) -> Iterator[str]:
    """One table for each machine and amount of text."""
    yield "### Before and after healing"
    for key in dict.fromkeys(_place(data) for data in ladders):
        mine = [data for data in ladders if _place(data) == key]
        device, calibrated, probed = key
        yield ""
        yield "| conversion | settings | cache | perplexity, stage by stage | healed on | seconds | perplexity | KL |"
        yield "|---|---|--:|---|--:|--:|---|---|"
        yield from (f"| {' | '.join(_row(data))} |" for data in mine)
        yield ""
        versions = ", ".join(f"{name} {version}" for name, version in sorted(mine[0]["versions"].items()))
        yield (
            f"smollm2, calibrated on {calibrated:,} tokens of the {mine[0]['text']['name']}; stages measured on "
            f"{probed:,} held-out tokens in sequences of 512, healing on 65,536 in sequences of 1,024. {device}; "
            f"{versions}."
        )


def _place(data: dict[str, Any]) -> tuple[str, int, int]:
    return data["device"], data["calibration_tokens"], data["probe_tokens"]


def _row(data: dict[str, Any]) -> list[str]:
    settings = ", ".join(f"{name}={value}" for name, value in data["set"].items()) or q.MISSING
    stages = " → ".join(f"{rung['perplexity']:,.1f}" for rung in data["ladder"])
    healed = [q.MISSING] * 4
    if (healing := data.get("healing")) is not None:
        first, last = healing["evaluations"][0], healing["evaluations"][-1]
        healed = [
            f"{healing['tokens'] / 1e6:.1f} M",
            f"{healing['seconds']:.0f}",
            f"{first['perplexity']:,.2f} → {last['perplexity']:.2f} (teacher {healing['teacher_perplexity']:.2f})",
            f"{first['kl']:.2f} → {last['kl']:.3f}",
        ]
    name = f"{data['to']} of {data['from']}" if data.get("from") else data["to"]
    return [name, settings, q.percent(data["ladder"][-1]["share"]), stages, *healed]


def _beside(records: Sequence[Record]) -> Iterator[str]:
    """Checkpoints and methods in one table, by the bytes that they hold."""
    tasks = list(dict.fromkeys(record.cell.task for record in records))
    rows: dict[tuple[str, str | None], dict[str, Record]] = {}
    for record in records:
        if record.status == "done":
            rows.setdefault((record.cell.method, record.cell.budget), {})[record.cell.task] = record
    yield "### Beside methods that hold as much"
    yield ""
    yield f"| row | budget | KV held | {' | '.join(tasks)} |"
    yield f"|---|--:|--:|{'--:|' * len(tasks)}"
    for (method, budget), found in sorted(rows.items(), key=lambda item: -_share(item[1])):
        values = [f"{fmean(found[task].scores):.2f}" if task in found else q.MISSING for task in tasks]
        row = method.replace("|", "\\|")
        yield f"| {' | '.join([row, budget or q.MISSING, q.percent(_share(found)), *values])} |"
    yield ""
    last = records[-1]
    yield (
        f"{last.cell.length:,} tokens, {len(last.scores)} samples, question not seen; perplexity stands as the mean "
        f"loss in nats. {last.device}. `{last.command}`"
    )


def _share(found: dict[str, Record]) -> float:
    shares = [r.kv_bytes / r.kv_bytes_dense for r in found.values() if r.kv_bytes and r.kv_bytes_dense]
    return fmean(shares) if shares else 0.0
