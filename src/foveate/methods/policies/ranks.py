"""Tokens by the best rank that any query head of a group gives them, between the first and the newest tokens."""

from __future__ import annotations

from importlib import import_module

import torch
from torch import Tensor

from foveate.attention import Selection, decoding, turned
from foveate.cache import View
from foveate.methods.base import Context
from foveate.methods.policies.lists import top_lists
from foveate.methods.policies.positions import at_position


def best_ranks(scores: Tensor, each: int) -> Tensor:
    """The best rank of each token among the query heads of its group: scores [B, Hs, G, N, C], of which -inf is never
    ranked, give int64 [B, Hs, N, C]; C for tokens that are no head's `each` best. Ties go to earlier tokens."""
    capacity = scores.shape[-1]
    best = top_lists(scores, each)
    there = best.long().clamp_min(0)
    order = scores.gather(-1, there).masked_fill(best < 0, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    number = torch.arange(order.shape[-1], device=scores.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(-1, order, number).masked_fill(best < 0, capacity)
    there, rank = (x.transpose(2, 3).flatten(3) for x in (there, rank))
    least = torch.full_like(scores[:, :, 0], capacity, dtype=torch.int64)
    return least.scatter_reduce_(-1, there, rank, "amin")


def among_best(scores: Tensor, each: int, counts: Tensor) -> Tensor:
    """The tokens that are among the best of any query head of a group: the `counts` best, int [B, Hs, N, 1] and never
    more than `each`, of scores [B, Hs, G, N, C] give bool [B, Hs, N, C]. -inf is never among them, ties go to earlier
    tokens."""
    group, capacity = scores.shape[2], scores.shape[-1]
    best = top_lists(scores, each, counts.squeeze(-1).unsqueeze(2).expand(-1, -1, group, -1)).long()
    best = best.masked_fill(best < 0, capacity).transpose(2, 3).flatten(3)
    flags = torch.zeros(*best.shape[:-1], capacity + 1, dtype=torch.bool, device=scores.device)
    return flags.scatter_(-1, best, True)[..., :capacity]


def code_scores(table: Tensor, codes: Tensor, seen: Tensor, forced: Tensor) -> Tensor:
    """What the codes of tokens score: table [B, Hs, G, N, X] of what each code gives and codes int16 [B, Hs, C] give
    float32 [B, Hs, G, N, C]; -inf where a token is not `seen` or is `forced` anyway, bool [B, 1 or Hs, N, C]."""
    if decoding.serves(table)[0]:
        kernel = import_module("foveate.attention.triton.code_scores").code_scores
        found: Tensor = kernel(table, codes, seen, forced)
        return found
    scores = table.gather(-1, codes.long().clamp_min(0)[:, :, None, None].expand(*table.shape[:-1], -1))
    return scores.masked_fill(~(seen & ~forced).unsqueeze(2), -torch.inf)


def places(q: Tensor, view: View, ctx: Context, sink: int, window: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Positions of the queries, int64 [B, N]; their slots [B, Hs, N, 1]; what they may see, and what is among the first
    and the newest tokens, bool [B, Hs, N, C]. Where all layers hold the same tokens it is worked out once."""
    key = f"places {view.capacity}"
    found = ctx.forward.get(key) if view.aligned else None
    if found is None:
        steps = torch.arange(q.shape[2], device=q.device)
        own = (view.seen - view.fresh)[:, None] + steps
        last = (view.lengths.long() - view.fresh[:, None])[..., None, None] + steps[:, None]
        slot = torch.arange(view.capacity, device=q.device)
        positions = view.positions.unsqueeze(2)
        forced = (positions < sink) | (positions > own[:, None, :, None] - window)
        found = own, last, (slot <= last) & view.valid().unsqueeze(2), forced
        if view.aligned:
            ctx.forward[key] = found
    return found


def codes_of(name: str, q: Tensor, view: View, ctx: Context) -> Tensor:
    """Codes of all slots [B, Hs, C]; tokens that came since the last look get theirs. Once all have been looked at,
    it is known which these are."""
    codes, keys, book = view.tag(name)[..., 0], view.k(), ctx.role.extra["book"].on(q.device)
    if q.shape[2] == 1 and "coded" in ctx.mine:
        slot = (view.lengths.long() - 1).clamp_min(0).unsqueeze(-1)
        newest = keys.gather(2, slot.unsqueeze(-1).expand(-1, -1, -1, keys.shape[3]))
        raw = at_position(newest, view.positions.gather(2, slot), 0, ctx.rope).float()
        codes = codes.scatter(2, slot, book.codes(raw).to(codes.dtype))
        view.write(name, codes.unsqueeze(-1))
        return codes
    missing = ((codes < 0) & view.valid()).any(0).any(0)
    if missing.any():
        slots = slice(int(missing.nonzero()[0]), view.capacity)
        raw = at_position(keys[:, :, slots], view.positions[:, :, slots], 0, ctx.rope).float()
        new = book.codes(raw).to(codes.dtype)
        codes = torch.cat([codes[:, :, : slots.start], new], dim=-1).masked_fill(~view.valid(), -1)
        view.write(name, codes.unsqueeze(-1))
    state = {"coded": torch.ones(len(q), dtype=torch.bool, device=q.device)}
    if turned.serves(q, ctx.rope.angles()):  # how many tokens have each code is counted by the first recorded step
        some = {"dtype": torch.int32, "device": q.device}
        state["counts"] = torch.zeros(*codes.shape[:2], book.centroids.shape[1], **some)
        state["counted"] = torch.zeros(codes.shape[:2], **some)
    ctx.forward[f"coded {ctx.layer}"] = state
    return codes


def chosen_by_codes(
    name: str, q: Tensor, view: View, ctx: Context, *, distance: int, sink: int, window: int, ratio: float,
    most: int | None,
) -> Selection | None:  # fmt: skip
    """The first and the newest tokens and those of the best codes for any query head of a group, a share of all tokens
    for each head, or those with the best ranks, `most` together, in a few launches: of a recorded step of tokens that
    have codes; None elsewhere."""
    held, angles = view.held, ctx.rope.angles()
    if held is None or not view.in_place or q.shape[2] != 1 or "counts" not in ctx.mine:
        return None
    book, codes, k = ctx.role.extra["book"].on(q.device), view.tag(name)[..., 0].flatten(0, 1), held.stores.k
    module, group = import_module("foveate.attention.triton.code_choice"), q.shape[1] * len(q) // len(k)
    if q.dtype != k.dtype or book.centroids.shape[1] > module.MOST or not turned.serves(q, angles):
        return None
    wanted = ctx.forward.get("wanted") if most is None else min(most, view.capacity)
    if wanted is None:  # all layers hold the same tokens
        lengths = held.stores.lengths.view(len(q), -1)[:, 0]
        ctx.forward["wanted"] = wanted = (lengths.double() * ratio + 1e-9).int()
    coded = module.Coded(codes, ctx.mine["counts"].flatten(0, 1), ctx.mine["counted"].flatten())
    width = sink + window + (group * int(view.capacity * ratio + 1e-9) if most is None else most)
    where = {"distance": distance, "sink": sink, "window": window, "width": width}
    given = (held.stores.lengths, wanted, module.Book(book.centroids, *book.metric), coded, angles)
    lists, counts = module.choose_by_codes(q, k, *given, **where)
    return Selection(lists.unsqueeze(2), q_block=1, counts=counts.unsqueeze(2))
