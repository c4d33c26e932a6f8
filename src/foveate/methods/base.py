"""The method protocol: what a paper's file overrides. Everything else is the machinery's business."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from foveate.attention import ALL, Parts
from foveate.cache import View
from foveate.errors import BadArgument
from foveate.methods.budget import Budget
from foveate.methods.context import Context, Probe
from foveate.methods.declared import (
    BudgetRule,
    Codec,
    Needs,
    Profile,
    Protect,
    Result,
    Role,
    uniform,
)
from foveate.models.shape import ModelShape

SLOTS = ("prefill", "keep", "format", "decode", "weights")
"""The parts of attention a method may change. `format` and `weights` take a chain, the others one method."""
EXCLUSIVE = frozenset({"prefill", "keep", "decode"})


def tries(**values: Sequence[Any]) -> Mapping[str, Sequence[Any]]:
    """A method's `search`: `tries(window=(8, 16, 32), kernel=(1, 5))`."""
    return MappingProxyType(values)


@dataclass(frozen=True, kw_only=True)
class Method:
    """A published technique. The paper's parameters are its fields, with the paper's defaults; override only what the
    paper changes. Instances are frozen and hold no state: all state lives in the cache.

    Class attributes:
        id: the paper's name, lower case with dashes. name, paper: title for people, arXiv number ("" without a paper).
        slots: the parts of attention it changes, a subset of SLOTS.
        causality: "strict", or "prompt" where prompt rows may be *selected for* with later prompt tokens.
        chunked: "exact" | "approximate": what a prompt given in pieces changes.
        aligned: True if it needs all heads and layers to hold the same tokens in the same slots.
        every_step: True if `score` evicts at each decode step, not only when the prompt ends.
        croppable: False if what it made of tokens (`mine`, `shared`) is lost when the newest are taken back.
        hands_on: format: True if its packed tokens are still one vector each, which one more format can pack.
        joint: format: True if its codec holds several layers together.
        whole_rows: True if its `attended` takes each query to have read all that is visible to it.
        calibrated: True if `plan` needs a profile, under some parameters at least (`needs_profile`).
        core: True for the few that a comparison runs when nobody names methods: together they show every kind.
        budgeted: False if nothing in it can be set by a budget (dense; methods whose reads follow from a threshold).
        graph: True if its hooks of a decode step use device values alone, so that a GPU can record and replay the step.
            They ask `view.exceeds` and `ctx.sure` instead of looking; steps that differ by the clock have a `kind`.
        nested: False if a larger budget may choose other tokens, not only more of them (approximate searches).
        offloads: True if its roles have a place: they put tokens into the host's memory.
        corrects: decode: so many decoded tokens are taken back and given again in one dense piece; 0: none. May be a
            field.
        lossless: True if it changes only where and how tokens are held: outputs are those of dense attention.
        search: by field, the values that a search of settings tries, numbers in rising order. Fields that are a choice
            (Literal, bool) and the budget need no entry; an entry of one value fixes them.
    """

    id: ClassVar[str]
    name: ClassVar[str]
    paper: ClassVar[str]
    slots: ClassVar[frozenset[str]]
    causality: ClassVar[str] = "strict"
    chunked: ClassVar[str] = "exact"
    aligned: ClassVar[bool] = False
    every_step: ClassVar[bool] = False
    croppable: ClassVar[bool] = True
    hands_on: ClassVar[bool] = False
    joint: ClassVar[bool] = False
    whole_rows: ClassVar[bool] = False
    calibrated: ClassVar[bool] = False
    core: ClassVar[bool] = False
    budgeted: ClassVar[bool] = True
    nested: ClassVar[bool] = True
    graph: ClassVar[bool] = False
    offloads: ClassVar[bool] = False
    lossless: ClassVar[bool] = False
    search: ClassVar[Mapping[str, Sequence[Any]]] = tries()
    corrects = 0

    budget: Budget | float | int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "budget", Budget.of(self.budget))
        if self.budget is not None and not self.budgeted:
            raise BadArgument("budget", str(self.budget), f"{self.id} takes none; its own parameters decide")

    # -- before any token ---------------------------------------------------------------------------------------------

    def calibrate(self, probe: Probe, data: Iterable[Any] | None = None) -> Profile:
        """Make the profile that `plan` needs."""
        raise BadArgument("--for", self.id, "this method needs no calibration")

    def stand_in(self, shape: ModelShape) -> Profile | None:
        """A profile of the right form with arbitrary numbers, to time random weights with; None: there is none."""
        return None

    def plan(self, shape: ModelShape, profile: Profile | None, length: int) -> Sequence[Role]:
        """One role per layer of the model, for a cache whose prompt has `length` tokens.

        Raises:
            Infeasible: when the budget cannot be met, with its floor.
            Refused: when the model lacks what the method needs.
        """
        return [Role()] * len(shape.layers)

    def needs(self, role: Role) -> Needs:
        return Needs()

    # -- per forward --------------------------------------------------------------------------------------------------

    def select(self, q: Tensor, view: View, ctx: Context) -> Parts:
        """prefill, decode: which held pairs the queries q [B, H, N, D] read. The view ends with their own keys."""
        return ALL

    def attended(self, q: Tensor, view: View, result: Result, ctx: Context) -> Tensor | None:
        """After attention: observe, publish to later layers; only the weights slot may return a tensor, which replaces
        the output."""
        return None

    def prepare(self, view: View, ctx: Context) -> Mapping[str, Tensor]:
        """Once the prompt is complete and what is evicted gone: tensors to look things up in later, rows first. They
        are `ctx.prepared` until tokens of the prompt are taken back, and lie where the layer's place is."""
        return {}

    def kind(self, clock: np.ndarray) -> Hashable:
        """What kind of decode step comes next, where the host's clock alone (see `Context`) makes a difference: those
        of one kind are recorded once. None: it is made in the ordinary way."""
        return ()

    def completes(self, seen: np.ndarray) -> bool:
        """Whether the next decode step completes something (a block of tokens) of any row, where rows have had so many
        tokens (see `Context`) before it: such steps are a kind of their own."""
        return False

    # -- what is held -------------------------------------------------------------------------------------------------

    @property
    def protect(self) -> Protect:
        """keep: slots that `score` need not worry about."""
        return Protect()

    @property
    def rule(self) -> BudgetRule:
        """keep: who gets how many slots."""
        return uniform

    def total(self, shape: ModelShape, length: int) -> int | None:
        """keep: tokens per head to hold, for a row whose prompt has `length` tokens. None: everything."""
        budget = Budget.of(self.budget)
        return None if budget is None or budget.whole else budget.held_tokens(shape, length, name=self.id)

    def layer_total(self, role: Role, shape: ModelShape, layer: int, length: int) -> int | None:
        """keep: `total` of one layer. Layers may differ, if together they hold no more than at `total` each."""
        return self.total(shape, length)

    def score(self, view: View, ctx: Context) -> Tensor:
        """keep: importance [B, Hs or 1, C]; higher stays. May use the view and what was asked for in `needs` only."""
        raise AssertionError(f"{type(self).__name__} fills keep but scores nothing")

    def codec(self, role: Role, shape: ModelShape, length: int) -> Codec | None:
        """format: how this layer holds its tokens once the prompt is over."""
        return None

    # -- composition --------------------------------------------------------------------------------------------------

    @property
    def fills(self) -> frozenset[str]:
        """The slots that this instance fills; fewer or more than the class's where a parameter decides."""
        return self.slots

    @property
    def needs_profile(self) -> bool:
        """Whether this instance's `plan` needs a profile; not always where a parameter can do without."""
        return self.calibrated

    @property
    def scores(self) -> bool:
        """True if tokens are evicted by score."""
        return type(self).score is not Method.score

    def __or__(self, other: Method | Composition) -> Composition:
        return Composition((self,)) | other

    def settings(self) -> dict[str, Any]:
        """Fields that differ from the defaults, as JSON values."""
        out: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if value != f.default:
                if isinstance(value, Budget):  # as people write it, unless that would lose digits
                    value = str(value) if Budget.of(str(value)) == value else value.plain
                out[f.name] = value
        return out

    def with_budget(self, budget: Budget | float | int | None) -> Method:
        """The same method under another budget."""
        return replace(self, budget=Budget.of(budget))


@dataclass(frozen=True)
class Composition:
    """Methods that fill different slots, applied together. Order matters only inside a chain."""

    methods: tuple[Method, ...]

    def __post_init__(self) -> None:
        owner: dict[str, Method] = {}
        for method in self.methods:
            for slot in sorted(method.fills & EXCLUSIVE):
                if slot in owner:
                    raise BadArgument(
                        "methods",
                        f"{owner[slot].id} | {method.id}",
                        f"both fill the slot {slot!r}; drop one",
                    )
                owner[slot] = method
        for method in self.methods:
            for other in self.methods:
                reason = _clash(method, other) if other is not method else None
                if reason:
                    raise BadArgument("methods", f"{method.id} | {other.id}", reason)

    def __or__(self, other: Method | Composition) -> Composition:
        return Composition(self.methods + (other.methods if isinstance(other, Composition) else (other,)))

    @property
    def id(self) -> str:
        return "|".join(m.id for m in self.methods)

    def filling(self, slot: str) -> Method | None:
        """The method in an exclusive slot."""
        return next((m for m in self.methods if slot in m.fills), None)

    def with_budget(self, budget: Budget | float | int | None) -> Composition:
        """Give the budget to the one method that has none.

        Raises:
            BadArgument: if no method, or more than one, has a free budget.
        """
        if budget is None:
            return self
        free = [m for m in self.methods if m.budget is None and m.budgeted]
        if len(free) != 1:
            raise BadArgument(
                "budget", str(budget), f"{self.id} has {len(free)} methods that wait for a budget; give each its own"
            )
        return Composition(tuple(m.with_budget(budget) if m is free[0] else m for m in self.methods))


def _clash(method: Method, other: Method) -> str | None:
    if method.aligned and "keep" in other.fills:
        return f"{method.id} needs the same tokens in all heads and layers, but {other.id} holds different ones"
    if method.joint and "format" in other.fills:
        return f"{method.id} holds several layers together, but {other.id} holds each in a way of its own"
    if "format" in method.fills & other.fills and method.hands_on == other.hands_on:
        return "both fill the slot 'format', and one of two must hand on vectors that the other can pack; drop one"
    if method.whole_rows and other.fills & {"prefill", "decode"}:
        return f"{method.id} edits whole rows of attention, but {other.id} leaves parts of them unread"
    if method.offloads and (other.offloads or "format" in other.fills):
        return f"{method.id} puts exact tokens into the host's memory, but {other.id} holds them in a way of its own"
    if method.offloads and other.every_step:
        return f"{other.id} frees single tokens at every step, but {method.id} has put them into the host's memory"
    if method.corrects and ("format" in other.fills or other.offloads or other.every_step or not other.croppable):
        return f"{method.id} takes back what it decoded to correct it, but {other.id} cannot give tokens back exactly"
    if method.every_step and "format" in other.slots:
        return f"{method.id} frees single tokens at every step, but {other.id} packs tokens in groups"
    return None


METHODS: dict[str, type[Method]] = {}
"""Registry: id -> class."""


def register(cls: type[Method]) -> type[Method]:
    """Class decorator: enter a method into the registry. Bad declarations fail at import."""
    if cls.id in METHODS:
        raise ValueError(f"method id {cls.id!r} is taken by {METHODS[cls.id].__name__}")
    unknown = cls.slots - set(SLOTS)
    if unknown:
        raise ValueError(f"{cls.__name__}: unknown slots {sorted(unknown)}")
    strange = set(cls.search) - {f.name for f in fields(cls)}
    if strange:
        raise ValueError(f"{cls.__name__}: search names no fields of it: {sorted(strange)}")
    METHODS[cls.id] = cls
    return cls
