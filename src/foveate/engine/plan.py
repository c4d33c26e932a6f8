"""What a composition of methods means for each layer of one cache, decided before its first token."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import reduce
from typing import TypeVar

from foveate.attention import Span
from foveate.cache import Blocks, Place, StoreSpec, Tag
from foveate.errors import Infeasible, Refused
from foveate.methods.base import Codec, Composition, Method, Needs, Profile, Role
from foveate.models.shape import LayerShape, ModelShape

COLUMNS = "columns"
"""Name of the tag that holds accumulated attention mass."""

MODEL_WINDOW = Role("model window")
"""Role of a layer whose own sliding window bounds it: prefill, keep and decode methods leave it alone."""

T = TypeVar("T")


@dataclass(frozen=True)
class LayerPlan:
    """One layer of one cache.

    Args:
        shape: the layer's geometry.
        roles: role of each method in it, by id.
        needs: union of what the methods need.
        spans: visibility promises that hold once the prompt is over; prompt_spans: those that hold inside it.
        codec: how kept tokens are held, or None.
        value_dim: rank of the latent under MLA.
        place: which tokens leave the device, or None.
    """

    shape: LayerShape
    roles: Mapping[str, Role]
    needs: Needs
    spans: tuple[Span, ...] = ()
    prompt_spans: tuple[Span, ...] = ()
    codec: Codec | None = None
    value_dim: int | None = None
    place: Place | None = None
    own: Mapping[str, Needs] = field(default_factory=dict)

    @property
    def settles_in_prompt(self) -> bool:
        """Whether tokens may be freed before the prompt is complete."""
        return self.spans == self.prompt_spans

    def store_spec(self, *, heads: int | None = None, latent: bool = True) -> StoreSpec:
        """The store this layer needs; `heads` and latent=False describe expanded MLA heads in a prompt."""
        return StoreSpec(
            heads=heads or self.shape.store_heads,
            spans=self.spans,
            tags=self.needs.tags,
            blocks=self.needs.blocks,
            value_dim=self.value_dim if latent else None,
            place=self.place if heads is None else None,
        )


def plan_layers(
    composition: Composition,
    shape: ModelShape,
    profiles: Mapping[str, Profile],
    length: int,
    ranks: Mapping[int, int],
    capture: Needs | None = None,
) -> dict[int, LayerPlan]:
    """Roles of all methods merged layer by layer, for a cache whose prompt has `length` tokens.

    Args:
        ranks: latent rank of each MLA layer.
        capture: further needs, for a prompt that several methods will share.
    """
    roles = {
        m.id: list(feasible(lambda n, m=m: m.plan(shape, profiles.get(m.id), n), length, shape))
        for m in composition.methods
    }
    plans = {}
    for layer in shape.layers:
        if layer.kind == "other":
            continue
        mine: dict[str, Role] = {}
        own: dict[str, Needs] = {}
        spans: list[Span] = []
        prompt: list[Span] = []
        if layer.window is not None:
            spans.append(Span(window=layer.window))
            prompt.append(spans[0])
        codecs: list[Codec] = []
        place: Place | None = None
        for method in sorted(composition.methods, key=lambda m: not m.hands_on):
            role = roles[method.id][layer.index]
            if layer.kind == "sliding":
                role = MODEL_WINDOW
            mine[method.id] = role
            own[method.id] = method.needs(role) if role is not MODEL_WINDOW else Needs()
            if not role.visible.unbounded:
                spans.append(role.visible)
                if role.in_prompt:
                    prompt.append(role.visible)
            place = place or role.place
            codec = None if role is MODEL_WINDOW else method.codec(role, shape, length)
            if codec is not None:
                codecs.append(codec)
        wanted = [*own.values(), *([capture] if capture is not None and layer.kind == "full" else [])]
        plans[layer.index] = LayerPlan(
            shape=layer,
            roles=mine,
            needs=unite(wanted),
            spans=tuple(spans),
            prompt_spans=tuple(prompt),
            codec=reduce(Codec.then, codecs) if codecs else None,
            value_dim=ranks.get(layer.index),
            place=place,
            own=own,
        )
    return plans


def unite(needs: list[Needs]) -> Needs:
    """The union of several methods' needs.

    Raises:
        Refused: when two methods declare different things under one name.
    """
    tags: dict[str, Tag] = {}
    blocks: dict[str, Blocks] = {}
    for need in needs:
        wanted = dict(need.tags)
        if need.columns:
            wanted[COLUMNS] = Tag()
        for name, tag in wanted.items():
            if tags.setdefault(name, tag) != tag:
                raise Refused(f"two methods declare the tag {name!r} differently; name it after the method")
        for name, spec in need.blocks.items():
            if blocks.setdefault(name, spec) != spec:
                raise Refused(f"two methods declare the summary {name!r} differently; name it after the method")
    sums = {n.columns for n in needs}
    return Needs(
        window=max((n.window for n in needs), default=0),
        columns="running" if "running" in sums else max(sums, default=""),
        probs=any(n.probs for n in needs),
        lse=any(n.lse for n in needs),
        queries=max((n.queries for n in needs), default=0),
        tags=tags,
        blocks=blocks,
    )


def feasible(make: Callable[[int], T], length: int, shape: ModelShape) -> T:
    """`make(length)`, or for a prompt too short to meet its budget the answer for the shortest that could.

    A short prompt is then simply held whole: there is nothing to save yet. A budget that no length within the model's
    positions can meet is refused with its floor.
    """
    n = max(1, length)
    limit = max(shape.max_positions, n)
    while True:
        try:
            return make(n)
        except Infeasible:
            if n >= limit:
                raise
            n = min(limit, 2 * n)


def scoring(composition: Composition) -> Method | None:
    """The method that evicts by score, if any."""
    method = composition.filling("keep")
    return method if method is not None and method.scores else None
