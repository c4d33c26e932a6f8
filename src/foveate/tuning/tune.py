"""tune: the cheapest setting that keeps a model's quality, found, checked on fresh samples and written down."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from foveate import compat
from foveate.comparison import (
    TASKS,
    card,
    check_room,
    command_line,
    lengths_of,
    listed,
    open_place,
    ray_options,
)
from foveate.engine.apply import apply
from foveate.engine.tuned import Tuned
from foveate.errors import BadArgument, FoveateError
from foveate.evaluate.machine import describe, versions
from foveate.evaluate.record import DENSE, Record, write_atomically
from foveate.evaluate.request import Request, Watch, check_lengths
from foveate.evaluate.scale import Here, Spread
from foveate.evaluate.setting import Setting, bind
from foveate.methods.base import Composition, Profile
from foveate.methods.profile import built_in_profile, fingerprint, load_profile
from foveate.models.shape import ModelShape
from foveate.report import write_report
from foveate.tasks import corpus as open_corpus
from foveate.tasks import expand_tasks
from foveate.tuning.outcome import outcome, share
from foveate.tuning.space import Space
from foveate.tuning.study import CHUNK, Finding, Goal, Late, Search, settings
from foveate.tuning.verdict import Verdict, forewarning, level_of

TARGET = "kv-bytes"
MAX_LOSS = 0.01
LENGTHS = (512,)
SAMPLES = 8
MINUTES = 15.0

TUNED = "tuned.json"
CHECK = "check"
"""The folder, inside the search's, of the run that checks what was found."""

CHECKS = 3
"""Settings that are checked at most, from the cheapest on."""

STEP = 1.1
"""How much dearer the next one is at least: what is hardly dearer is hardly safer."""

CHECK_SEED = 10_000
"""Added to the seed for the samples of the check: far from those of the search."""

REPEATS = 3


@dataclass(frozen=True)
class Tuning:
    """The outcome of `tune`.

    Args:
        target, max_loss: what was asked for.
        out: the folder: `records.jsonl` and `study.jsonl` of the search, `check/` with records and report of the check.
        file: the tuned file, which `foveate.apply` takes; None where nothing held.
        setting: the winner as `foveate compare --methods` takes it; None where nothing held.
        verdict: what the check says of the winner, or of the last setting that was checked.
        checked: every setting that was checked, with its verdict.
        costs: of the winner as shares of dense's, measured in the check: kv-bytes, prefill, decode.
        trials: how many settings were judged on all samples, pruned, refused by the model, or stopped by the clock.
        refused: methods that this model cannot have, and why.
        note: what the number of samples cannot show, known beforehand; None where it can.
    """

    target: str
    max_loss: float
    out: Path
    file: Path | None
    setting: str | None
    verdict: Verdict | None
    checked: tuple[tuple[str, Verdict], ...]
    costs: dict[str, float | None]
    trials: dict[str, int]
    refused: dict[str, str]
    note: str | None

    @property
    def summary(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "target": self.target,
            "max_loss": self.max_loss,
            "setting": self.setting,
            "file": None if self.file is None else str(self.file),
            "costs": self.costs,
            "verdict": None if self.verdict is None else self.verdict.to_json(),
            "checked": [{"setting": text, **verdict.to_json()} for text, verdict in self.checked],
            "trials": self.trials,
            "refused": self.refused,
            "note": self.note,
            "out": str(self.out),
        }

    @property
    def text(self) -> str:
        """The outcome in a few lines."""
        tried = ", ".join(f"{count} {what}" for what, count in self.trials.items() if count)
        if self.setting is None:
            lines = [f"Nothing that was tried costs less {self.target} than dense and keeps the quality."]
            lines += [f"checked {text}: {verdict.sentence}" for text, verdict in self.checked]
        else:
            assert self.verdict is not None
            known = [f"{what} {value:.2f}" for what, value in self.costs.items() if value is not None]
            lines = [f"winner   {self.setting}", f"costs    {', '.join(known)} of dense"]
            lines += [f"quality  {self.verdict.sentence}"]
            lines += [f"         (cheaper, but it did not hold: {text})" for text, _ in self.checked[:-1]]
            lines += [f"file     {self.file}"]
        return "\n".join([*lines, f"trials   {tried}"])


def parse_loss(value: str | float) -> float:
    """`"1%"` or 0.01 -> 0.01.

    Raises:
        BadArgument: it is no share above 0 and below 1.
    """
    try:
        text = str(value).strip()
        loss = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        loss = 0.0
    if not 0 < loss < 1:
        raise BadArgument("max_loss", value, "give a share of dense's score above 0, such as 1% or 0.01")
    return loss


def tune(
    model: Any = "smollm2",
    *,
    target: str = TARGET,
    max_loss: str | float = MAX_LOSS,
    methods: str | Iterable[str] = "all",
    lengths: int | Iterable[int] = LENGTHS,
    tasks: str | Iterable[str] = TASKS,
    samples: int = SAMPLES,
    seed: int = 0,
    minutes: float = MINUTES,
    trials: int | None = None,
    out: str | os.PathLike[str] | None = None,
    question_seen: bool = False,
    corpus: str | os.PathLike[str] | None = None,
    profiles: str | Path | Profile | Iterable[str | Path | Profile] = (),
    dtype: Any = "auto",
    device: Any = "auto",
    tokenizer: Any = None,
    ray: bool | str = False,
    ray_workers: int | None = None,
    watch: Watch = lambda done, total, what: None,
    note: Callable[[str], None] = lambda words: None,
) -> Tuning:
    """Search the methods, their parameters and their compositions for the one that saves most on this model and machine
    and loses at most `max_loss`; check it on fresh samples; write it to `out/tuned.json`.

    Trials see a few samples first and more if they do well. Those that lose more than is allowed, as a paired interval
    has it, or cost more than the best, stop early. Every cell of a trial is an ordinary record in `out`. The same call
    with the same `out` goes on where an earlier one ended.

    Args:
        model: as for `foveate.compare`.
        target: "kv-bytes" (held after the prompt), "decode" (time per new token) or "prefill" (time of the prompt).
        max_loss: what may be lost, as a share of dense's mean score: "1%" or 0.01.
        methods: ids to choose from; "all" of those that can save the target.
        lengths, tasks, question_seen, corpus, profiles, dtype, device, tokenizer: as for `foveate.compare`.
        ray, ray_workers: as for `foveate.compare`: spread the lengths and tasks of each batch of trials, and of the
            check.
        samples: per length and task, of a whole trial (rounded up to an even number) and of the check.
        seed: of the samples and of the search.
        minutes: of the search; the check comes after it.
        trials: at most this many new trials; None: as many as there is time for.
        out: folder; default `runs/tune-<time>`.
        watch: told (work done, work in all, what is at work).
        note: told beforehand what so few samples cannot show.

    Raises:
        BadArgument, Refused: an argument that cannot be used; nothing has been written then.
        FoveateError: dense itself scores nothing on these tasks, the time was too short for a single trial, or optuna
            is missing.
    """
    loss = parse_loss(max_loss)
    space = Space.of(target, methods)
    sizes, chosen = lengths_of(lengths), expand_tasks(tasks)
    if samples < 1:
        raise BadArgument("samples", samples, "give at least 1")
    if not minutes > 0:
        raise BadArgument("minutes", minutes, "give a time above 0")
    if trials is not None and trials < 1:
        raise BadArgument("trials", trials, "give at least 1")
    if len({task.higher_is_better for task in chosen}) > 1:
        names = listed(task.name for task in chosen)
        raise BadArgument("tasks", names, "accuracies and losses have no common mean; give one kind of them")
    folder = Path(out) if out is not None else Path("runs") / datetime.now().strftime("tune-%Y-%m-%d-%H%M%S")
    check_room(folder)
    text = open_corpus(None if corpus is None else Path(corpus))
    given = [profiles] if isinstance(profiles, str | Path | Profile) else list(profiles)
    loaded = [p if isinstance(p, Profile) else load_profile(p) for p in given]
    short = forewarning(loss, samples, len(sizes) * len(chosen)) if all(t.chance is not None for t in chosen) else None
    with open_place(model, tokenizer, dtype, device, ray, ray_workers) as place:
        options = {
            "--target": (target, TARGET),
            "--max-loss": (f"{loss:g}", f"{MAX_LOSS:g}"),
            "--methods": (listed([methods] if isinstance(methods, str) else methods), "all"),
            "--lengths": (listed(sizes), listed(LENGTHS)),
            "--tasks": (listed(task.name for task in chosen), listed(TASKS)),
            "--samples": (str(samples), str(SAMPLES)),
            "--seed": (str(seed), "0"),
            "--minutes": (f"{minutes:g}", f"{MINUTES:g}"),
            "--corpus": (str(corpus), "None"),
            "--profile": (listed(p.method if isinstance(p, Profile) else p for p in given), ""),
            "--dtype": (str(dtype).removeprefix("torch."), "auto"),
            "--device": (str(device), "auto"),
            **ray_options(ray, ray_workers),
        }
        chunk = min(CHUNK, samples)
        request = Request(
            model=place.name,
            lengths=sizes,
            tasks=tuple(chosen),
            samples=chunk,
            seed=seed,
            question_seen=question_seen,
            repeats=int(target != "kv-bytes"),
            corpus=text,
            command=command_line("tune", place.name, folder, options, {"--question-seen": question_seen}),
        )
        shape, machine, refused = place.ask(survey, request, space, loaded)
        space = space.without(refused)
        if not space.methods:
            raise BadArgument("methods", methods, "; ".join(f"{n}: {why}" for n, why in refused.items()))
        goal = Goal(target, loss, -(-samples // chunk))
        terms = {
            "model": fingerprint(shape),
            "target": target,
            "max_loss": loss,
            "methods": space.methods,
            "lengths": sizes,
            "tasks": [task.name for task in chosen],
            "samples": samples,
            "seed": seed,
            "question_seen": question_seen,
        }
        if short is not None:
            note(f"{short}; what is found can only be a candidate")
        work = Work(place, request, folder, loaded, time.monotonic() + 60 * minutes, 60 * minutes, watch)
        folder.mkdir(parents=True, exist_ok=True)
        search = Search(folder, space, goal, terms, seed, work.chunk)
        work.search = search
        search.run(trials)
        if not search.findings() and not any(n for what, n in search.counts().items() if what != "stopped"):
            mend = "give more --minutes, or fewer --samples, --tasks or --lengths"
            raise FoveateError(f"no trial ended within {minutes:g} minutes: {mend}")
        checked, costs = work.check(finalists(search.findings()), goal, samples)
    held = checked[-1] if checked and checked[-1][1].status != "over" else None
    found = Tuning(
        target=target,
        max_loss=loss,
        out=folder,
        file=None if held is None else folder / TUNED,
        setting=None if held is None else held[0].text,
        verdict=checked[-1][1] if checked else None,
        checked=tuple((finding.text, verdict) for finding, verdict in checked),
        costs=costs if held is not None else {},
        trials=search.counts(),
        refused=refused,
        note=short,
    )
    if held is None:
        (folder / TUNED).unlink(missing_ok=True)
    else:
        needed = {m.id for m in held[0].composition.methods if built_in_profile(m.id, shape) is None}
        travelling = [profile for profile in loaded if profile.method in needed]
        facts = {k: v for k, v in found.summary.items() if k not in ("file", "out", "refused")}
        facts |= {"command": request.command, "device": machine, "versions": versions()}
        tuned = Tuned(held[0].composition, fingerprint(shape), travelling, facts)
        write_atomically(folder / TUNED, (json.dumps(tuned.to_json(), indent=1) + "\n").encode())
    return found


def survey(
    model: Any, tokenizer: Any, request: Request, space: Space, profiles: Iterable[Profile]
) -> tuple[ModelShape, str, dict[str, str]]:
    """What a search must know of a model: its shape, the machine it is on, and the methods that it cannot have.

    Raises:
        BadArgument: a length that it cannot have.
    """
    shape = ModelShape.of(model)
    check_lengths(request, shape, tokenizer)
    return shape, describe(*compat.devices(model)), unavailable(model, space, profiles)


def unavailable(model: Any, space: Space, profiles: Iterable[Profile]) -> dict[str, str]:
    """Methods that this model cannot have at any budget, and why."""
    given = {profile.method: profile for profile in profiles}
    found = {}
    with apply(model, DENSE) as handle:
        for composition in [Composition((cls(),)) for cls in space.classes]:
            (_, setting) = settings([composition])
            bound = bind(handle, setting, given)
            if bound.binding is None and bound.floor is None:
                found[composition.id] = bound.refused or ""
    return found


def finalists(findings: list[Finding]) -> list[Finding]:
    """What is checked: the cheapest, and dearer ones in case it does not hold."""
    found: list[Finding] = []
    for one in findings:
        if len(found) < CHECKS and (not found or one.cost >= STEP * found[-1].cost):
            found.append(one)
    return found


@dataclass
class Work:
    """Runs what the search and the check ask for, and watches the clock."""

    place: Here | Spread
    request: Request
    folder: Path
    profiles: list[Profile]
    deadline: float
    seconds: float
    watch: Watch
    search: Search | None = None

    def chunk(self, number: int, rows: Sequence[Setting]) -> list[Record]:
        """One chunk of samples of some settings.

        Raises:
            Late: the time is over; what was measured is in the folder.
        """
        request = replace(self.request, seed=self.request.seed + number)
        return self._run(request, rows, self.folder, self._on_time())

    def _run(self, request: Request, rows: Sequence[Setting], folder: Path, watch: Watch) -> list[Record]:
        wanted = {method.id for row in rows for method in row.composition.methods}
        profiles = [profile for profile in self.profiles if profile.method in wanted]
        return self.place.run(request, rows, folder, profiles=profiles, watch=watch)

    def _on_time(self) -> Watch:
        """A watch that raises `Late` at the deadline."""
        best = self.search.best if self.search is not None else None
        tried = sum(self.search.counts().values()) if self.search is not None else 0
        known = "" if best is None else f", best {best:.2f} of dense"

        def watch(done: float, total: float, what: str) -> None:
            left = self.deadline - time.monotonic()
            if left <= 0:
                raise Late
            self.watch(self.seconds - left, self.seconds, f"{tried} trials{known}: {what}")

        return watch

    def check(
        self, findings: list[Finding], goal: Goal, samples: int
    ) -> tuple[list[tuple[Finding, Verdict]], dict[str, float | None]]:
        """Each finding on fresh samples beside dense, until one holds; and what that one costs."""
        request = replace(self.request, samples=samples, seed=self.request.seed + CHECK_SEED, repeats=REPEATS)
        folder = self.folder / CHECK
        cells = len(request.lengths) * len(request.tasks)
        checked: list[tuple[Finding, Verdict]] = []
        records: list[Record] = []
        costs: dict[str, float | None] = {}
        for number, finding in enumerate(findings):
            rows = settings([finding.composition])
            label = f"check of {finding.composition.id}: "
            new = self._run(request, rows, folder, lambda a, b, what, label=label: self.watch(a, b, label + what))
            mine = [r for r in new if r.cell.method != DENSE]
            dense = [r for r in new if r.cell.method == DENSE]
            records += mine if records else [*dense, *mine]
            seen = outcome(goal.target, mine, dense, level=level_of(number))
            if seen is None:  # refused at a length of prompt that the search had not seen
                continue
            verdict = Verdict(seen, goal.max_loss, cells)
            checked.append((finding, verdict))
            costs = {target: share(target, mine) for target in ("kv-bytes", "prefill", "decode")}
            if verdict.status != "over":
                break
        if records:
            cards = [card(method) for finding in findings for method in finding.composition.methods]
            write_report(records, cards, folder, self.place.shared(request))
        return checked, costs
