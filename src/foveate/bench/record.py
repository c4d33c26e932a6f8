"""What a bench measured, as one JSON file that says how to measure it again."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from foveate.bench.clock import rates
from foveate.evaluate.machine import describe, versions


def record(
    kind: str, command: str, device: torch.device, rows: Sequence[dict[str, Any]], **facts: Any
) -> dict[str, Any]:
    """One run: what was measured, on what, and the command that repeats it."""
    return {
        "kind": kind,
        "command": command,
        "device": describe(device),
        "versions": versions(),
        "rates": rates(device).as_json(),
        **facts,
        "rows": list(rows),
    }


def write(path: str | os.PathLike[str], data: dict[str, Any]) -> Path:
    """Write a record; the file appears whole or not at all."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        partial.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n")
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    return target
