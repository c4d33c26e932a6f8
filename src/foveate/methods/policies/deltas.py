"""Keys followed by thresholded differences: what a delta network would have in its place."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.attention import decoding
from foveate.cache import View


@torch.no_grad()
def follow(keys: Tensor, theta: float, known: Tensor, made: Tensor) -> Tensor:
    """References r along the tokens of keys [..., C, D]: a channel of r_t is that of the key where it is at least
    `theta` away from r_(t-1), and else stays. So every channel of every r is less than theta from its key, and
    errors do not add up. The first r is the first key.

    Args:
        known: [..., C, D], references of the tokens that have one.
        made: bool [..., C], which those are; all others are followed from the slot before.

    Returns:
        [..., C, D].

    Source: DeltaLLM (2507.19608), abstract; the rule is that of delta networks.
    """
    out = known.clone()
    missing = (~made).flatten(0, -2).any(0).nonzero().flatten()
    if not len(missing):
        return out
    start = int(missing[0])
    stop = int(missing[-1]) + 1
    before = keys.select(-2, 0) if start == 0 else out.select(-2, start - 1)
    given = made[..., start:stop]
    tokens = torch.where(given.unsqueeze(-1), known[..., start:stop, :], keys[..., start:stop, :])
    pinned = given.flatten(0, -2) if bool(given.any()) else None
    walked = _walked(tokens.flatten(0, -3), theta, before.flatten(0, -2), pinned)
    out[..., start:stop, :] = walked.view_as(tokens)
    return out


def _walked(tokens: Tensor, theta: float, before: Tensor, given: Tensor | None) -> Tensor:
    """References of tokens [R, n, D] behind references [R, D]; `given` ones, bool [R, n], are their own."""
    if decoding.serves(tokens)[0]:
        from foveate.attention.triton.follow import follow as walk

        return walk(tokens, theta, before, given)
    # A reference is no function of few numbers of its past: the tokens are taken in turn, all rows at once.
    out = torch.empty_like(tokens)
    for t in range(tokens.shape[1]):
        now = tokens[:, t]
        changed = (now - before).abs() >= theta
        if given is not None:
            changed |= given[:, t, None]
        before = torch.where(changed, now, before)
        out[:, t] = before
    return out


def changes(references: Tensor) -> Tensor:
    """How many channels of r_t [..., C, D] differ from r_(t-1), int64 [..., C]: the numbers that a delta stream stores,
    and that a logit adds up. The first token's are those that are not 0."""
    return torch.cat([references[..., :1, :], references.diff(dim=-2)], dim=-2).count_nonzero(dim=-1)


def followed(keys: Tensor, view: View, theta: float, references: Tensor, changed: Tensor) -> tuple[Tensor, Tensor]:
    """References [B, Hs, C, D] of all held tokens and how many of their channels changed [B, Hs, C]: those that are
    known (`changed` is not below 0), the others made now."""
    away = (keys - references).abs()
    # Where another method holds keys in fewer bits they are not what they were when they arrived.
    made = (changed >= 0) & ((away < theta) | (away == 0)).all(-1) | ~view.valid()
    if bool(made.all()):
        return references, changed
    references = follow(keys, theta, references, made)
    return references, torch.where(made, changed, changes(references).to(changed.dtype))


def products(q: Tensor, view: View, changed: Tensor | None, window: int) -> tuple[float, float]:
    """Multiplications of q·K: all channels of the `window` newest keys, of far ones those that changed [B, Hs, C]
    (None: all); and those of dense attention."""
    group, dim = q.shape[1] // view.lengths.shape[1], q.shape[3]
    positions, order = view.positions.masked_fill(~view.valid(), torch.iinfo(torch.int32).max).sort(dim=-1)
    cost = torch.full_like(order, dim) if changed is None else changed.long().gather(-1, order)
    cost = F.pad(cost.cumsum(-1), (1, 0))  # of the first so many tokens
    columns = torch.arange(q.shape[2], device=q.device)
    own = ((view.seen - view.fresh)[:, None] + columns).to(positions.dtype)
    own = own.unsqueeze(1).expand(-1, positions.shape[1], -1).contiguous()
    real = (columns < view.fresh[:, None]).unsqueeze(1)
    seen, far = (torch.searchsorted(positions, x, right=True) for x in (own, own - window))
    needed = float((((seen - far) * dim + cost.gather(-1, far)) * real).sum())
    return group * needed, group * float((seen * real).sum()) * dim
