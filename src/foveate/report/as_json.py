"""The comparison for programs: what `--json` prints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from foveate.evaluate.record import Record
from foveate.evaluate.statistics import Paired
from foveate.report.recommend import RULE, recommend_view
from foveate.report.rows import Row, View
from foveate.report.summary import overall


def _paired(result: Paired | None) -> dict[str, Any] | None:
    if result is None:
        return None
    return {**asdict(result), "loss": result.loss, "gain": result.gain, "can_detect": result.can_detect}


def _row(row: Row) -> dict[str, Any]:
    data = asdict(row)
    data.update(name=row.name, complete=row.complete, lengths=list(row.lengths), loss_tasks=list(row.loss_tasks))
    data["score_vs_dense"], data["loss_vs_dense"] = _paired(row.score_vs_dense), _paired(row.loss_vs_dense)
    data["refusals"] = [asdict(refusal) for refusal in row.refusals]
    return data


def _view(view: View) -> dict[str, Any]:
    advice = recommend_view(view)
    return {
        "model": view.model,
        "question_seen": view.question_seen,
        "lengths": list(view.lengths),
        "tasks": list(view.tasks),
        "samples": view.samples,
        "dense_bytes": view.dense_bytes,
        "quality": view.quality,
        "recommendation": {
            "kind": advice.kind,
            "sentence": advice.sentence,
            "row": None if advice.row is None else advice.row.name,
        },
        "rows": [_row(row) for row in view.rows],
    }


def summary_json(records: Sequence[Record]) -> dict[str, Any]:
    """Rows, fronts, intervals and recommendations as plain JSON values; one entry of `views` per model and use."""
    return {
        "rule": RULE,
        "cells": len(records),
        "devices": sorted({record.device for record in records if record.device}),
        "versions": {name: version for record in records for name, version in sorted(record.versions.items())},
        "commands": sorted({record.command for record in records if record.command}),
        "views": [_view(view) for view in overall(records)],
    }
