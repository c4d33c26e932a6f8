"""A vote that stands from step to step as long as queries are alike: who would vote now, and what is read then.

Between these two, votes are held (`decode_votes`) and the best are chosen (`topk`). A recorded step launches all of it,
and reads no keys for rows where a vote stands.

Source: TokenSelect (2411.02886), section 4, its selection cache.
"""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from foveate.attention.triton.turning import channels, circle, halves, others, turned
from foveate.attention.triton.workers import jit, power_of_two


@jit(do_not_specialize=["first", "local", "wanted"])
def _voter(
    q, lengths, frequencies, query, held, out, edges, stands, theta, first, local, wanted, stride,
    HEADS: tl.constexpr, HP: tl.constexpr, STATE: tl.constexpr, DK: tl.constexpr, F: tl.constexpr, FP: tl.constexpr,
    FIRST: tl.constexpr, REST: tl.constexpr, RP: tl.constexpr, OTHERS: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(0).to(tl.int64)
    own = tl.load(lengths + batch * stride) - 1
    edge = tl.maximum(own - local + 1, first)
    head, d = tl.arange(0, HP), tl.arange(0, FP)
    there = head < HEADS
    offsets = (batch * HEADS + head) * DK
    cos, sin = circle((local - own).to(tl.float32) * tl.load(frequencies + d, mask=d < F, other=0.0))
    x1, x2 = halves(q, offsets, there, FIRST, F, FP)
    x1, x2 = turned(x1, x2, cos[None, :], sin[None, :])
    inside = there[:, None] & (d < F)[None, :]
    place = out + offsets[:, None] + FIRST + d[None, :]
    tl.store(place, x1, mask=inside)
    tl.store(place + F, x2, mask=inside)
    if REST:
        x3 = others(q, offsets, there, OTHERS, REST, RP).to(tl.float32)
        r = tl.arange(0, RP)
        tl.store(out + offsets[:, None] + OTHERS + r[None, :], x3, mask=there[:, None] & (r < REST)[None, :])
    tl.store(edges + batch, edge)
    if STATE:
        y1, y2 = halves(query, offsets, there, FIRST, F, FP)
        both, mine = tl.sum(tl.sum(x1 * y1 + x2 * y2, 1), 0), tl.sum(tl.sum(x1 * x1 + x2 * x2, 1), 0)
        before = tl.sum(tl.sum(y1 * y1 + y2 * y2, 1), 0)
        if REST:
            y3 = others(query, offsets, there, OTHERS, REST, RP)
            both += tl.sum(tl.sum(x3 * y3, 1), 0)
            mine += tl.sum(tl.sum(x3 * x3, 1), 0)
            before += tl.sum(tl.sum(y3 * y3, 1), 0)
        cosine = both / (tl.maximum(tl.sqrt(mine), 1e-8) * tl.maximum(tl.sqrt(before), 1e-8))
        stays = (tl.load(held + batch) != 0) & (edge - first > wanted) & (cosine >= theta)
        tl.store(stands + batch, stays.to(tl.int32))


@torch.library.custom_op(
    "foveate::newest_voter",
    mutates_args=(),
    schema="(Tensor q, Tensor lengths, Tensor frequencies, bool last, SymInt first, SymInt local, SymInt k, "
    "float theta, Tensor? query, Tensor? held) -> (Tensor, Tensor, Tensor)",
)
def newest_voter(
    q: Tensor,
    lengths: Tensor,
    frequencies: Tensor,
    last: bool,
    first: int,
    local: int,
    k: int,
    theta: float,
    query: Tensor | None,
    held: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `foveate.attention.turned.newest_voter`; q is contiguous, and `held` bool [B]."""
    out, edges, stands = _no_voter(q, query is not None)
    if query is None or held is None:
        stands.zero_()
    _voter[(q.shape[0],)](
        q, lengths, frequencies, q if query is None else query, q if held is None else held.view(torch.uint8), out,
        edges, stands, theta, first, local, k, lengths.stride(0), HEADS=q.shape[1], HP=power_of_two(q.shape[1]),
        STATE=query is not None, **channels(q.shape[3], frequencies.numel(), last), num_warps=8,
    )  # fmt: skip
    return out, edges, stands


def _no_voter(q: Tensor, *state: object) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, _, dim = q.shape
    out = torch.empty(batch, 1, heads, dim, dtype=torch.float32, device=q.device)
    edges = torch.empty(batch, 1, dtype=torch.int32, device=q.device)
    return out, edges, torch.empty(batch, dtype=torch.int32, device=q.device)


newest_voter.register_fake(_no_voter)


@jit(do_not_specialize=["first", "wanted", "width"])
def _tally(
    voter, edges, lengths, stands, chosen, counts, query, winners, lists, places, new_query, new_winners, new_held,
    first, wanted, width, numbers, stride, STATE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    edge, length = tl.load(edges + batch), tl.load(lengths + batch * stride)
    count = tl.load(counts + batch)
    stays = batch < 0
    if STATE:
        stays = tl.load(stands + batch) != 0
        count = tl.where(stays, wanted, count)  # a vote that stands chose as many as there may be
    at = i - first
    among = (at >= 0) & (at < count)
    slot = tl.load(chosen + batch * wanted + at, mask=among & (stays == 0), other=0)
    if STATE:
        slot += tl.load(winners + batch * wanted + at, mask=among & stays, other=0)
    gap = edge - first - count
    slot = tl.where(i < first, i, tl.where(at < count, slot, gap + i))
    tl.store(lists + batch * width + i, tl.where(slot < length, slot, -1), mask=i < width)
    tl.store(places + batch * width + i, gap + i, mask=i < width)
    won = tl.load(chosen + batch * wanted + i, mask=(i < wanted) & (stays == 0), other=0)
    x = tl.load(voter + batch * numbers + i, mask=(i < numbers) & (stays == 0), other=0.0)
    if STATE:
        won += tl.load(winners + batch * wanted + i, mask=(i < wanted) & stays, other=0)
        x += tl.load(query + batch * numbers + i, mask=(i < numbers) & stays, other=0.0)
    tl.store(new_winners + batch * wanted + i, won, mask=i < wanted)
    tl.store(new_query + batch * numbers + i, x, mask=i < numbers)
    tl.store(new_held + batch + i, (edge - first + i * 0 > wanted).to(tl.uint8), mask=i == 0)


@torch.library.custom_op(
    "foveate::tally_votes",
    mutates_args=(),
    schema="(Tensor voter, Tensor edges, Tensor lengths, Tensor stands, Tensor chosen, Tensor counts, SymInt first, "
    "SymInt local, SymInt k, Tensor? query, Tensor? winners) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def tally_votes(
    voter: Tensor,
    edges: Tensor,
    lengths: Tensor,
    stands: Tensor,
    chosen: Tensor,
    counts: Tensor,
    first: int,
    local: int,
    k: int,
    query: Tensor | None,
    winners: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `foveate.attention.turned.tally`: lists and places, and the vote that stands now."""
    made = _no_tally(voter, edges, lengths, stands, chosen, counts, first, local, k)
    width, numbers, block = made[0].shape[1], made[2].shape[1], 1024
    _tally[(voter.shape[0], -(-max(width, numbers) // block))](
        voter, edges, lengths, stands, chosen, counts, voter if query is None else query,
        chosen if winners is None else winners, *made[:4], made[4].view(torch.uint8), first, k, width, numbers,
        lengths.stride(0), STATE=query is not None, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return made


@tally_votes.register_fake
def _no_tally(
    voter: Tensor, edges: Tensor, lengths: Tensor, stands: Tensor, chosen: Tensor, counts: Tensor, *sizes: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, (first, local, k) = voter.shape[0], sizes[:3]
    lists, places = (chosen.new_empty(batch, first + k + local) for _ in range(2))
    query, held = voter.new_empty(batch, voter[0].numel()), voter.new_empty(batch, dtype=torch.bool)
    return lists, places, query, chosen.new_empty(batch, k), held
