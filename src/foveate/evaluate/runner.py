"""Runs a grid of settings, lengths and tasks on one model, and keeps a record of every cell."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import torch

from foveate import compat
from foveate.engine.apply import Handle, apply, compose
from foveate.engine.binding import Binding
from foveate.engine.plan import unite
from foveate.errors import FoveateError, Refused
from foveate.evaluate import cost as costing
from foveate.evaluate.answer import answer, outcome, read_prompts
from foveate.evaluate.batch import Batch, rows_at_once
from foveate.evaluate.machine import describe, versions
from foveate.evaluate.record import DENSE, Log, Record
from foveate.evaluate.request import Request, Watch, check_lengths, make_samples
from foveate.evaluate.setting import Bound, Setting, bind, check, open_profiles
from foveate.evaluate.tally import Batches, Tally
from foveate.evaluate.work import Draft, Known, Records, Work
from foveate.methods.base import Profile
from foveate.models.shape import ModelShape
from foveate.tasks import Sample, Task

Shared = tuple[Batch, torch.Tensor | None]
"""A prompt read densely, and the logits behind it."""


def run(
    model: Any,
    tokenizer: Any,
    request: Request,
    settings: Sequence[Setting],
    out: str | os.PathLike[str],
    *,
    profiles: Iterable[Profile | str | Path] = (),
    watch: Watch = lambda done, total, what: None,
) -> list[Record]:
    """Run every cell that the folder does not hold yet, and return the records of all cells of the request.

    Everything that can be told from the arguments is checked before anything is written. Cells are written as soon as
    their group (one length and task, all settings) is complete, and until then the batches that were measured are kept
    beside them: a run that was killed goes on at the first batch of samples that is missing.

    Raises:
        BadArgument, Refused: a length, task, profile or method that cannot be had on this model.
        FoveateError: the folder cannot be written.
    """
    with apply(model, DENSE) as handle, torch.inference_mode():
        runner = prepare(model, tokenizer, request, settings, handle, profiles, watch)
        with Log(out, request.shared(model), request.command) as log, Batches(out) as batches:
            runner.log, runner.batches = log, batches
            runner.run()
            done = log.done()
            return [done[cell.key()] for cell in request.cells(settings)]


def prepare(
    model: Any,
    tokenizer: Any,
    request: Request,
    settings: Sequence[Setting],
    handle: Handle,
    profiles: Iterable[Profile | str | Path],
    watch: Watch,
) -> Runner:
    """A runner with its settings bound and its samples made; it has no log yet.

    Args:
        handle: of dense attention, applied to the model as long as the runner is used.

    Raises:
        BadArgument, Refused: as `run`.
    """
    shape = ModelShape.of(model)
    check_lengths(request, shape, tokenizer)
    given = open_profiles(profiles, settings, shape)
    opened = cache(lambda checkpoint: checkpoint.open(model))
    bounds = [bind(handle, setting, given, tokenizer, opened) for setting in settings]
    samples = make_samples(request, tokenizer, watch)
    return Runner(model, tokenizer, shape, request, handle, bounds, samples, Draft(), watch)


class Runner:
    """One run: which cells are missing, and how they are measured."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        shape: ModelShape,
        request: Request,
        handle: Handle,
        bounds: Sequence[Bound],
        samples: dict[tuple[int, str], list[Sample]],
        log: Records,
        watch: Watch,
    ) -> None:
        self.model, self.tokenizer, self.shape, self.request = model, tokenizer, shape, request
        self.handle, self.bounds, self.samples, self.log, self.watch = handle, list(bounds), samples, log, watch
        self.batches = Batches()
        self.done, self.total = 0.0, 0.0
        self.dense = next(b.binding for b in bounds if b.setting.method == DENSE and b.binding is not None)
        # All settings of the run count, also those whose cells are done: what is captured changes how attention is
        # computed, and with it the last bits of a prompt that a resumed run must find again.
        needs = [b.binding.prompt_needs for b in bounds if b.binding is not None and b.shares_prefill]
        self.shared = Binding(model, compose(DENSE), {}, handle, capture=unite(needs))
        self.facts = {
            "versions": versions(),
            "device": describe(*compat.devices(model)),
            "command": request.command,
        }

    # -- cells --------------------------------------------------------------------------------------------------------

    def pending(self, length: int, task: Task) -> list[Bound]:
        """Settings whose cell is missing; a refusal is looked at again, since a profile may have come meanwhile."""
        found = []
        have = self.log.done()
        for bound in self.bounds:
            record = have.get(self.request.cell(bound.setting, length, task).key())
            bound = check(bound, self.shape, self._prompt_lengths(length, task))
            if record is None or (record.status == "refused" and bound.binding is not None):
                found.append(bound)
        return found

    def _prompt_lengths(self, length: int, task: Task) -> set[int]:
        """Lengths of the prompts that the methods act on."""
        seen = self.request.question_seen
        lengths = [len(s.context_ids) + seen * len(s.question_ids) for s in self.samples[length, task.name]]
        return {min(lengths), max(lengths)}

    # -- the run ------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Run what is missing: by length, then by task; costs come first at each length."""
        self.total = self.work().total
        self.watch(0.0, self.total, "warming up")
        for length in self.request.lengths:
            known = self.costs(length)
            for task in self.request.tasks:
                self.measure(length, task, known)
        self.watch(self.total, self.total, "done")

    def work(self) -> Work:
        """What is missing."""
        groups, timings = {}, {}
        for length in self.request.lengths:
            for task in self.request.tasks:
                todo = self.pending(length, task)
                if todo:
                    groups[length, task.name] = self._work(length, task, todo)
            untimed = self._untimed(length)
            if untimed:
                timings[length] = self._timing_work(length, untimed)
        return Work(groups, timings)

    def costs(self, length: int) -> Known:
        """Costs at a length of every setting with a missing cell: those measured before, and the rest measured now.
        Nothing else may run on the device meanwhile."""
        return self._time(length, self._untimed(length))

    def measure(self, length: int, task: Task, known: Known) -> None:
        """The missing cells of one group."""
        todo = self.pending(length, task)
        if todo:
            self._group(length, task, todo, known)

    def _advance(self, work: float, what: str) -> None:
        self.done += work
        self.watch(self.done, max(self.total, self.done), what)

    def _work(self, length: int, task: Task, todo: Sequence[Bound]) -> float:
        """About how many prompt tokens' worth of work a group is."""
        running = [b for b in todo if b.binding is not None]
        own = sum(not b.shares_prefill for b in running)
        shared = length * self.request.samples if len(running) > own else 0
        return shared + own * length * self.request.samples + len(running) * self._answer_work(length, task)

    def _answer_work(self, length: int, task: Task) -> float:
        sample = self.samples[length, task.name][0]
        rows = 1 if sample.conversation else rows_at_once(length, self.model.device.type)
        turns, steps = max(1, len(sample.turns)), len(sample.target_ids) or 32
        return self.request.samples * turns * (64 + steps * (6 + 18 / rows) + 0.05 * length)

    def _timing_work(self, length: int, todo: Sequence[Bound]) -> float:
        return self.request.repeats * self._timed_prompts(todo) * (length + 24 * 2 * costing.STEPS)

    def _timed_prompts(self, todo: Sequence[Bound]) -> int:
        """Prompts that are timed in one repeat: dense is, whether or not it is asked for."""
        return 1 + sum(b.setting.method != DENSE for b in todo)

    # -- costs --------------------------------------------------------------------------------------------------------

    def _untimed(self, length: int) -> list[Bound]:
        """Settings with a missing cell, of which no record of this length holds the costs yet."""
        if not self.request.repeats:
            return []
        todo = [bound for task in self.request.tasks for bound in self.pending(length, task)]
        known = {
            (r.cell.method, repr(sorted(r.cell.settings.items())), r.cell.budget) for r in self._timed_records(length)
        }
        wanted = {b.setting.key: b for b in todo if b.binding is not None and b.setting.key not in known}
        return list(wanted.values())

    def _timed_records(self, length: int) -> list[Record]:
        mine = (self.request.model, self.request.seed, self.request.question_seen, length)
        return [
            r
            for r in self.log.done().values()
            if (r.cell.model, r.cell.seed, r.cell.question_seen, r.cell.length) == mine and r.prefill_s is not None
        ]

    def _time(self, length: int, todo: Sequence[Bound]) -> Known:
        """Cost fields of records by setting: those measured before, and the rest now."""
        names = ("prefill_s", "prefill_dense_s", "decode_ms", "decode_dense_ms", "kv_bytes_peak", "repeats")
        known: Known = {
            (r.cell.method, repr(sorted(r.cell.settings.items())), r.cell.budget): {n: getattr(r, n) for n in names}
            for r in self._timed_records(length)
        }
        if not todo:
            return known
        # The longest prompt of the length, so that no task's cache was larger than the peak that is reported.
        samples = [self.samples[length, task.name][0] for task in self.request.tasks]
        sample = max(samples, key=lambda s: len(s.context_ids) + len(s.question_ids))
        work = self._timing_work(length, todo) / (self.request.repeats * self._timed_prompts(todo))
        others = [b for b in todo if b.setting.method != DENSE]
        costs = costing.measure(
            self.shape,
            self.dense,
            others,
            sample,
            question_seen=self.request.question_seen,
            repeats=self.request.repeats,
            done=lambda: self._advance(work, f"timing, {length} tokens"),
        )
        dense_key = next(b.setting.key for b in self.bounds if b.setting.method == DENSE)
        for key, cost in {dense_key: costs.dense, **costs.found}.items():
            if key not in costs.refused:
                measured = {
                    "prefill_s": cost.prefill_s,
                    "prefill_dense_s": costs.dense.prefill_s,
                    "decode_ms": cost.decode_ms,
                    "decode_dense_ms": cost.decode_dense_ms,
                    "kv_bytes_peak": cost.peak,
                    "repeats": self.request.repeats,
                }
                known.setdefault(key, measured)  # dense is timed again beside the others; its first times stand
        return known

    # -- quality ------------------------------------------------------------------------------------------------------

    def _group(
        self,
        length: int,
        task: Task,
        todo: Sequence[Bound],
        known: Known,
    ) -> None:
        """All missing cells of one length and task: one prompt serves every method that leaves prefill dense."""
        samples = self.samples[length, task.name]
        tallies = {bound.setting.key: Tally() for bound in todo}
        state = {bound.setting.key: bound for bound in todo}
        rows = rows_at_once(length, self.model.device.type)
        for start in range(0, len(samples), rows):
            some = samples[start : start + rows]
            shared: Shared | None = None
            for key, bound in state.items():
                if bound.binding is None:
                    continue
                what = f"{length} tokens, {task.name}, {bound.setting.label}"
                self.watch(self.done, self.total, what)
                cell = self.request.cell(bound.setting, length, task).key()
                known_batch = self.batches.get(cell, start, len(some))
                if known_batch is not None:
                    tallies[key].add(known_batch)
                    continue
                try:
                    fresh = shared is None or not bound.shares_prefill
                    if bound.shares_prefill and shared is None:
                        with suppress(torch.OutOfMemoryError):  # the halves will fit
                            shared = self._read_shared(some)
                    tally = self._tally(bound, some, task, shared)
                    self._advance(fresh * length * len(some), what)
                except FoveateError as error:
                    state[key] = bound.refuse(error)
                else:
                    self.batches.add(cell, start, tally)
                    tallies[key].add(tally)
                self._advance(self._answer_work(length, task) * len(some) / len(samples), what)
        self._write(length, task, state, tallies, known)
        self.batches.drop()

    def batch(self, bound: Bound, length: int, task: Task, start: int) -> Tally:
        """One setting on the batch of samples that begins at `start`, for whoever spreads less than a group.

        Raises:
            FoveateError: the setting is refused.
        """
        some = self.samples[length, task.name][start : start + rows_at_once(length, self.model.device.type)]
        return self._tally(bound, some, task, None)

    def _tally(self, bound: Bound, some: Sequence[Sample], task: Task, shared: Shared | None) -> Tally:
        """Read and answer samples side by side where the device's memory allows it, else in halves; `shared` if read.

        Raises:
            Refused: a single sample does not fit into it.
        """
        try:
            return self._side_by_side(bound, some, task, shared)
        except torch.OutOfMemoryError as error:
            if len(some) == 1:
                raise Refused(f"one prompt of this length does not fit into the device's memory ({error})") from None
        # Only here, where the failed attempt's frames and their tensors are gone.
        torch.cuda.empty_cache()
        half = len(some) // 2
        tally = Tally()
        for part in (some[:half], some[half:]):
            tally.add(self._tally(bound, part, task, None))
        return tally

    def _side_by_side(self, bound: Bound, some: Sequence[Sample], task: Task, shared: Shared | None) -> Tally:
        assert bound.binding is not None
        read = [bound.read(sample) for sample in some]
        if bound.shares_prefill:
            shared = shared or self._read_shared(some)
            batch, logits = shared[0].fork(bound.binding), shared[1]
            batch.cache.meter = {}
        else:
            skipped = [len(a.context_ids) - len(b.context_ids) for a, b in zip(some, read, strict=True)]
            batch = Batch(bound.binding.model, bound.binding.cache(), len(some), self.shape, skipped)
            batch.cache.meter = {}
            logits = read_prompts(batch, read, self.request.question_seen, part="context")
        assert logits is not None
        answers = answer(batch, logits, some, task, self.tokenizer, read, not self.request.question_seen)
        return Tally.of(answers, batch, shared[0] if bound.shares_prefill and shared else None)

    def _read_shared(self, samples: Sequence[Sample]) -> Shared:
        batch = Batch(self.model, self.shared.cache(), len(samples), self.shape)
        batch.cache.meter = {}
        return batch, read_prompts(batch, samples, self.request.question_seen, part="context")

    # -- records ------------------------------------------------------------------------------------------------------

    def _write(
        self,
        length: int,
        task: Task,
        state: dict[tuple[str, str, str | None], Bound],
        tallies: dict[tuple[str, str, str | None], Tally],
        known: Known,
    ) -> None:
        dense_bytes = 0
        for key, bound in state.items():  # dense stands first
            cell = self.request.cell(bound.setting, length, task)
            if bound.binding is None:
                assert bound.refused is not None
                self.log.append(
                    Record(cell=cell, status="refused", refused=bound.refused, floor=bound.floor, **self.facts)
                )
                continue
            tally = tallies[key]
            held = int(median(one.kv_bytes for one in tally.answers))
            costs = dict(known.get(key, {}))
            if costs.get("kv_bytes_peak") is not None:
                costs["kv_bytes_peak"] = max(costs["kv_bytes_peak"], *(one.kv_bytes_end for one in tally.answers), held)
            if bound.setting.method == DENSE:
                dense_bytes = held
            self.log.append(
                Record(
                    cell=cell,
                    scores=[float(one.score) for one in tally.answers],
                    outcomes=[
                        outcome(sample, one)
                        for sample, one in zip(self.samples[length, task.name], tally.answers, strict=True)
                    ],
                    higher_is_better=task.higher_is_better,
                    kv_bytes=held,
                    kv_bytes_dense=dense_bytes or self._dense_record(length, task).kv_bytes,
                    pairs_read=tally.share("decode"),
                    pairs_prefill=tally.share("prompt"),
                    calibration_s=bound.calibration_s,
                    **costs,
                    **self.facts,
                )
            )

    def _dense_record(self, length: int, task: Task) -> Record:
        setting = next(b.setting for b in self.bounds if b.setting.method == DENSE)
        return self.log.done()[self.request.cell(setting, length, task).key()]
