"""Recorded decode steps that recall blocks, in a few launches. What is remembered is changed where it lies, and only
when the step has attended."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from foveate.attention import Partial, recalled, turned
from foveate.attention.recalled import Borders, Share
from foveate.cache import View
from foveate.methods.base import Context
from foveate.methods.policies.recall import known_blocks


class _Made(NamedTuple):
    """What a step saw of its newest tokens, the entropies of its choice [B], the blocks left to others [B], and the
    number of its layer among those that share."""

    seen: Any
    entropy: Tensor
    left: Tensor
    number: int


def serves(q: Tensor, view: View, ctx: Context) -> bool:
    """Whether this is such a step, after one that was made in the ordinary way."""
    held, known, mass = view.held, ctx.mine.get("blocks"), ctx.mine.get("mass")
    if held is None or known is None or mass is None or q.shape[2] != 1 or ctx.counts or ctx.phase != "decode":
        return False
    if not view.in_place:
        return False
    fits = q.dtype == held.stores.k.dtype and known.shape[3] == q.shape[3] and turned.serves(q, ctx.rope.angles())
    fits = fits and known.shape[1] * len(q) == len(held.stores.k) and recalled.serves(known.shape[2])
    return fits and "entropy" in ctx.mine and "entropy" in ctx.shared and not view.exceeds(mass.shape[1])


def step(q: Tensor, view: View, ctx: Context, at: Borders, share: Share) -> Partial:
    """Attention of q [B, H, 1, D] over the newest tokens, the first ones, and the blocks that it recalls."""
    assert view.held is not None
    stores, angles, left = view.held.stores, ctx.rope.angles(), ctx.forward.get("left")
    left = None if left is None else left[:, 0]
    known, means = ctx.mine["blocks"], ctx.shared["entropy"]
    chosen, entropy, left = recalled.recall(q, known, stores.lengths, angles, at, share, left, means)
    given = (stores.k, stores.v, stores.lengths, chosen, angles, at)
    part, seen = recalled.read(q, *given, scale=ctx.scale, softcap=ctx.softcap)
    ctx.forward[f"recalled {ctx.layer}"] = _Made(seen, entropy, left, share.number)
    return part


def settled(view: View, ctx: Context, at: Borders, count: int) -> bool:
    """Remember what the step saw, and the `count` keys by which a block is known that it completed. False if there was
    no such step."""
    made: _Made | None = ctx.forward.pop(f"recalled {ctx.layer}", None)
    if made is None or view.held is None:
        return False
    mass, past, means = ctx.mine["mass"], ctx.mine["entropy"], ctx.shared["entropy"]
    recalled.settle(made.seen, view.held.stores.lengths, made.entropy, mass, past, means, at, made.number)
    ctx.mine["blocks"] = known_blocks(ctx.mine["blocks"], view, mass, count, at, ctx, single=True)
    ctx.forward["left"] = made.left.unsqueeze(1)
    return True
