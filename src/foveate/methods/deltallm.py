"""DeltaLLM: near tokens exactly, far ones by what changed from key to key."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.attention import ALL, Partial, Parts, Selection, Span
from foveate.cache import Tag, View
from foveate.errors import BadArgument, Refused
from foveate.methods.base import Context, Method, Needs, Profile, Result, Role, register, tries
from foveate.methods.policies.deltas import followed, products
from foveate.models.shape import ModelShape

REFERENCE, CHANGES = "deltallm", "deltallm changes"
"""Tags: a token's reference key, and how many of its channels differ from the reference before it."""


@register
@dataclass(frozen=True, kw_only=True)
class DeltaLLM(Method):
    """Beyond a local window, logits are those of reference keys: a channel of a key that is less than `theta` away from
    the reference before it is taken over from there. A logit is then its neighbour's plus the products of the few
    channels that changed, so multiplications are skipped for the others. In the window keys are exact, values always.
    Prompt and decode alike; no token is dropped.

    This computes what such hardware would compute, not as it would: references are held beside the keys, every pair is
    read, and nothing gets faster or smaller. `cache.meter` counts the multiplications of q·K that remain and those of
    dense attention (`prompt_macs`, `prompt_macs_dense` and the same of decode).

    Keys are followed as they are cached, after their rotation: differences of unrotated keys would be smaller, but
    could not be added up.

    Args:
        theta: smallest change that counts, in units of the keys; 0 is exact. Good ones differ between models.
        window: newest tokens whose keys are exact, the query's own among them.

    Source: 2507.19608, whose abstract is all that this rests on: the rule for differences is that of delta networks,
    and both defaults are ours (a theta of 1 skips nearly half of the multiplications on the built-in model).
    """

    id = "deltallm"
    name = "DeltaLLM"
    paper = "2507.19608"
    slots = frozenset({"prefill", "decode", "weights"})
    budgeted = False
    search = tries(theta=(0.25, 0.5, 1.0, 2.0), window=(32, 64, 128, 256))

    theta: float = 1.0
    window: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.theta >= 0:
            raise BadArgument("theta", self.theta, "give 0 or more")
        if self.window < 1:
            raise BadArgument("window", self.window, "give at least 1 token, so that a query sees its own key")

    def plan(self, shape: ModelShape, profile: Profile | None, length: int) -> Sequence[Role]:
        if any(layer.latent for layer in shape.layers):
            raise Refused(f"{shape.name} caches latents (MLA), whose differences are not those of its keys")
        return [Role("delta", extra={"dim": layer.head_dim, "dtype": shape.dtype}) for layer in shape.layers]

    def needs(self, role: Role) -> Needs:
        if role.name != "delta":
            return Needs()
        # How many channels changed is below 0 where a token has no reference yet.
        reference = Tag(role.extra["dim"], role.extra["dtype"])
        return Needs(tags={REFERENCE: reference, CHANGES: Tag(dtype=torch.int16, fill=-1)})

    def select(self, q: Tensor, view: View, ctx: Context) -> Parts:
        if ctx.role.name != "delta" or view.longest <= self.window:
            return ALL
        references, changed = followed(view.k(), view, self.theta, view.tag(REFERENCE), view.tag(CHANGES).squeeze(-1))
        ctx.forward[f"followed {ctx.layer}"] = references, changed
        far = Selection(span=Span(beyond=self.window))
        found = ctx.attend(q, view, far, keys=references)
        assert found.lse is not None
        return [Selection(span=Span(window=self.window)), Partial(found.out, found.lse, far)]

    def attended(self, q: Tensor, view: View, result: Result, ctx: Context) -> None:
        references, changed = ctx.forward.pop(f"followed {ctx.layer}", (None, None))
        if references is not None and changed is not None:
            view.write(REFERENCE, references)
            view.write(CHANGES, changed.unsqueeze(-1))
        if ctx.counts and ctx.role.name == "delta":
            needed, dense = products(q, view, changed, self.window)
            ctx.count(needed, of="macs")
            ctx.count(dense, of="macs_dense")
