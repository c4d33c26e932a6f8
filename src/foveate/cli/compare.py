"""`foveate compare`: methods × budgets × lengths × tasks on one model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from foveate.cli.options import AsJson, Devices, Dtype, ModelName, Ray, RayWorkers, whole_numbers
from foveate.cli.screen import Watcher, print_json, quiet_loading, say


def compare(
    model: ModelName = "smollm2",
    methods: Annotated[
        str,
        typer.Option(help='Names, "all", "core" or tuned.json files, by commas; "A|B" composes, "kivi(bits=2)" sets.'),
    ] = "",
    budgets: Annotated[
        str, typer.Option(help="Shares of the dense cache or pairs (0.25), tokens per head (1024) or bytes (64MB).")
    ] = "",
    lengths: Annotated[str, typer.Option(help="Context lengths in tokens, separated by commas.")] = "",
    tasks: Annotated[str, typer.Option(help='Tasks or groups ("needles", "all"), separated by commas.')] = "",
    samples: Annotated[int | None, typer.Option(help="Samples per length and task.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run; resumes a run that is there.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the samples.")] = 0,
    question_seen: Annotated[
        bool, typer.Option("--question-seen", help="Let methods see the question while they compress the context.")
    ] = False,
    corpus: Annotated[
        Path | None, typer.Option(help="Text file or folder to make haystacks from. Default: Python's documentation.")
    ] = None,
    repeats: Annotated[int | None, typer.Option(help="Repeats of each timing; 0 measures no times.")] = None,
    profile: Annotated[list[Path] | None, typer.Option(help="Calibration file; may be given several times.")] = None,
    dtype: Dtype = "auto",
    device: Devices = "auto",
    ray: Ray = "",
    ray_workers: RayWorkers = None,
    as_json: AsJson = False,
) -> None:
    """Compare methods on one model: quality, bytes held, prefill and decode time.

    Without arguments this is the demo: every method on the built-in model. The table goes to stdout, everything to the
    folder of the run: records.jsonl, run.json and report.html.
    """
    from datetime import datetime

    folder = out if out is not None else Path("runs") / datetime.now().strftime("%Y-%m-%d-%H%M%S")
    given = {
        "methods": methods,
        "budgets": budgets,
        "lengths": whole_numbers("lengths", lengths),
        "tasks": tasks,
        "samples": samples,
        "repeats": repeats,
    }
    quiet_loading(model)
    try:
        with Watcher("compare") as watch:
            watch(0, 0, "loading")
            from foveate.comparison import compare as run

            done = run(
                model,
                out=folder,
                seed=seed,
                question_seen=question_seen,
                corpus=corpus,
                profiles=profile or (),
                dtype=dtype,
                device=device,
                ray=ray,
                ray_workers=ray_workers,
                watch=watch,
                **{name: value for name, value in given.items() if value not in ("", None, ())},
            )
    except KeyboardInterrupt:
        say(stopped(folder))
        raise typer.Exit(130) from None
    if as_json:
        print_json({**done.summary, "out": str(done.out), "report": str(done.report)})
        return
    from rich.console import Console

    from foveate.report import print_report

    print_report(done.records)
    Console().print(f"report: {done.report}", style="bold", soft_wrap=True)


def stopped(folder: Path) -> str:
    """What to say after Ctrl-C."""
    from foveate.evaluate.record import RECORDS, read

    if not (folder / RECORDS).is_file():
        return "stopped; nothing was written"
    return (
        f"stopped; {len(read(folder))} cells are in {folder}: the same command with --out {folder} goes on from there"
    )
