"""`foveate harness`: tasks of lm-evaluation-harness with a method at work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from foveate.cli.options import AsJson, Devices, Dtype, ModelName
from foveate.cli.screen import print_json, quiet_loading, say
from foveate.errors import BadArgument


def harness(
    model: ModelName = "smollm2",
    tasks: Annotated[str, typer.Option(help="Tasks as the harness names them, separated by commas.")] = "",
    method: Annotated[
        str, typer.Option(help='As in compare, such as "snapkv(budget=0.25)", or a tuned.json. Default: dense.')
    ] = "dense",
    limit: Annotated[float | None, typer.Option(help="Samples of each task; below 1 a share of them.")] = None,
    fewshot: Annotated[int | None, typer.Option(help="Examples before each question.")] = None,
    include: Annotated[Path | None, typer.Option(help="Folder with tasks of your own (YAML files).")] = None,
    batch_size: Annotated[int, typer.Option(help="Prompts that are read side by side.")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of what the harness draws.")] = 0,
    profile: Annotated[list[Path] | None, typer.Option(help="Calibration file; may be given several times.")] = None,
    out: Annotated[Path | None, typer.Option(help="File for the results as JSON.")] = None,
    dtype: Dtype = "auto",
    device: Devices = "auto",
    as_json: AsJson = False,
) -> None:
    """Run tasks of lm-evaluation-harness on a model with a method at work.

    Contexts are read as prompts, through the method's cache; continuations are scored behind them. Needs the extra
    "harness".
    """
    if batch_size < 1:
        raise BadArgument("batch_size", batch_size, "give at least 1")
    if limit is not None and limit <= 0:
        raise BadArgument("limit", limit, "give a number of samples, or a share of them")
    if out is not None and out.is_dir():
        raise BadArgument("out", str(out), "give a file")
    quiet_loading(model)
    from foveate.evaluate.record import write_atomically
    from foveate.harness import evaluate

    found = evaluate(
        model,
        tasks,
        method,
        limit=int(limit) if limit is not None and limit >= 1 else limit,
        fewshot=fewshot,
        include=include,
        seed=seed,
        batch_size=batch_size,
        profile=[str(path) for path in profile] if profile else None,
        dtype=dtype,
        device=device,
    )
    if out is not None:
        write_atomically(out, (json.dumps(found, indent=1) + "\n").encode())
    if as_json:
        print_json(found)
    else:
        print("\n".join(lines(found)))
    if found["method"] != "dense" and not found["saves"]:
        say(f"{found['method']} held and read as much as dense here: these prompts are too short for its settings")


def lines(found: dict[str, Any]) -> list[str]:
    """Results in words: a line for each value of each task, and what was held and read."""
    text = []
    for task, values in found["results"].items():
        for name, value in values.items():
            metric, _, how = name.partition(",")
            if isinstance(value, float) and not metric.endswith("_stderr"):
                error = values.get(f"{metric}_stderr,{how}")
                spread = f" ± {error:.4f}" if isinstance(error, float) else ""
                text.append(f"{task}  {metric}  {value:.4f}{spread}")
    names = {"kv_bytes": "bytes held", "pairs_prefill": "pairs in prefill", "pairs_decode": "pairs in decode"}
    shares = [f"{words} {found['held'][name]:.2f}" for name, words in names.items() if found["held"][name] is not None]
    return [*text, f"{found['method']}: {', '.join(shares)} of dense"]
