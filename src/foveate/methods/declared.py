"""What methods state and are handed: roles, needs, codecs, profiles. `base.Method` says when each is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from foveate.attention import Span
from foveate.cache import Blocks, JointSide, Place, Side, Tag, View, chained
from foveate.methods.context import Context


@dataclass(frozen=True)
class Role:
    """What one layer does, decided before any token of a cache.

    Args:
        name: the method's own word for it; `select` and `attended` read it.
        visible: what this layer's heads may ever see (per-head sinks and windows); intersected with everything.
        in_prompt: False leaves the prompt's own attention dense and applies `visible` from its end on.
        place: which tokens leave the model's device for the host's memory; None: none do.
        extra: small per-layer tables (thresholds, voters, budgets) for the method's hooks.
    """

    name: str = "dense"
    visible: Span = field(default_factory=Span)
    in_prompt: bool = True
    place: Place | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Needs:
    """What the machinery must hand over in a layer; nothing is captured that nobody asked for.

    Args:
        window: `ctx.window`, the last this many prompt queries of every row, across chunks.
        columns: "sum": `view.tag("columns")`, attention mass of each key over all prompt rows so far, query heads of a
            group added up (float32); "running": and over every decoded row, of the slots that it read.
        probs: `result.probs` at decode.
        lse: `result.lse` always.
        queries: `ctx.samples`, at most this many of each row's prompt queries, by chance, for `prepare`.
        tags, blocks: values per slot and per block that the method keeps.
    """

    window: int = 0
    columns: str = ""
    probs: bool = False
    lse: bool = False
    queries: int = 0
    tags: Mapping[str, Tag] = field(default_factory=dict)
    blocks: Mapping[str, Blocks] = field(default_factory=dict)


class Result(NamedTuple):
    """What attention gave.

    Args:
        out: [B, H, N, Dv].
        lse: [B, H, N] or None when nobody needed it.
        probs: float32 [B, H, N, C] over slots, only when needed and at decode; 0 where nothing was read.
    """

    out: Tensor
    lse: Tensor | None
    probs: Tensor | None = None


class BudgetRule(Protocol):
    """Who gets how many slots: (scores [B, Hs, C] with +inf on protected slots, view, total [B]) -> counts [B, Hs]."""

    def __call__(self, scores: Tensor, view: View, total: Tensor, ctx: Context) -> Tensor: ...


def uniform(scores: Tensor, view: View, total: Tensor, ctx: Context) -> Tensor:
    """Every head of the layer holds the same number of tokens."""
    heads = view.lengths.shape[1]
    return total.to(scores.device).view(-1, 1).expand(-1, heads).minimum(view.lengths.to(total.dtype))


@dataclass(frozen=True)
class Protect:
    """Tokens that are never evicted: the first `sink`, and the newest `recent` (a float is a share of the budget)."""

    sink: int = 0
    recent: int | float = 0

    def recent_of(self, total: int) -> int:
        return int(self.recent * total) if isinstance(self.recent, float) else self.recent


@dataclass(frozen=True)
class Joint:
    """How several layers hold their prompt together, once the last of them has it; a side of None stays exact.

    Args:
        layers: indices of the group, ascending.
        turned: keys are handed over without their positions, and get them back when they are read.
    """

    layers: tuple[int, ...]
    keys: JointSide | None
    values: JointSide | None
    turned: bool = True


@dataclass(frozen=True)
class Codec:
    """How a layer holds what left the exact tail; a side of None stays exact. `joint`: what it holds with others."""

    keys: Side | None
    values: Side | None
    joint: Joint | None = None

    def then(self, other: Codec) -> Codec:
        """This codec, and another for what it hands on."""
        return Codec(chained(self.keys, other.keys), chained(self.values, other.values), self.joint or other.joint)


ARBITRARY = "arbitrary, for random weights"
"""How a profile says that its numbers were made up."""


@dataclass(frozen=True, eq=False)
class Profile:
    """What calibration produced: a small table with provenance, and weights if any, saved as one JSON file.

    Args:
        method: id of the method it is for.
        model: fingerprint of the model it was made on (`ModelShape.fingerprint`).
        data: JSON values (lists of numbers, nested).
        provenance: how it was made (settings, versions, date, seconds).
        tensors: what would be too long as a list of numbers, by name; on the CPU.
    """

    method: str
    model: str
    data: Mapping[str, Any]
    provenance: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def arbitrary(self) -> bool:
        """Whether its numbers were made up (`Method.stand_in`), not found on a model."""
        return self.provenance.get("made") == ARBITRARY

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Profile):
            return NotImplemented
        mine, its = (dict(vars(x)) for x in (self, other))
        one, two = mine.pop("tensors"), its.pop("tensors")
        # torch.equal looks at numbers alone, and a number of another width is another number here.
        alike = one.keys() == two.keys() and all(
            x.dtype == two[name].dtype and torch.equal(x, two[name]) for name, x in one.items()
        )
        return mine == its and alike
