"""`foveate tune`: the cheapest method and setting that keep a model's quality."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from foveate.cli.options import AsJson, Devices, Dtype, ModelName, Ray, RayWorkers, whole_numbers
from foveate.cli.screen import Watcher, print_json, quiet_loading, say


def tune(
    model: ModelName = "smollm2",
    target: Annotated[
        str, typer.Option(help="What to save: kv-bytes (held), decode (time per token) or prefill (time of a prompt).")
    ] = "",
    max_loss: Annotated[str, typer.Option(help="What may be lost, as a share of dense's score: 1% or 0.01.")] = "",
    methods: Annotated[str, typer.Option(help='Ids to choose from, separated by commas. Default: "all".')] = "",
    lengths: Annotated[str, typer.Option(help="Context lengths in tokens, separated by commas.")] = "",
    tasks: Annotated[str, typer.Option(help="Tasks or groups, separated by commas.")] = "",
    samples: Annotated[int | None, typer.Option(help="Samples per length and task, of a trial and the check.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the samples and of the search.")] = 0,
    minutes: Annotated[float | None, typer.Option(help="Time for the search; the check comes after it.")] = None,
    trials: Annotated[int | None, typer.Option(help="At most this many new trials.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the search; goes on with a search that is there.")] = None,
    question_seen: Annotated[
        bool, typer.Option("--question-seen", help="Let methods see the question while they compress the context.")
    ] = False,
    corpus: Annotated[
        Path | None, typer.Option(help="Text file or folder to make haystacks from. Default: Python's documentation.")
    ] = None,
    profile: Annotated[list[Path] | None, typer.Option(help="Calibration file; may be given several times.")] = None,
    dtype: Dtype = "auto",
    device: Devices = "auto",
    ray: Ray = "",
    ray_workers: RayWorkers = None,
    as_json: AsJson = False,
) -> None:
    """Find the method and setting that save most and lose at most --max-loss on this model and machine.

    The winner is checked on fresh samples beside dense and written to tuned.json in the folder, which foveate.apply
    takes. Exits with 1 if nothing held. Needs the extra "tune".
    """
    from datetime import datetime

    folder = out if out is not None else Path("runs") / datetime.now().strftime("tune-%Y-%m-%d-%H%M%S")
    given = {
        "target": target,
        "max_loss": max_loss,
        "methods": methods,
        "lengths": whole_numbers("lengths", lengths),
        "tasks": tasks,
        "samples": samples,
        "minutes": minutes,
        "trials": trials,
    }
    quiet_loading(model)
    try:
        with Watcher("tune") as watch:
            watch(0, 0, "loading")
            from foveate.tuning.tune import tune as run

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
                note=say,
                **{name: value for name, value in given.items() if value not in ("", None, ())},
            )
    except KeyboardInterrupt:
        say(f"stopped: the same command with --out {folder} goes on from there")
        raise typer.Exit(130) from None
    if as_json:
        print_json(done.summary)
    else:
        print(done.text)
    if done.file is None:
        raise typer.Exit(1)
