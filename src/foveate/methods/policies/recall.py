"""Blocks of the past that a probe recalls: what a block is known by, how it is scored, and how sharp the choice is."""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.attention import Selection
from foveate.attention.recalled import Borders
from foveate.cache import View
from foveate.methods.base import Context
from foveate.methods.policies.complete import completes, newest, room
from foveate.methods.policies.positions import at_position


def representative_means(keys: Tensor, mass: Tensor, count: int) -> Tensor:
    """Means of the `count` keys with most mass of each block: keys [B, Hs, blocks, size, D] and mass
    [B, blocks, size] -> [B, Hs, blocks, D]. Ties go to earlier keys."""
    best = mass.argsort(dim=-1, descending=True, stable=True)[:, None, :, :count, None]
    return keys.gather(3, best.expand(-1, keys.shape[1], -1, -1, keys.shape[-1])).mean(3)


def cosines(probes: Tensor, blocks: Tensor) -> Tensor:
    """Cosines [B, pieces, blocks] of probes [B, H, pieces, D] and keys [B, Hs, blocks, D], heads side by side, each
    kv head's key repeated for its query heads."""
    group = probes.shape[1] // blocks.shape[1]
    both = torch.einsum("bspd,bsnd->bpn", probes.unflatten(1, (-1, group)).sum(2), blocks)
    size = (group * blocks.square().sum((1, 3))).sqrt().unsqueeze(1) * probes.square().sum((1, 3)).sqrt().unsqueeze(-1)
    return both / size.clamp_min(1e-12)


def normalised_entropy(scores: Tensor) -> Tensor:
    """Entropy of the softmax of scores [..., n], some of which may be -inf: 1 where all are equal, 0 of a single."""
    share = scores.softmax(-1).nan_to_num(0.0)
    count = (scores > -torch.inf).sum(-1).clamp_min(2)
    return torch.special.entr(share).sum(-1) / count.log()


def taken(left: Tensor, means: Tensor | None, number: int, layers: int, least: int, most: int) -> Tensor:
    """How many of the `left` blocks [B, pieces] layer `number` of `layers` takes: in proportion to its mean entropy
    among those of the layers from it on, at least `least` and at most `most`, which leaves `least` to each of the rest.

    Args:
        means: entropies [B, layers]; a row of which any is negative (unknown) shares equally, as all do without.

    Source: ActQKV (2502.13542), section 3, with its bounds kept from exceeding the whole.
    """
    share = torch.full((len(left), 1), 1 / (layers - number), device=left.device)
    if means is not None:
        own = (means[:, number] / means[:, number:].sum(1)).unsqueeze(1)
        share = torch.where(own.isfinite() & (means >= 0).all(1, keepdim=True), own, share)
    take = (share * left).round().long().clamp(least, most)
    return torch.minimum(take, left - least * (layers - 1 - number))


def known_blocks(
    known: Tensor | None, view: View, mass: Tensor, count: int, at: Borders, ctx: Context, *, single: bool
) -> Tensor:
    """What each block that the next token finds ready is known by (`representative_means` of its keys without position,
    by mass [B, slots]), float32 [B, Hs, blocks, D], and room for more.

    Args:
        known: the same of the last forward, if there was one.
        single: whether one token came with this forward, or several.
    """
    size, first, ahead, keys = at.block, at.init, at.ahead, view.k()
    if known is not None and (known.shape[1], known.shape[3]) != (keys.shape[1], keys.shape[3]):
        known = None  # MLA: heads in the prompt, then latents
    if known is not None and single and not view.exceeds(ahead + (known.shape[2] + 1) * size - 1):
        if not completes(ctx.seen, size, ahead):
            return known
        last = newest(view, size, ahead)
        slots = last.slots(size, first)
        raw = at_position(last.of(keys, size, first), slots, 0, ctx.rope).float().unsqueeze(2)
        return last.put(known, representative_means(raw, mass.gather(1, slots).unsqueeze(1), count)[:, :, 0])
    lengths = view.host_lengths[:, 0]
    total = max(0, (int(lengths.max()) - ahead) // size)
    begin = 0 if known is None else max(0, (int((lengths - view.host_fresh).min()) - ahead) // size)
    held = 0 if known is None else known.shape[2]
    chunks = held if known is not None and total <= held else room(total, size)
    blocks = keys.new_zeros(len(keys), keys.shape[1], chunks, keys.shape[3], dtype=torch.float32)
    if known is not None:
        blocks[:, :, :held] = known
    if begin < total:
        some = slice(first + begin * size, first + total * size)
        raw = at_position(keys[:, :, some], view.positions[:, :, some], 0, ctx.rope).float()
        shares = mass[:, some].unflatten(1, (-1, size))
        blocks[:, :, begin:total] = representative_means(raw.unflatten(2, (-1, size)), shares, count)
    return blocks


def newest_tokens(starts: Tensor, ready: Tensor, per: int, view: View, at: Borders) -> Selection:
    """The newest tokens of each piece of `per` queries that begins at `starts` [B, pieces]: from where its `ready`
    blocks, or the first tokens, end."""
    edge = torch.minimum((starts - at.local + 1).clamp_min(0), at.init + ready * at.block)
    slots = edge.unsqueeze(-1) + torch.arange(at.local + at.block + per - 2, device=edge.device)
    ends = torch.minimum(starts + per, view.lengths[:, :1]).unsqueeze(-1)
    return Selection(lists=torch.where(slots < ends, slots, -1).to(torch.int32).unsqueeze(1), q_block=per)


def first_tokens(starts: Tensor, init: int, local: int) -> Tensor:
    """The first tokens, as far as they are not among the newest of a piece, int32 [B, pieces, init]."""
    sinks = torch.arange(init, dtype=torch.int32, device=starts.device)
    return torch.where(sinks <= (starts - local).unsqueeze(-1), sinks, -1)
