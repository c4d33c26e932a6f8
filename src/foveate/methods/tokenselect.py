"""TokenSelect: heads vote on which tokens a layer reads, and what is read is numbered without gaps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.attention import ALL, Frame, Parts, Selection, decoding, turned
from foveate.attention.turned import Rule, Vote
from foveate.cache import UNBOUNDED, View
from foveate.errors import BadArgument
from foveate.methods.base import Context, Method, Profile, Result, Role, register
from foveate.methods.budget import Budget
from foveate.methods.policies.ballot import Ballot
from foveate.methods.policies.positions import refuse_fixed_positions
from foveate.models.shape import ModelShape

State = dict[str, Tensor]
"""The vote of each row that stands: who made it (query), who won (list), and whether there was one (voted)."""


@register
@dataclass(frozen=True, kw_only=True)
class TokenSelect(Method):
    """All heads of a layer read the first `init` tokens, the last `local` ones, and the k tokens between them that win
    a vote: each head gives them the softmax of its scores, and the votes are added up. For the vote every token between
    is treated as `local` positions away. What is read is attended at the positions 0, 1, 2, ... that it takes without
    the gaps, so that no distance exceeds init + k + local however long the text is.

    A prompt votes in blocks of `chunk` queries by the mean of their queries; `local` then ends with the block's first
    query and the block itself is read too. In decode a vote stands until the query has turned away from the one that
    made it (`theta`); where all tokens fit, all are read. Taking tokens back (assisted decoding) forgets the vote.

    The paper's votes are softmaxes of unscaled scores, much sharper than attention itself. They are made in float32
    (the released kernel keeps scores in bfloat16), and every query head votes by its own kv head (the released kernel
    takes kv heads modulo their number, which mixes up grouped heads). Sums of votes are compared to three digits, and
    of equal ones the first wins: without positions, a word has nearly the same key wherever it stands.
    The released code counts a block of the prompt in `local`, so that its first queries are sure of no token before it,
    though it turns voters as if `local` tokens stood there; and votes never stand in it: `theta` is the paper's.

    Args:
        init: first tokens always read.
        local: newest tokens always read, the current one included.
        k: tokens between them when no budget is given. A budget is that of decode steps.
        chunk: queries of the prompt that share a vote.
        theta: cosine of query and last voting query from which on the vote stands; above 1: every query votes.
        kernel: width of max-pooling of the votes along the tokens, odd; 1 is none.
        scaled: scale scores as the model's attention does before votes are made of them.
        reposition: False reads at the positions of the text.

    Source: 2411.02886, section 4; defaults of the released code.
    """

    id = "tokenselect"
    name = "TokenSelect"
    paper = "2411.02886"
    slots = frozenset({"prefill", "decode"})
    causality = "prompt"
    chunked = "approximate"
    aligned = True
    graph = True

    init: int = 128
    local: int = 512
    k: int = 2048
    chunk: int = 512
    theta: float = 0.9
    kernel: int = 1
    scaled: bool = False
    reposition: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("init", 0), ("local", 1), ("k", 1), ("chunk", 1)):
            if getattr(self, name) < least:
                raise BadArgument(name, getattr(self, name), f"give at least {least}")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise BadArgument("kernel", self.kernel, "give an odd width, 1 for no pooling")

    def plan(self, shape: ModelShape, profile: Profile | None, length: int) -> Sequence[Role]:
        refuse_fixed_positions(shape, self.id)
        budget, k = Budget.of(self.budget), self.k
        if budget is not None:
            fixed = self.init + self.local
            read = budget.read_tokens(shape, length, 0, name=self.id, floor=fixed + 1)
            k = UNBOUNDED if budget.whole else max(1, read - fixed)
        return [Role("select", extra={"k": k})] * len(shape.layers)

    def select(self, q: Tensor, view: View, ctx: Context) -> Parts:
        k = ctx.role.extra["k"]
        if not view.exceeds(self.init + self.local + k):
            return ALL
        looked = partial(ctx.count, of="looked") if ctx.counts else None
        ballot = Ballot(view, ctx.rope, self.init, ctx.scale if self.scaled else 1.0, self.kernel, looked)
        if ctx.phase == "decode" and q.shape[2] == 1 and ballot.served(q) and (view.host_fresh == 1).all():
            lists, places = self._step(q, k, ballot, view, ctx)
            block = 1
        else:
            block = self.chunk if ctx.phase == "prompt" else 1
            lists, places = self._blocks(q, k, block, ballot, view, ctx)
        lists, places = lists.unsqueeze(1), places.unsqueeze(1)
        return Selection(lists, q_block=block, frame=Frame(keys=places) if self.reposition else Frame())

    def attended(self, q: Tensor, view: View, result: Result, ctx: Context) -> None:
        """The last vote of a decode step stands for the next one; a prompt begins anew."""
        ctx.mine.clear()
        ctx.mine.update(ctx.forward.pop(f"vote {ctx.layer}", {}) if ctx.phase == "decode" else {})

    def _step(self, q: Tensor, k: int, ballot: Ballot, view: View, ctx: Context) -> tuple[Tensor, Tensor]:
        """`_blocks` of one query per row in a few launches, in which no keys are read where a vote stands."""
        rule, lengths = Rule(self.init, self.local, k, self.theta), view.lengths[:, 0]
        last = Vote(ctx.mine["query"], ctx.mine["list"], ctx.mine["voted"]) if ctx.mine else None
        voter, edges, stands = turned.newest_voter(q, lengths, ctx.rope.angles(), rule, last)
        if last is not None and ctx.sure(stands):
            chosen, counts = last.winners, torch.full_like(lengths, k)
        else:
            votes = ballot(voter, edges, None if last is None else stands)[:, 0]
            chosen, counts = decoding.best(votes, k, coarse=True)
        lists, places, now = turned.tally(voter, edges, lengths, stands, chosen, counts, rule, last)
        ctx.forward[f"vote {ctx.layer}"] = {"query": now.query, "list": now.winners, "voted": now.held}
        return lists.unsqueeze(1), places.unsqueeze(1)

    def _blocks(self, q: Tensor, k: int, block: int, ballot: Ballot, view: View, ctx: Context) -> tuple[Tensor, Tensor]:
        """Slots to read for each block of queries, int32 [B, T, n], ascending, -1 behind the end; and where they stand
        when the gaps between them are closed and the queries stay where they are."""
        length, count = view.lengths[:, :1].long(), -(-q.shape[2] // block)
        begin = torch.arange(count, device=q.device) * block
        start = length - view.fresh[:, None] + begin
        edges = (start - self.local + 1).clamp_min(self.init)  # where the local part begins
        means = _means(q, block, view.fresh, whole=bool((view.host_fresh == q.shape[2]).all()))
        voters = ctx.rope.move(means, self.local - start).transpose(1, 2)
        if ctx.phase == "decode":
            state, chosen = dict(ctx.mine), []
            for i in range(count):
                some, state = self._decide(voters[:, i], edges[:, i], k, start[:, i] < length[:, 0], state, ballot, ctx)
                chosen.append(some)
            ctx.forward[f"vote {ctx.layer}"] = state
            winners = torch.stack(chosen, dim=1)
        else:
            winners = ballot.winners(voters, edges, k)
        won = (winners >= 0).sum(-1, keepdim=True)
        i = torch.arange(self.init + k + self.local - 1 + block, device=q.device)
        gap = edges.unsqueeze(-1) - self.init - won
        among = winners.gather(-1, (i - self.init).clamp(0, k - 1).expand(*edges.shape, -1))
        slots = torch.where(i < self.init, i, torch.where(i - self.init < won, among, gap + i))
        end = torch.minimum(start + block, length).unsqueeze(-1)
        return torch.where(slots < end, slots, -1).int(), (gap + i).int()

    def _decide(
        self, voter: Tensor, edge: Tensor, k: int, real: Tensor, state: State, ballot: Ballot, ctx: Context
    ) -> tuple[Tensor, State]:
        """k slots per row, ascending, int32 [B, k], and the state in which this leaves the vote of voter [B, H, D]."""
        crowded = edge - self.init > k  # otherwise all between is read, and there is nothing to decide
        flat = voter.flatten(1)
        if not state:
            chosen = ballot.winners(voter.unsqueeze(1), edge[:, None], k)[:, 0]
            return chosen, {"query": flat, "list": chosen, "voted": crowded & real}
        stands = state["voted"] & crowded & (F.cosine_similarity(flat, state["query"], dim=1) >= self.theta)
        if ctx.sure(stands):
            return state["list"], state
        chosen = ballot.winners(voter.unsqueeze(1), edge[:, None], k)[:, 0]
        chosen = torch.where(stands[:, None], state["list"], chosen)
        flat = torch.where((stands | ~real)[:, None], state["query"], flat)
        kept = torch.where(real[:, None], chosen, state["list"])
        return chosen, {"query": flat, "list": kept, "voted": torch.where(real, crowded, state["voted"])}


def _means(q: Tensor, block: int, fresh: Tensor, *, whole: bool) -> Tensor:
    """Mean of the real queries, the first `fresh` [B] of q [B, H, N, D], of each block: float32 [B, H, T, D]."""
    n = q.shape[2]
    if not whole:
        q = q.masked_fill((torch.arange(n, device=q.device) >= fresh[:, None])[:, None, :, None], 0.0)
    full, begin = n // block * block, torch.arange(0, n, block, device=q.device)
    sums = q[:, :, :full].unflatten(2, (-1, block)).sum(3, dtype=torch.float32)
    if full < n:
        sums = torch.cat([sums, q[:, :, full:].sum(2, keepdim=True, dtype=torch.float32)], dim=2)
    real = (fresh[:, None] - begin).clamp(1, block)
    return sums / real[:, None, :, None]
