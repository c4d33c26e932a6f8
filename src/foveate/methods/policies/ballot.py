"""Votes of all heads of a layer for the tokens that it reads."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.attention import turned
from foveate.cache import View
from foveate.methods.context import Rope
from foveate.methods.policies.lists import top_lists
from foveate.methods.policies.positions import at_position

AT_ONCE = 8
"""Voters of a row whose scores are alive at once: 4 bytes for each head and token."""


class Ballot:
    """One layer's votes in one forward: each head gives tokens the softmax of its scores, with all keys at position 0,
    and what the heads give is added up.

    Args:
        begin: tokens in front stand for no election.
        scale: of the scores.
        kernel: width of max-pooling of the votes along the tokens, odd; 1 is none.
        count: told how many bytes of keys each vote looks at, if somebody counts.
    """

    def __init__(
        self,
        view: View,
        rope: Rope,
        begin: int,
        scale: float,
        kernel: int = 1,
        count: Callable[[float], None] | None = None,
    ) -> None:
        self.view, self.rope, self.begin, self.scale, self.kernel = view, rope, begin, scale, kernel
        self.count = count
        self._raw: Tensor | None = None

    def served(self, q: Tensor) -> bool:
        """Whether kernels turn keys as they read them, so that none is copied: for these queries, and tokens that stand
        in the slots of their positions."""
        return self.view.in_place and turned.serves(q, self.rope.angles())

    def __call__(self, voters: Tensor, edges: Tensor, stands: Tensor | None = None) -> Tensor:
        """Votes of voters [B, T, H, D] for the tokens in front of edges [B, T], float32 [B, T, C], -inf for others.
        They are rounded to three digits (bfloat16): what hardly differs is equal.

        Args:
            stands: rows in which nothing needs to be read, int32 [B]; only where kernels are `served`.
        """
        if self.count is not None:
            tokens = float((edges.amax(1) - self.begin).clamp_min(0).sum())
            keys = self.view.k()
            self.count(tokens * keys.shape[1] * keys.shape[3] * keys.element_size())
        if self.served(voters):
            keys, angles = self.view.k().flatten(0, 1), self.rope.angles()
            one = self.kernel == 1
            votes = turned.votes(voters, keys, self.begin, edges, angles, self.scale, stands, rounded=one)
            return votes if one else self._pooled(votes).bfloat16().float()
        if self._raw is None:
            self._raw = at_position(self.view.k(), self.view.positions, 0, self.rope).float()
        slot = torch.arange(self._raw.shape[2], device=voters.device)
        between = (slot >= self.begin) & (slot < edges.unsqueeze(-1)) & self.view.valid()[:, :1]
        votes = head_votes(voters, self._raw, between, self.scale)
        votes = self._pooled(votes.masked_fill(~between, -torch.inf))
        return votes.bfloat16().float()

    def winners(self, voters: Tensor, edges: Tensor, k: int) -> Tensor:
        """The k tokens with the most votes, of equal ones the first: slots, ascending, int32 [B, T, k], -1 behind the
        end."""
        made, edges = [], torch.minimum(edges, self.view.lengths[:, :1])  # of padding, nothing behind its row
        for some, edge in zip(voters.split(AT_ONCE, dim=1), edges.split(AT_ONCE, dim=1), strict=True):
            made.append(top_lists(self(some, edge), k))
        lists = torch.cat(made, dim=1)
        return F.pad(lists, (0, k - lists.shape[-1]), value=-1)

    def _pooled(self, votes: Tensor) -> Tensor:
        """The largest vote around each of votes [B, T, C] that are not -inf."""
        if self.kernel == 1:
            return votes
        near = F.max_pool1d(votes, self.kernel, stride=1, padding=self.kernel // 2)
        return torch.where(votes == -torch.inf, votes, near)


def head_votes(voters: Tensor, keys: Tensor, between: Tensor, scale: float = 1.0) -> Tensor:
    """What all heads of voters [B, T, H, D] give the keys [B, Hs, C, D] that are `between`, bool [B, T, C]: float32
    [B, T, C], H in all."""
    (batch, count, heads, dim), stores = voters.shape, keys.shape[1]
    rows = voters.reshape(batch, count, stores, -1, dim).transpose(1, 2).flatten(2, 3)
    logits = (rows @ keys.transpose(-1, -2) * scale).view(batch, stores, count, heads // stores, -1)
    logits = logits.masked_fill(~between[:, None, :, None], -torch.inf)
    return logits.softmax(-1).nan_to_num(0.0).sum((1, 3))
