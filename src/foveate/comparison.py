"""compare: the main job. Methods × budgets × lengths × tasks on one model, measured, recorded and reported."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from datetime import datetime
from functools import cached_property
from inspect import cleandoc
from io import StringIO
from pathlib import Path
from typing import Any

from foveate.errors import BadArgument, FoveateError
from foveate.evaluate.checkpoint import Checkpoint
from foveate.evaluate.notation import Part
from foveate.evaluate.record import Record
from foveate.evaluate.request import Request, Watch
from foveate.evaluate.scale import Here, Spread
from foveate.evaluate.setting import CORE, MethodLike, parse_budgets, parse_methods, settings_of, text_of
from foveate.methods.base import Profile
from foveate.methods.budget import Budget
from foveate.models import Loaded, load
from foveate.models.shape import ModelShape
from foveate.report import MethodCard, report, summary_json, write_report
from foveate.tasks import corpus as open_corpus
from foveate.tasks import expand_tasks

METHODS_ASKED = (CORE,)
BUDGETS = (0.5,)
LENGTHS = (1024,)
TASKS = ("niah_single_2", "niah_multikey_1")
SAMPLES = 6
REPEATS = 2
"""What is compared when nothing else is asked for: sized so that two cores finish in a few minutes."""

_ROOM = 2**20  # bytes: less than this holds no run


@dataclass(frozen=True)
class Comparison:
    """The outcome of `compare`.

    Args:
        records: one per cell, refused ones included.
        out: the folder that holds `records.jsonl`, `run.json` and `report.html`.
        report: the page.
    """

    records: tuple[Record, ...]
    out: Path
    report: Path

    @cached_property
    def summary(self) -> dict[str, Any]:
        """Rows, fronts, intervals and recommendations as plain JSON values."""
        return summary_json(self.records)

    @property
    def table(self) -> str:
        """The table and the recommendation as text."""
        from rich.console import Console

        console = Console(file=StringIO(), width=120, color_system=None)
        console.print(report(self.records))
        return console.file.getvalue()  # type: ignore[attr-defined]


def compare(
    model: Any = "smollm2",
    *,
    methods: str | MethodLike | Iterable[MethodLike] = METHODS_ASKED,
    budgets: str | float | Iterable[Budget | float | int | str] | None = BUDGETS,
    lengths: int | Iterable[int] = LENGTHS,
    tasks: str | Iterable[str] = TASKS,
    samples: int = SAMPLES,
    out: str | os.PathLike[str] | None = None,
    seed: int = 0,
    question_seen: bool = False,
    corpus: str | os.PathLike[str] | None = None,
    repeats: int = REPEATS,
    profiles: str | Path | Profile | Iterable[str | Path | Profile] = (),
    dtype: Any = "auto",
    device: Any = "auto",
    resume: bool = True,
    tokenizer: Any = None,
    ray: bool | str = False,
    ray_workers: int | None = None,
    watch: Watch = lambda done, total, what: None,
) -> Comparison:
    """Measure what methods keep of a model's quality, and what they cost, beside dense attention.

    Every method gets the same samples. Those that leave the prompt's attention dense share one pass over it. Budgets
    are shares of the dense cache (methods that hold less) or of the dense pairs (methods that read less); what a method
    cannot meet is recorded as refused, with its floor. One record is written per cell of the grid; the same call with
    the same `out` goes on where an earlier one was stopped.

    Args:
        model: a name, folder or file as for `foveate.load`, or an opened model (then give its `tokenizer`).
        methods: names, methods or compositions, files of `foveate tune`, "all" for every method, "core" for the few
            that show every kind; see `evaluate.setting.parse_methods`.
        budgets: 0.25 is a ratio, 1024 tokens per head, "64MB" bytes; None lets each method's own parameters decide.
        lengths: context lengths in tokens, the answer's reserve counted in.
        tasks: names of tasks or groups ("needles", "all").
        samples: per length and task.
        out: the run's folder; default `runs/<time>`.
        seed: of the samples.
        question_seen: let methods see the question while they compress the context.
        corpus: a text file or a folder of them to make haystacks from; default: Python's own documentation.
        repeats: how often each time is measured, 0 to measure none.
        profiles: calibration files for methods that need one and have none built in.
        dtype, device: as for `foveate.load`.
        resume: False refuses a folder that holds records already.
        ray: spread the groups (one length and task) over the GPUs or cores of this machine with Ray, or over those of
            the cluster at an address. The model must then be given by name; the records are the same.
        ray_workers: at most so many at a time, each with a GPU or a share of the cores; None: one for each of these.
        watch: told (work done, work in all, what is at work).

    Raises:
        BadArgument, Refused: an argument that cannot be used; nothing has been written then.
    """
    entries = parse_methods(methods)
    granted = parse_budgets(budgets)
    settings = settings_of(entries, granted)
    chosen = expand_tasks(tasks)
    if samples < 1:
        raise BadArgument("samples", samples, "give at least 1")
    if repeats < 0:
        raise BadArgument("repeats", repeats, "give 0 (no timing) or more")
    sizes = lengths_of(lengths)
    text = open_corpus(None if corpus is None else Path(corpus))
    folder = Path(out) if out is not None else Path("runs") / datetime.now().strftime("%Y-%m-%d-%H%M%S")
    if not resume and (folder / "records.jsonl").exists():
        raise BadArgument("out", str(folder), "holds a run already; give another folder, or let it resume")
    check_room(folder)
    given = [profiles] if isinstance(profiles, str | Path | Profile) else list(profiles)
    with open_place(model, tokenizer, dtype, device, ray, ray_workers) as place:
        request = Request(
            model=place.name,
            lengths=sizes,
            tasks=tuple(chosen),
            samples=samples,
            seed=seed,
            question_seen=question_seen,
            repeats=repeats,
            corpus=text,
            command=command_line(
                "compare",
                place.name,
                folder,
                {
                    "--methods": (text_of(entries), CORE),
                    "--budgets": (listed(granted), listed(parse_budgets(BUDGETS))),
                    "--lengths": (listed(sizes), listed(LENGTHS)),
                    "--tasks": (listed(task.name for task in chosen), listed(TASKS)),
                    "--samples": (str(samples), str(SAMPLES)),
                    "--seed": (str(seed), "0"),
                    "--corpus": (str(corpus), "None"),
                    "--repeats": (str(repeats), str(REPEATS)),
                    "--profile": (listed(p.method if isinstance(p, Profile) else p for p in given), ""),
                    "--dtype": (str(dtype).removeprefix("torch."), "auto"),
                    "--device": (str(device), "auto"),
                    **ray_options(ray, ray_workers),
                },
                {"--question-seen": question_seen},
            ),
        )
        records = place.run(request, settings, folder, profiles=given, watch=watch)
        shared = place.shared(request)
    cards = [card(part) for entry in entries for part in entry.parts]
    cards += [checkpoint_card(entry.checkpoint) for entry in entries if entry.checkpoint is not None]
    page = write_report(records, cards, folder, shared)
    return Comparison(tuple(records), folder, page)


def card(part: Part) -> MethodCard:
    """A method, or a reader, in words, for the report."""
    summary = cleandoc(part.__doc__ or "").partition("\n\n")[0].replace("\n", " ")
    settings = {f.name: getattr(part, f.name) for f in fields(part) if f.name != "budget"}
    return MethodCard(
        id=part.id,
        name=part.name,
        paper=part.paper,
        slots=tuple(sorted(part.slots)),
        summary=summary,
        settings=settings,
    )


def checkpoint_card(checkpoint: Checkpoint) -> MethodCard:
    """A converted model in words, for the report."""
    summary = f"Another checkpoint in the place of the model, from {checkpoint.folder}."
    return MethodCard(id=checkpoint.id, name=checkpoint.id, slots=("weights",), summary=summary)


def lengths_of(lengths: int | Iterable[int]) -> tuple[int, ...]:
    """Context lengths, each once, the shortest first."""
    sizes = (lengths,) if isinstance(lengths, int) else tuple(dict.fromkeys(lengths))
    if not sizes:
        raise BadArgument("lengths", list(sizes), "give at least one length in tokens")
    for size in sizes:
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise BadArgument("lengths", size, "give whole numbers of tokens")
    return tuple(sorted(sizes))


def check_room(folder: Path) -> None:
    """Say now, rather than after the model was loaded and half a folder made, that nothing can be written there."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise BadArgument("out", str(folder), f"nothing can be written to {place}; give another folder")
    if shutil.disk_usage(place).free < _ROOM:
        raise FoveateError(f"{place}: no space left to write; free some and run the same command again")


def open_model(model: Any, tokenizer: Any, dtype: Any, device: Any) -> tuple[str, Loaded]:
    """The model's name in records, and the model with its tokenizer."""
    if isinstance(model, str | os.PathLike):
        return str(model), load(os.fspath(model), dtype=dtype, device=device)
    if isinstance(model, Loaded):
        model, tokenizer = model
    if tokenizer is None:
        raise BadArgument("tokenizer", None, "give the tokenizer of the opened model")
    if not hasattr(model, "config"):
        raise BadArgument("model", type(model).__name__, "give a name, a folder or an opened transformers model")
    return ModelShape.of(model).name, Loaded(model.eval(), tokenizer)


def open_place(
    model: Any, tokenizer: Any, dtype: Any, device: Any, ray: bool | str, workers: int | None
) -> Here | Spread:
    """Where a run is measured: in this process, or by the workers of Ray.

    Raises:
        BadArgument: as `open_model` and `RayCrew`; or a model that workers cannot open by themselves.
        FoveateError: ray is not installed.
    """
    if not ray:
        if workers is not None:
            raise BadArgument("ray_workers", workers, "give ray (--ray), too")
        return Here(*open_model(model, tokenizer, dtype, device))
    if not isinstance(model, str | os.PathLike):
        mend = "with ray every worker opens the model by itself; give its name, folder or file"
        raise BadArgument("model", type(model).__name__, mend)
    from foveate.evaluate.cluster import RayCrew

    address = ray if isinstance(ray, str) and ray != "local" else ""
    crew = RayCrew(os.fspath(model), dtype=dtype, device=device, address=address, workers=workers)
    return Spread(str(model), crew)


def ray_options(ray: bool | str, workers: int | None) -> dict[str, tuple[str, str]]:
    """The options of a command line that spread it."""
    return {
        "--ray": ("local" if ray is True else ray or "", ""),
        "--ray-workers": (str(workers), "None"),
    }


def command_line(
    command: str, model: str, out: Path, options: Mapping[str, tuple[str, str]], flags: Mapping[str, bool]
) -> str:
    """The command line that repeats the run; options that have their default are left out.

    Args:
        options: value and default by option.
    """
    words = ["foveate", command, model]
    for option, (value, default) in options.items():
        if value != default:
            words += [option, value]
    words += [flag for flag, on in flags.items() if on]
    return shlex.join([*words, "--out", str(out)])


def listed(values: Iterable[object]) -> str:
    """Values as an option takes them."""
    return ",".join(map(str, values))
