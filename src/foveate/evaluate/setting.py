"""What a comparison runs: methods by name or object, each with its parameters and its budgets."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from foveate.engine.apply import Handle, find_profiles
from foveate.engine.binding import Binding
from foveate.engine.tuned import Tuned, is_file, read_tuned
from foveate.errors import BadArgument, FoveateError, Infeasible
from foveate.evaluate.checkpoint import Checkpoint, is_checkpoint
from foveate.evaluate.notation import Part, parse_part, part_text, split
from foveate.evaluate.reader import READERS, WHOLE, Read, Reader, same
from foveate.evaluate.record import DENSE
from foveate.methods import METHODS
from foveate.methods.base import Composition, Method, Profile
from foveate.methods.budget import Budget
from foveate.methods.profile import fingerprint, load_profile
from foveate.models.shape import ModelShape
from foveate.retrieval import Retrieval

ALL = "all"
CORE = "core"
"""Stands for every registered method, in the list of methods."""

MethodLike = str | os.PathLike | Method | Composition | Retrieval


@dataclass(frozen=True)
class Entry:
    """A composition as it was asked for.

    Args:
        composition: the methods, parameters set.
        free: the method or reader that takes the budgets of the comparison, if one does.
        named: whether the user named it; what came in through "all" may be refused by a model without stopping the run.
        reader: what the methods are given of a prompt.
        file, tuned: the tuned file that it was read from, if it was, and what that holds.
        checkpoint: another model that runs in the place of the compared one.
    """

    composition: Composition
    free: Part | None
    named: bool
    reader: Reader = WHOLE
    file: str = ""
    tuned: Tuned | None = None
    checkpoint: Checkpoint | None = None

    @property
    def parts(self) -> tuple[Part, ...]:
        """What was asked for: a reader, unless it reads everything, and the methods, unless dense stands behind it."""
        if self.reader.whole and self.checkpoint is None:
            return self.composition.methods
        if self.reader.whole:
            return tuple(method for method in self.composition.methods if method.id != DENSE)
        return (self.reader, *(method for method in self.composition.methods if method.id != DENSE))


@dataclass(frozen=True)
class Setting:
    """One composition under one budget: a row of the comparison.

    Args:
        method: its name in records, `"snapkv"` or `"snapkv|kivi"`.
        settings: parameters that differ from the defaults, JSON values; of a composition as `"kivi.bits"`.
        budget: as printed; None where nothing takes one.
        composition: the methods, budget included.
        named, reader, file, tuned, checkpoint: as in `Entry`.
    """

    method: str
    settings: dict[str, Any]
    budget: str | None
    composition: Composition
    named: bool = True
    reader: Reader = WHOLE
    file: str = ""
    tuned: Tuned | None = None
    checkpoint: Checkpoint | None = None

    @property
    def key(self) -> tuple[str, str, str | None]:
        """Identity within a run."""
        return self.method, repr(sorted(self.settings.items())), self.budget

    @property
    def label(self) -> str:
        """The row in words."""
        return " ".join(filter(None, [self.method, self.budget]))


def parse_methods(methods: str | MethodLike | Iterable[MethodLike]) -> list[Entry]:
    """Entries from texts and objects; dense comes first and is always there.

    A text is a list such as `snapkv, kivi(bits=2, budget=None), snapkv(budget=0.25)|kivi(bits=4)`: parameters stand in
    brackets, `|` composes, `all` is every method, `core` the few that show every kind. A path, or a text that ends with
    .json, is a file of `foveate tune`. A method that is given a budget of its own, also None (its own parameters
    decide), or comes from such a file is run once; the others once per budget of the comparison.

    Raises:
        BadArgument: a name or parameter that is not known, or a text or file that cannot be read.
    """
    listed = [methods] if isinstance(methods, MethodLike) else list(methods)
    entries = [Entry(Composition((METHODS[DENSE](),)), None, True)]
    for item in listed:
        if isinstance(item, str):
            for text in split(item, ","):
                if text in (ALL, CORE):
                    group = [cls for cls in METHODS.values() if text == ALL or cls.core]
                    entries += [_entry([(cls(), False)], named=False) for cls in group]
                elif is_file(text):
                    entries.append(_tuned_entry(text))
                elif is_checkpoint(text.partition("|")[0].strip()):
                    entries.append(_checkpoint_entry(text))
                elif "/" in text.partition("(")[0]:
                    raise BadArgument("methods", text, "no folder with a model (config.json and weights) is there")
                else:
                    entries.append(_entry([parse_part(part) for part in split(text, "|")]))
        elif isinstance(item, os.PathLike):
            text = os.fspath(item)
            entries.append(_checkpoint_entry(text) if is_checkpoint(text) else _tuned_entry(text))
        elif isinstance(item, Method | Composition | Retrieval):
            parts = item.methods if isinstance(item, Composition) else (item,)
            entries.append(_entry([(part, False) for part in parts]))
        else:
            raise BadArgument("methods", item, "give names, methods, compositions (A | B) or tuned files")
    if len(entries) == 1:
        raise BadArgument("methods", str(methods), f"give at least one of {', '.join([ALL, CORE, *METHODS, *READERS])}")
    unique: dict[str, Entry] = {}
    for entry in entries:
        unique.setdefault(repr((entry.parts, entry.free is None, entry.file, entry.checkpoint)), entry)
    return list(unique.values())


def parse_one(text: str) -> Method:
    """A single method from its name, or its name with parameters: `kivi(bits=2)`.

    Raises:
        BadArgument: a name or parameter that is not known, or a composition.
    """
    part, _ = parse_part(text)
    if not isinstance(part, Method):
        raise BadArgument("methods", text, "give one method")
    return part


def text_of(entries: Sequence[Entry]) -> str:
    """The text that `parse_methods` reads as these entries."""
    parts = []
    unnamed = [method for entry in entries[1:] if not entry.named for method in entry.composition.methods]
    group = CORE if all(method.core for method in unnamed) else ALL
    for entry in entries[1:]:  # dense is always there
        if entry.file:
            parts.append(entry.file)
        elif entry.named:
            before = [] if entry.checkpoint is None else [entry.checkpoint.folder]
            parts.append("|".join([*before, *(part_text(part, entry.free) for part in entry.parts)]))
        elif group not in parts:
            parts.append(group)
    return ",".join(parts) or DENSE


def settings_of(entries: Sequence[Entry], budgets: Sequence[Budget]) -> list[Setting]:
    """Every entry under every budget that it takes, in the order given; without budgets each runs once.

    Raises:
        BadArgument: a composition of which several methods would take the budget.
    """
    found: dict[tuple[str, str, str | None], Setting] = {}
    for entry in entries:
        given: Sequence[Budget | None] = budgets if entry.free is not None and budgets else [None]
        for budget in given:
            methods = tuple(
                part.with_budget(budget) if part is entry.free and budget is not None else part
                for part in entry.composition.methods
            )
            reader = entry.reader
            if reader is entry.free and budget is not None:
                reader = reader.with_budget(budget)
            setting = _setting(entry, Composition(methods), reader, budget)
            found.setdefault(setting.key, setting)
    return list(found.values())


def parse_budgets(budgets: str | float | Budget | Iterable[Budget | float | int | str] | None) -> list[Budget]:
    """Budgets from `"0.25,0.5"`, numbers or objects.

    Raises:
        BadArgument: a budget that is 0, above 1 as a share, or no number.
    """
    if budgets is None:
        return []
    listed = [budgets] if isinstance(budgets, str | float | int | Budget) else list(budgets)
    found: dict[str, Budget] = {}
    for item in listed:
        for one in split(item, ",") if isinstance(item, str) else [item]:
            budget = Budget.of(one)
            if budget is not None:
                found.setdefault(str(budget), budget)
    return list(found.values())


@dataclass(frozen=True)
class Bound:
    """A setting on a model, or why it cannot be had there.

    Args:
        binding: None where it is refused, with the reason in `refused`.
        floor: the smallest share that the method could meet, where its budget is why.
        profiles: calibration of its methods, by id.
        read: what is read of a sample.
    """

    setting: Setting
    binding: Binding | None = None
    refused: str | None = None
    floor: float | None = None
    profiles: Mapping[str, Profile] = field(default_factory=dict)
    read: Read = same

    @property
    def shares_prefill(self) -> bool:
        """Whether one dense pass over the whole prompts serves this setting as well as others."""
        own = not self.setting.reader.whole or self.setting.checkpoint is not None
        return self.binding is not None and self.binding.shares_prefill and not own

    @property
    def calibration_s(self) -> float | None:
        """Seconds that its profiles took to make; None where it needs none, or they do not say."""
        known = [p.provenance.get("seconds") for p in self.profiles.values()]
        seconds = [float(s) for s in known if isinstance(s, int | float)]
        return sum(seconds) if seconds else None

    def refuse(self, error: FoveateError) -> Bound:
        """The same setting, refused for this reason."""
        return replace(self, binding=None, refused=str(error), floor=getattr(error, "floor", None))


def bind(
    handle: Handle,
    setting: Setting,
    profiles: Mapping[str, Profile],
    tokenizer: Any = None,
    opened: Callable[[Checkpoint], Handle] | None = None,
) -> Bound:
    """Bind a setting to the handle's model, or to its checkpoint's, which `opened` may have open; a reader other than
    the whole needs the tokenizer.

    What the method cannot do at any length is refused: as an error if the user named the method, else in the result,
    so that a comparison of all methods goes on without it. A budget below the floor is always in the result.

    Raises:
        BadArgument, Refused: the method cannot run on this model, or lacks its profile.
    """
    bound = Bound(setting)
    try:
        known = dict(profiles)
        if setting.checkpoint is not None:
            handle = opened(setting.checkpoint) if opened is not None else setting.checkpoint.open(handle.model)
        if setting.tuned is not None:
            setting.tuned.check(handle.binding.shape, setting.file)
            known |= {profile.method: profile for profile in setting.tuned.profiles}
        given = [known[m.id] for m in setting.composition.methods if m.id in known]
        found = find_profiles(setting.composition, handle.binding.shape, given)
        read = setting.reader.open(tokenizer, handle.binding.shape, handle.model.device)
        bound = replace(bound, profiles=found, read=read)
        return replace(bound, binding=Binding(handle.model, setting.composition, found, handle))
    except Infeasible as error:
        return bound.refuse(error)
    except FoveateError as error:
        if setting.named:
            raise
        return bound.refuse(error)


def check(bound: Bound, shape: ModelShape, lengths: Iterable[int]) -> Bound:
    """The bound setting, refused if it cannot be had for a prompt of one of these lengths."""
    if bound.binding is None and bound.floor is None:
        return bound
    for length in sorted(set(lengths)):
        try:
            if bound.binding is not None:
                bound.binding.check(length)
            else:  # not at any length: say which share could be met at this one
                for method in bound.setting.composition.methods:
                    method.plan(shape, bound.profiles.get(method.id), length)
                    method.total(shape, length)
        except FoveateError as error:
            return bound.refuse(error)
    return bound


def open_profiles(
    given: Iterable[Profile | str | Path], settings: Sequence[Setting], shape: ModelShape
) -> dict[str, Profile]:
    """Profiles by method, from objects or files.

    Raises:
        BadArgument: a file that is no profile, a profile of another model, or one that no method of the run takes.
    """
    wanted = {method.id for setting in settings for method in setting.composition.methods if method.calibrated}
    found: dict[str, Profile] = {}
    for item in given:
        profile = item if isinstance(item, Profile) else load_profile(item)
        if profile.method not in wanted:
            raise BadArgument("profile", profile.method, "no method of this comparison takes it; name that method, too")
        if profile.model != fingerprint(shape):
            mend = f"this profile of {profile.method} was made on another model; calibrate on {fingerprint(shape)}"
            raise BadArgument("profile", profile.model, mend)
        found[profile.method] = profile
    return found


def _tuned_entry(file: str) -> Entry:
    """What a tuned file holds; its budgets are its own."""
    tuned = read_tuned(file)
    return Entry(tuned.composition, None, True, file=file.strip(), tuned=tuned)


def _checkpoint_entry(text: str) -> Entry:
    """`runs/mla|kivi(bits=4)`: a folder, and methods on the model in it."""
    folder, _, rest = text.partition("|")
    checkpoint = Checkpoint(folder.strip())
    if not rest.strip():
        return Entry(Composition((METHODS[DENSE](),)), None, True, checkpoint=checkpoint)
    return replace(_entry([parse_part(part) for part in split(rest, "|")]), checkpoint=checkpoint)


def _entry(parts: Sequence[tuple[Part, bool]], named: bool = True) -> Entry:
    """Methods, a reader before them perhaps, with whether their budget was stated -> an entry."""
    (first, _), *rest = parts
    reader = WHOLE if isinstance(first, Method) else first
    methods = tuple(part for part, _ in (parts if reader is WHOLE else rest) if isinstance(part, Method))
    text = "|".join(part.id for part, _ in parts)
    if len(methods) < len(parts) - (reader is not WHOLE):
        raise BadArgument("methods", text, f"one of {', '.join(READERS)} may stand before the methods, once")
    free = [part for part, stated in parts if part.budget is None and part.budgeted and not stated]
    if len(free) > 1:
        raise BadArgument(
            "methods",
            text,
            f"{' and '.join(m.id for m in free)} would both take the budget; give each its own: "
            f"{'|'.join(f'{part.id}(budget=0.5)' if part in free else part.id for part, _ in parts)}",
        )
    composition = Composition(methods or (METHODS[DENSE](),))
    return Entry(composition, free[0] if free else None, named, reader)


def _setting(entry: Entry, granted: Composition, reader: Reader, budget: Budget | None) -> Setting:
    """One row: what the entry says of itself, and the budget it was granted besides."""
    before = [] if entry.checkpoint is None else [entry.checkpoint.id]
    name = "|".join([*before, *(part.id for part in entry.parts)])
    asked = None if budget is None else str(budget)
    if len(entry.parts) == 1:
        settings = entry.parts[0].settings()
        own = settings.pop("budget", None)
        asked = asked or own
    else:
        settings = {f"{part.id}.{key}": value for part in entry.parts for key, value in part.settings().items()}
    settings |= reader.facts
    if entry.checkpoint is not None:
        settings |= entry.checkpoint.settings
    return Setting(name, settings, asked, granted, entry.named, reader, entry.file, entry.tuned, entry.checkpoint)
