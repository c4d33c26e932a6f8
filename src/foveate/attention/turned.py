"""Kernels that turn keys as they read them, for keys that were rotated by their slots (Triton)."""

from __future__ import annotations

from importlib import import_module
from typing import Any, NamedTuple

from torch import Tensor

from foveate.attention import decoding
from foveate.attention.angles import Angles
from foveate.attention.selection import Partial
from foveate.errors import BadArgument


class Rule(NamedTuple):
    """Who is read besides those that win votes, and how long a vote stands.

    Args:
        first: tokens that are always read; local: newest tokens that are; k: tokens that win.
        theta: cosine of query and voter from which on a vote stands.
    """

    first: int
    local: int
    k: int
    theta: float


class Vote(NamedTuple):
    """The last vote of each row: who made it, float32 [B, H * D], who won, int32 [B, k], and whether there was any."""

    query: Tensor
    winners: Tensor
    held: Tensor


def serves(x: Tensor, angles: Angles | None) -> bool:
    """Whether the kernels can be used for queries x [..., D] on their device."""
    return angles is not None and angles.fit(x.shape[-1]) and not x.requires_grad and decoding.serves(x)[0]


def read(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: Tensor,
    places: Tensor,
    lengths: Tensor,
    angles: Angles,
    *,
    page: int,
    scale: float,
    softcap: float | None,
) -> Partial:
    """Attention of q [U, G, 1, Dk] over the pages `lists` (int32 [U, K]) of k [P, C, Dk] and v [P, C, Dv], whose first
    keys stand at `places`; of slots below `lengths` (int32 [P]). U / P units in a row read one pair."""
    kernel = _kernels("decode_framed").decode_framed
    given = (lists, places, lengths, angles.frequencies.to(q.device).float())
    return Partial(*kernel(q, k, v, *given, last=angles.last, page=page, scale=scale, softcap=softcap))


def read_grouped(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: Tensor,
    places: Tensor,
    ends: Tensor,
    angles: Angles,
    *,
    size: int,
    scale: float,
    softcap: float | None,
) -> Partial:
    """Attention of q [B, H, n, Dk] over the blocks `lists` [B, H, n, K] of k [B, M, Dk] and v [B, M, Dv], whose first
    keys stand at `places`; of slots below `ends` [B, n]. Whatever its queries, each block is read with all of them."""
    kernel = _kernels("grouped_read").grouped_read
    return Partial(*kernel(q, k, v, lists, places, ends, angles, size=size, scale=scale, softcap=softcap))


def feature_scores(
    q: Tensor,
    features: Tensor,
    own: Tensor,
    high: Tensor,
    sure: Tensor | None,
    angles: Angles,
    *,
    place: int,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """Products of single queries q [B, H, 1, D], turned from `own` (int64 [B]) to `place`, with features of blocks,
    float32 [B, h, n, D]: float32 [B, H, 1, n], -inf from block `high` on, inf for block 0 and from `sure` on."""
    kernel = _kernels("feature_scores").feature_scores
    out: Tensor = kernel(q, features, own, high, sure, angles, place=place, scale=scale, softcap=softcap)
    return out


def newest_mean(means: Tensor, k: Tensor, lengths: Tensor, size: int, angles: Angles) -> None:
    """Write the mean of the keys k [B, Hs, C, D] of each row's newest block, at position 0, to its place in means,
    float32 [B, Hs, n, D], if a block of `size` slots ends with the `lengths` (int32 [B])."""
    _kernels("newest_mean").newest_mean(means, k, lengths, size, angles)


def line_up(chosen: Tensor, own: Tensor, most: int, size: int, near: int) -> tuple[Tensor, Tensor]:
    """Chosen blocks of single queries, int32 [B, H, 1, K], and behind them the `near` newest, with the places at which
    they are met; see `triton.line_up.line_up`."""
    made: tuple[Tensor, Tensor] = _kernels("line_up").line_up(chosen, own, most, size, near)
    return made


def multiplies(q: Tensor) -> bool:
    """Whether `feature_products` can be used for queries [B, H, N, D] on their device."""
    return not q.requires_grad and q.shape[3] <= 256 and q.stride(3) == 1 and decoding.serves(q)[0]


def feature_products(
    q: Tensor, features: Tensor, high: Tensor, sure: Tensor | None, *, scale: float, softcap: float | None
) -> Tensor:
    """Products of the queries q [B, H, N, D] of a prompt, already where they meet them, with features of blocks,
    float32 [B, h, n, D]: float32 [B, H, N, n], -inf from block `high` (int [B, N]) on, inf for block 0 and from `sure`
    on."""
    kernel = _kernels("feature_products").feature_products
    out: Tensor = kernel(q, features, high, sure, scale=scale, softcap=softcap)
    return out


def votes(
    voters: Tensor,
    k: Tensor,
    begin: int,
    edges: Tensor,
    angles: Angles,
    scale: float,
    stands: Tensor | None = None,
    *,
    rounded: bool,
) -> Tensor:
    """Votes of voters [B, T, H, D], float32, for the keys k [B * Hs, C, D], at position 0, from slot `begin` on and in
    front of `edges` [B, T]: float32 [B, T, C], -inf elsewhere, and in rows that `stands` (int32 [B]).

    Args:
        rounded: to the nearest bfloat16.
    """
    out: Tensor = _kernels("decode_votes").turned_votes(
        voters,
        k,
        begin,
        edges.int(),
        angles.frequencies.to(k.device).float(),
        scale,
        last=angles.last,
        stands=stands,
        rounded=rounded,
    )
    return out


def newest_voter(
    q: Tensor, lengths: Tensor, angles: Angles, rule: Rule, vote: Vote | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The newest query of each row at position `local`, the slot where its local part begins, and whether the vote
    stands: it is one, not all tokens between are read now, and the queries are alike.

    Args:
        q: [B, H, 1, D], standing at lengths - 1.
        lengths: int32 [B].

    Returns:
        float32 [B, 1, H, D]; int32 [B, 1]; int32 [B], 0 everywhere without a vote.
    """
    if q.shape[2] != 1 or not angles.fit(q.shape[3]):
        raise BadArgument("q", tuple(q.shape), "give one query per row, and a frequency for each pair of its channels")
    kernel = _kernels("standing_vote").newest_voter
    frequencies, state = angles.frequencies.to(q.device).float(), vote or (None, None, None)
    found: tuple[Tensor, Tensor, Tensor] = kernel(
        q.contiguous(), lengths, frequencies.contiguous(), angles.last, *rule, state[0], state[2]
    )
    return found


def tally(
    voter: Tensor,
    edges: Tensor,
    lengths: Tensor,
    stands: Tensor,
    chosen: Tensor,
    counts: Tensor,
    rule: Rule,
    vote: Vote | None,
) -> tuple[Tensor, Tensor, Vote]:
    """What is read after a vote, or while one stands.

    Args:
        voter, edges, stands: of `newest_voter`; lengths: int32 [B].
        chosen, counts: int32 [B, k], ascending, and how many of them are meant [B].

    Returns:
        Slots, int32 [B, first + k + local], ascending, -1 behind the end; the places at which they are read, without
        gaps and the newest where it is; and the vote that stands now.
    """
    kernel, state = _kernels("standing_vote").tally_votes, vote or (None, None, None)
    lists, places, *now = kernel(voter, edges, lengths, stands, chosen, counts, *rule[:3], *state[:2])
    return lists, places, Vote(*now)


def _kernels(module: str) -> Any:
    return import_module(f"foveate.attention.triton.{module}")
