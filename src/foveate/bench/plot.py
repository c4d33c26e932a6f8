"""A picture of a bench of kernels: times beside their floor, and the share of it that is reached."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from foveate.errors import BadArgument
from foveate.evaluate.record import write_atomically

KINDS = (".png", ".svg")


def check_name(path: str | os.PathLike[str]) -> Path:
    """The path of a picture, if it names a kind that can be drawn."""
    target = Path(path)
    if target.suffix.lower() not in KINDS:
        raise BadArgument("plot", str(path), "name a file that ends in .png or .svg")
    return target


def plot(data: Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
    """Draw a record of `kernels.bench`; the file appears whole or not at all.

    Raises:
        BadArgument: another suffix than .png or .svg, or no row with a time.
    """
    from matplotlib.figure import Figure

    target = check_name(path)
    rows = [row for row in data["rows"] if row.get("ms")]
    if not rows:
        raise BadArgument("plot", str(path), "no kernel was timed, there is nothing to draw")
    labels = [f"{row['family']}: {row['case']}, {row['length']:,}, {row['kernel']}" for row in rows]
    places = list(range(len(rows)))
    colours = ["#c2571a" if row["kernel"].startswith("foveate") else "#7d8594" for row in rows]
    figure = Figure(figsize=(13, 1.6 + 0.2 * len(rows)), layout="constrained")
    times, shares = figure.subplots(1, 2, sharey=True)
    spread = [[row["ms"] - row["ms_low"] for row in rows], [row["ms_high"] - row["ms"] for row in rows]]
    times.barh(places, [row["ms"] for row in rows], xerr=spread, color=colours, height=0.7, ecolor="#333333")
    times.scatter([row["floor_ms"] for row in rows], places, marker="|", s=60, color="black", zorder=3, label="floor")
    times.set(xscale="log", xlabel="milliseconds", title="time (20 % to 80 % of the repeats)")
    times.legend(loc="lower right")
    shares.barh(places, [100 * row["floor_share"] for row in rows], color=colours, height=0.7)
    shares.axvline(100, color="black", linewidth=0.8)
    shares.set(xlabel="% of the floor's speed", title="share of the floor")
    times.set_yticks(places, labels, fontsize=7)
    times.set_ylim(len(rows) - 0.4, -0.6)
    figure.suptitle(f"{data['device']} · {data['sizes']}", fontsize=10)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=target.suffix[1:].lower(), dpi=110)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(target, buffer.getvalue())
    return target
