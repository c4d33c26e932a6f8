"""What is searched: which methods can save what is asked for, and which values of their parameters are tried."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any, Literal, Protocol, get_args, get_origin, get_type_hints

from foveate.errors import BadArgument
from foveate.methods.base import METHODS, Composition, Method

Target = Literal["kv-bytes", "decode", "prefill"]

SLOTS: dict[str, tuple[str, ...]] = {
    "kv-bytes": ("keep", "format"),
    "decode": ("decode", "keep", "format"),
    "prefill": ("prefill",),
}
"""By target: the slots whose methods can save it, one method each. What fills several stands for the first of them."""

SHARES = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Budgets that are tried."""

START = 0.5
"""The budget of the first trial of each method."""

NONE = "-"
"""Stands for an empty slot."""


class Trial(Protocol):
    """The part of an Optuna trial that suggests values."""

    def suggest_int(self, name: str, low: int, high: int) -> int: ...
    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any: ...


@dataclass(frozen=True)
class Parameter:
    """One field of one method.

    Args:
        label: its name in the study, `"snapkv.window"`.
        values: what is tried.
        start: place in `values` that the first trial of the method has.
    """

    label: str
    field: str
    values: tuple[Any, ...]
    start: int

    @property
    def ordered(self) -> bool:
        """Whether values are numbers, of which neighbours are alike; the study then knows them by their place."""
        return len(self.values) > 2 and all(type(value) in (int, float) for value in self.values)

    @property
    def first(self) -> Any:
        """The first trial's value, as the study writes it."""
        return self.start if self.ordered else self.values[self.start]

    def suggest(self, trial: Trial) -> Any:
        if len(self.values) == 1:
            return self.values[0]
        if self.ordered:
            return self.values[trial.suggest_int(self.label, 0, len(self.values) - 1)]
        return trial.suggest_categorical(self.label, self.values)


def parameters(cls: type[Method]) -> list[Parameter]:
    """What is tried of a method: the values that its `search` names, both values of a switch, all of a choice, and the
    budget if it takes one. Other fields keep their defaults."""
    hints = get_type_hints(cls)
    found = []
    for item in fields(cls):
        if item.name in cls.search:
            values = tuple(cls.search[item.name])
        elif item.name == "budget":
            values = SHARES if cls.budgeted else (None,)
        elif hints[item.name] is bool:
            values = (False, True)
        elif get_origin(hints[item.name]) is Literal:
            values = get_args(hints[item.name])
        else:
            continue
        if not values:
            raise BadArgument("search", f"{cls.id}.{item.name}", "give at least one value")
        default = START if item.name == "budget" else None if item.default is MISSING else item.default
        start = values.index(default) if default in values else len(values) // 2
        found.append(Parameter(f"{cls.id}.{item.name}", item.name, values, start))
    return found


@dataclass(frozen=True)
class Space:
    """Methods by the slot that they would fill; each slot may stay empty, but not all."""

    slots: Mapping[str, tuple[str, ...]]

    @classmethod
    def of(cls, target: str, methods: str | Iterable[str] = "all") -> Space:
        """The methods that can save `target`; of "all" those of papers, since bounds to compare with are no methods.

        Raises:
            BadArgument: an unknown target or method, or one that cannot save what is asked for.
        """
        if target not in SLOTS:
            raise BadArgument("target", target, f"give one of {', '.join(SLOTS)}")
        given = [methods] if isinstance(methods, str) else list(methods)
        names = [name.strip() for text in given for name in text.split(",") if name.strip()]
        if names == ["all"]:
            names = [name for name, made in METHODS.items() if made.paper and made.slots & set(SLOTS[target])]
        slots: dict[str, list[str]] = {}
        for name in dict.fromkeys(names):
            if name not in METHODS:
                mend = f"no such method; there are {', '.join(METHODS)} (parameters and compositions are searched)"
                raise BadArgument("methods", name, mend)
            slot = next((slot for slot in SLOTS[target] if slot in METHODS[name].slots), None)
            if slot is None:
                wanted = " or ".join(SLOTS[target])
                raise BadArgument("methods", name, f"cannot save {target}: it does not change {wanted}")
            slots.setdefault(slot, []).append(name)
        if not slots:
            raise BadArgument("methods", methods, "give at least one method")
        return cls({slot: tuple(slots[slot]) for slot in SLOTS[target] if slot in slots})

    @property
    def methods(self) -> list[str]:
        return [name for names in self.slots.values() for name in names]

    @property
    def classes(self) -> list[type[Method]]:
        return [METHODS[name] for name in self.methods]

    def without(self, names: Iterable[str]) -> Space:
        """The space without some methods."""
        left = {slot: tuple(n for n in have if n not in set(names)) for slot, have in self.slots.items()}
        return Space({slot: have for slot, have in left.items() if have})

    def suggest(self, trial: Trial) -> Composition:
        """The methods and settings of one trial.

        Raises:
            BadArgument: a combination that does not exist: nothing chosen, a clash of slots, values that exclude each
                other.
        """
        made = []
        for slot, names in self.slots.items():
            choices = names if len(self.slots) == 1 else (NONE, *names)
            name = choices[0] if len(choices) == 1 else trial.suggest_categorical(slot, choices)
            if name != NONE:
                cls = METHODS[name]
                made.append((cls, {p.field: p.suggest(trial) for p in parameters(cls)}))
        if not made:
            raise BadArgument("methods", NONE, "every slot is empty")
        return Composition(tuple(cls(**values) for cls, values in made))

    def starts(self, seed: int) -> list[dict[str, Any]]:
        """The first trials, as the study writes them: each method alone, as its paper has it, at half of everything.
        Their order is drawn, so that a search that is cut short favours nobody."""
        found = []
        for slot, names in self.slots.items():
            for name in names:
                chosen = {other: NONE for other in self.slots if other != slot} | {slot: name}
                found.append(chosen | {p.label: p.first for p in parameters(METHODS[name]) if len(p.values) > 1})
        random.Random(seed).shuffle(found)
        return found
