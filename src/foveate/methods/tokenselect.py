"""TokenSelect: heads vote on which tokens a layer reads, and what is read is numbered without gaps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.attention import ALL, Frame, Parts, Selection
from foveate.cache import UNBOUNDED, View
from foveate.errors import BadArgument
from foveate.methods.base import Context, Method, Profile, Result, Role, register
from foveate.methods.budget import Budget
from foveate.methods.policies.lists import top_lists
from foveate.methods.policies.positions import at_position, refuse_fixed_positions
from foveate.models.shape import ModelShape


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
        raw: list[Tensor] = []  # keys at position 0, made when the first vote needs them
        block = self.chunk if ctx.phase == "prompt" else 1
        first = view.lengths[:, 0].long() - view.fresh
        far, near, place = [], [], []
        state = dict(ctx.mine) if ctx.phase == "decode" else {}
        for begin in range(0, q.shape[2], block):
            rows = q[:, :, begin : begin + block]
            start = first + begin
            own = start[:, None] + torch.arange(rows.shape[2], device=q.device)
            real = own < view.lengths[:, :1]
            edge = (start - self.local + 1).clamp_min(self.init)  # where the local part begins
            voter = _mean(at_position(rows, start[:, None].expand_as(own), self.local, ctx.rope), real)
            chosen, state = self._choose(voter, edge, k, real[:, 0], state, raw, view, ctx)
            sinks = torch.arange(self.init, dtype=torch.int32, device=q.device).expand(len(own), -1)
            far.append(torch.cat([sinks.masked_fill(sinks >= view.lengths[:, :1], -1), chosen], dim=1))
            local = edge[:, None] + torch.arange(self.local - 1 + rows.shape[2], device=q.device)
            there = local < torch.minimum(start[:, None] + rows.shape[2], view.lengths[:, :1])
            local = F.pad(torch.where(there, local, -1), (0, block - rows.shape[2]), value=-1)
            near.append(local.to(torch.int32))
            place.append(own - edge[:, None] + self.init + (chosen >= 0).sum(1, keepdim=True))
        ctx.forward[f"votes {ctx.layer}"] = state
        lists = torch.stack(far, dim=1).unsqueeze(1)
        frame = Frame()
        if self.reposition:
            frame = Frame(torch.cat(place, dim=1), torch.arange(lists.shape[-1], device=q.device).expand_as(lists))
        local = Selection(lists=torch.stack(near, dim=1).unsqueeze(1), q_block=block)
        return [Selection(lists=lists, q_block=block, frame=frame), local]

    def attended(self, q: Tensor, view: View, result: Result, ctx: Context) -> None:
        """The last vote of a decode step stands for the next one; a prompt begins anew."""
        ctx.mine.clear()
        ctx.mine.update(ctx.forward.pop(f"votes {ctx.layer}", {}) if ctx.phase == "decode" else {})

    def _choose(
        self,
        voter: Tensor,
        edge: Tensor,
        k: int,
        real: Tensor,
        state: dict[str, Tensor],
        raw: list[Tensor],
        view: View,
        ctx: Context,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """k slots per row, ascending, int32 [B, k], and the state in which this leaves the vote."""
        crowded = edge - self.init > k  # otherwise all between is read, and there is nothing to decide
        flat = voter.flatten(1)
        stands = torch.zeros_like(crowded)
        if state:
            stands = state["voted"] & crowded & (F.cosine_similarity(flat, state["query"], dim=1) >= self.theta)
            if ctx.sure(stands):
                return state["list"], state
        if not raw:
            raw.append(at_position(view.k(), view.positions, 0, ctx.rope).float())
        slot = torch.arange(raw[0].shape[2], device=flat.device)
        between = (slot >= self.init) & (slot < edge[:, None]) & view.valid()[:, 0]
        votes = self._votes(voter, raw[0], between, ctx).bfloat16()
        chosen = top_lists(votes.masked_fill(~between, -torch.inf), k)
        chosen = F.pad(chosen, (0, k - chosen.shape[1]), value=-1)
        if state:
            chosen = torch.where(stands[:, None], state["list"], chosen)
            flat = torch.where((stands | ~real)[:, None], state["query"], flat)
            crowded = torch.where(real, crowded, state["voted"])
            kept = torch.where(real[:, None], chosen, state["list"])
            return chosen, {"query": flat, "list": kept, "voted": crowded}
        return chosen, {"query": flat, "list": chosen, "voted": crowded & real} if ctx.phase == "decode" else {}

    def _votes(self, voter: Tensor, raw: Tensor, between: Tensor, ctx: Context) -> Tensor:
        """The votes of all heads [B, C] of voter [B, H, D] for keys [B, Hs, C, D] at position 0: they add up to H."""
        grouped = voter.view(voter.shape[0], raw.shape[1], -1, voter.shape[-1])
        logits = grouped @ raw.transpose(-1, -2) * (ctx.scale if self.scaled else 1.0)
        mass = logits.masked_fill(~between[:, None, None], -torch.inf).softmax(-1).nan_to_num(0.0).sum((1, 2))
        if self.kernel > 1:
            mass = F.max_pool1d(mass.unsqueeze(1), self.kernel, stride=1, padding=self.kernel // 2).squeeze(1)
        return mass


def _mean(rows: Tensor, real: Tensor) -> Tensor:
    """Mean of the real ones of rows [B, H, n, D], float32 [B, H, D]."""
    weights = real.float() / real.sum(1, keepdim=True).clamp_min(1)
    return torch.einsum("bhnd,bn->bhd", rows.float().masked_fill(~real[:, None, :, None], 0.0), weights)
