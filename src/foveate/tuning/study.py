"""The search: Optuna proposes settings, growing numbers of samples judge them, hopeless ones stop early."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foveate.errors import BadArgument, FoveateError
from foveate.evaluate.record import DENSE, Record
from foveate.evaluate.setting import Entry, Setting, settings_of, text_of
from foveate.methods.base import METHODS, Composition
from foveate.tuning.outcome import Outcome, outcome
from foveate.tuning.space import Space

STUDY = "study.jsonl"
CHUNK = 2
"""Samples per length and task of the first look at a setting."""

BATCH = 8
"""Trials that are judged side by side: those that leave the prompt dense share one pass over it."""

PRUNING_LEVEL = 0.8
"""Of the interval that must lie below what is allowed for a trial to be stopped. Nothing is claimed by it."""

SLACK = {"kv-bytes": 0.02, "decode": 0.2, "prefill": 0.2}
"""How much dearer than the best a trial must be, seen on few samples, to be stopped: bytes are exact, times are not."""

Measure = Callable[[int, Sequence[Setting]], list[Record]]
"""(number of a chunk of samples, settings) -> their records and those of dense."""


class Late(Exception):
    """The time for the search is over."""


@dataclass(frozen=True)
class Goal:
    """What is searched for: the least `target` with a loss of at most `max_loss` of dense's score."""

    target: str
    max_loss: float
    chunks: int
    """Chunks of samples of a whole trial."""

    @property
    def stages(self) -> list[int]:
        """Chunks seen when a trial is looked at: 1, 2, 4, … and all."""
        found = [1]
        while found[-1] * 2 < self.chunks:
            found.append(found[-1] * 2)
        return found if self.chunks == 1 else [*found, self.chunks]


@dataclass(frozen=True)
class Finding:
    """A setting that kept the quality on the samples of the search, on all of them unless the clock stopped it."""

    composition: Composition
    cost: float
    loss: float

    @property
    def text(self) -> str:
        """As `foveate compare --methods` takes it."""
        return text_of([_dense(), Entry(self.composition, None, True)])


def _dense() -> Entry:
    return Entry(Composition((METHODS[DENSE](),)), None, True)


def settings(compositions: Sequence[Composition]) -> list[Setting]:
    """Rows of a run: dense, then these. What a model cannot take is refused in its record."""
    return settings_of([_dense(), *(Entry(each, None, False) for each in compositions)], [])


def optuna() -> Any:
    """The optional package.

    Raises:
        FoveateError: it is not installed.
    """
    try:
        import optuna
    except ImportError:
        raise FoveateError("tune needs optuna: install foveate with the extra 'tune' (foveate[tune])") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


class Search:
    """A study in a folder, which a later search with the same terms goes on with.

    Args:
        terms: everything that decides what a trial's value means; JSON values.
        measure: runs settings on one chunk of samples; raises `Late` when the time is over.

    Raises:
        BadArgument: the folder holds a study with other terms.
    """

    def __init__(
        self, folder: Path, space: Space, goal: Goal, terms: dict[str, Any], seed: int, measure: Measure
    ) -> None:
        self.space, self.goal, self.measure = space, goal, measure
        self.optuna = optuna()
        backend = self.optuna.storages.journal.JournalFileBackend(os.fspath(folder / STUDY))
        self.study = self.optuna.create_study(
            storage=self.optuna.storages.JournalStorage(backend), study_name="tune", load_if_exists=True
        )
        self._agree(json.loads(json.dumps(terms)), folder)
        self.seen: set[Any] = set()
        begun = self.study.get_trials(deepcopy=False)
        self.again: set[int] = set(self.study.user_attrs.get("again", ()))
        # A sampler that began anew with the same seed would propose what it proposed before.
        self.study.sampler = self.optuna.samplers.TPESampler(seed=seed + len(begun))
        if not begun:
            for start in space.starts(seed):
                self.study.enqueue_trial(start)
        for trial in begun:
            self._recall(trial)
        self.study.set_user_attr("again", sorted(self.again))

    def _agree(self, terms: dict[str, Any], folder: Path) -> None:
        earlier = self.study.user_attrs.get("terms")
        if earlier is None:
            self.study.set_user_attr("terms", terms)
            return
        for name in sorted(terms.keys() | earlier.keys()):
            if terms.get(name) != earlier.get(name):
                mend = f"the search in {folder} has {earlier.get(name)!r}; give that, or use another folder"
                raise BadArgument(name, terms.get(name), mend)

    def _recall(self, trial: Any) -> None:
        """What an earlier search learned; trials that it was stopped in are run again."""
        state = self.optuna.trial.TrialState
        if trial.state == state.RUNNING:
            self.study.tell(trial.number, state=state.FAIL)
        if trial.state in (state.RUNNING, state.FAIL) and trial.number not in self.again:
            self.again.add(trial.number)
            self.study.enqueue_trial(trial.params)
        elif trial.state in (state.COMPLETE, state.PRUNED):
            try:
                (_, setting) = settings([self.space.suggest(trial)])
            except (BadArgument, ValueError):  # a combination that does not exist, and is proposed in vain again
                return
            self.seen.add(setting.key)

    # -- results ------------------------------------------------------------------------------------------------------

    def counts(self) -> dict[str, int]:
        """Settings by what became of them; what was never run (a clash, a repetition) does not count."""
        found = {"complete": 0, "pruned": 0, "refused": 0, "stopped": 0}
        for trial in self.study.get_trials(deepcopy=False):
            if trial.state.name == "COMPLETE":
                found["complete"] += 1
            elif trial.state.name == "PRUNED" and "setting" in trial.user_attrs:
                found["pruned" if "n" in trial.user_attrs else "refused"] += 1
            elif trial.state.name == "FAIL" and trial.number not in self.again:
                found["stopped"] += 1
        return found

    def findings(self) -> list[Finding]:
        """Settings that were judged on all samples, kept the quality and cost less than dense, cheapest first. If there
        is none, those that the clock stopped on the way and that had kept it so far: the check sees fresh samples
        anyway."""
        state = self.optuna.trial.TrialState
        return self._kept(state.COMPLETE) or self._kept(state.FAIL)

    def _kept(self, state: Any) -> list[Finding]:
        """Settings of trials in this state whose last look was a cost, which is less than dense's, and no loss."""
        found: dict[str, Finding] = {}
        for trial in self.study.get_trials(deepcopy=False, states=(state,)):
            if not trial.intermediate_values:
                continue
            cost, loss = trial.user_attrs["cost"], trial.user_attrs["loss"]
            if cost < 1 and trial.intermediate_values[max(trial.intermediate_values)] == cost:
                finding = Finding(self.space.suggest(trial), cost, loss)
                found.setdefault(finding.text, finding)
        return sorted(found.values(), key=lambda one: one.cost)

    @property
    def best(self) -> float | None:
        """The least cost of a setting that was judged on all samples."""
        return min((one.cost for one in self._kept(self.optuna.trial.TrialState.COMPLETE)), default=None)

    # -- the search ---------------------------------------------------------------------------------------------------

    def run(self, trials: int | None) -> None:
        """Search until the time is over, this many trials were begun, or nothing new is proposed."""
        left = trials
        while left is None or left > 0:
            batch = self._ask(BATCH if left is None else min(BATCH, left))
            if not batch:
                return
            if left is not None:
                left -= len(batch)
            try:
                self._judge(batch)
            except Late:
                for trial, _ in batch.values():
                    self.study.tell(trial, state=self.optuna.trial.TrialState.FAIL, skip_if_finished=True)
                return

    def _ask(self, count: int) -> dict[Any, tuple[Any, Setting]]:
        """New settings by their key; none where the space seems to have no more."""
        batch: dict[Any, tuple[Any, Setting]] = {}
        for _ in range(12 * count):
            if len(batch) == count:
                break
            trial = self.study.ask()
            try:
                composition = self.space.suggest(trial)
            except BadArgument as error:
                self._stop(trial, str(error))
                continue
            (_, setting) = settings([composition])
            if setting.key in self.seen:
                self._stop(trial, "proposed before")
            else:
                self.seen.add(setting.key)
                trial.set_user_attr("setting", Finding(composition, 0.0, 0.0).text)
                batch[setting.key] = (trial, setting)
        return batch

    def _judge(self, batch: dict[Any, tuple[Any, Setting]]) -> None:
        active = dict(batch)
        records: dict[Any, list[Record]] = {key: [] for key in batch}
        dense: list[Record] = []
        for number in range(self.goal.chunks):
            if not active:
                return
            baseline, rows = settings([]), [setting for _, setting in active.values()]
            for record in self.measure(number, [*baseline, *rows]):
                cell = record.cell
                key = (cell.method, repr(sorted(cell.settings.items())), cell.budget)
                if key in active:
                    records[key].append(record)
                elif key == baseline[0].key:
                    dense.append(record)
            if number + 1 in self.goal.stages:
                for key, (trial, _) in list(active.items()):
                    if self._look(trial, records[key], dense, number + 1):
                        del active[key]

    def _look(self, trial: Any, records: list[Record], dense: list[Record], chunks: int) -> bool:
        """Judge a trial by what was seen of it; True if that ends it."""
        seen = outcome(self.goal.target, records, dense, level=PRUNING_LEVEL)
        if seen is None:
            refused = next((r.refused for r in records if r.refused), None)
            self._stop(trial, refused or f"its {self.goal.target} could not be measured")
            return True
        value = seen.value(self.goal.max_loss)
        trial.report(value, chunks)
        for name, fact in (("cost", seen.cost), ("loss", seen.loss), ("n", seen.n)):
            trial.set_user_attr(name, fact)
        if chunks == self.goal.chunks:
            self.study.tell(trial, value)
            return True
        why = self._hopeless(seen)
        if why is not None:
            self._stop(trial, why)
        return why is not None

    def _hopeless(self, seen: Outcome) -> str | None:
        """Why a trial cannot win any more, or None."""
        if seen.difference.high < -self.goal.max_loss * seen.dense:
            return "loses more than is allowed"
        best = self.best
        if seen.cost >= min(1.0 if best is None else best, 1.0) * (1 + SLACK[self.goal.target]):
            return "dearer than the best, which keeps the quality" if best is not None else "dearer than dense"
        return None

    def _stop(self, trial: Any, why: str) -> None:
        trial.set_user_attr("why", why)
        self.study.tell(trial, state=self.optuna.trial.TrialState.PRUNED)
