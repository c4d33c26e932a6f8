"""Readers: which part of a prompt a model is given. Methods decide what is done with what it is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from foveate.methods.budget import Budget
from foveate.models.shape import ModelShape
from foveate.retrieval import Retrieval
from foveate.tasks import Sample

Read = Callable[[Sample], Sample]
"""What is read of a sample; only its `context_ids` and `evidence` differ."""


class Reader(Protocol):
    """A way to read prompts; an entry of `READERS` is named like a method, before the methods it is composed with.

    Attributes:
        id, name, paper, slots: as of a method; the id is empty for the one that reads everything.
        whole: whether every prompt is read whole, so that methods may share a pass over it.
        facts: what its rows say besides its settings.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]
    id: ClassVar[str]
    name: ClassVar[str]
    paper: ClassVar[str]
    slots: ClassVar[frozenset[str]]
    whole: ClassVar[bool]
    budgeted: ClassVar[bool]
    facts: ClassVar[dict[str, Any]]

    @property
    def budget(self) -> Budget | float | int | None: ...

    def settings(self) -> dict[str, Any]:
        """Parameters that differ from the defaults, as JSON values."""
        ...

    def with_budget(self, budget: Budget | float | int | None) -> Reader:
        """The same under another budget."""
        ...

    def open(self, tokenizer: Any, shape: ModelShape, device: Any) -> Read:
        """What reads the samples of one model; what it has to load is loaded now."""
        ...


@dataclass(frozen=True)
class Whole:
    """Reads everything."""

    id: ClassVar[str] = ""
    name: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    slots: ClassVar[frozenset[str]] = frozenset()
    whole: ClassVar[bool] = True
    budgeted: ClassVar[bool] = False
    facts: ClassVar[dict[str, Any]] = {}
    budget: Budget | float | int | None = None

    def settings(self) -> dict[str, Any]:
        return {}

    def with_budget(self, budget: Budget | float | int | None) -> Whole:
        return self

    def open(self, tokenizer: Any, shape: ModelShape, device: Any) -> Read:
        return same


def same(sample: Sample) -> Sample:
    """The whole sample."""
    return sample


WHOLE = Whole()
READERS: Mapping[str, type[Retrieval]] = {Retrieval.id: Retrieval}
