"""FlexPrefill: per head and prompt, one of two block patterns, as many blocks as the mass needs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.attention import ALL, Parts, Selection
from foveate.cache import View
from foveate.errors import BadArgument
from foveate.methods.base import Context, Method, register, tries
from foveate.methods.policies import probes
from foveate.methods.policies.lists import coverage_mask, mask_lists


@register
@dataclass(frozen=True, kw_only=True)
class FlexPrefill(Method):
    """The last block of queries shows each head's attention. Where block means estimate it well the head's blocks are
    chosen by those means (query-aware); elsewhere by the vertical and slash lines of the probe. Enough blocks are read
    to cover the share `gamma` of the estimated mass; the first block column and the diagonal always. Decode is dense.

    Args:
        block: tokens per block, of queries and of keys.
        gamma: mass to cover.
        tau: a head is query-aware below this Jensen-Shannon distance; 0: none is, above sqrt(ln 2): all are.
        min_budget, max_budget: bounds of the lines' budgets, in tokens. Prompts of up to min_budget tokens are dense.

    A prompt given in pieces is probed per piece, so its reads differ from those of a whole prompt.
    Source: 2502.20766, section 3, algorithms 1-3; released code for the budget rule.
    """

    id = "flexprefill"
    name = "FlexPrefill"
    paper = "2502.20766"
    slots = frozenset({"prefill"})
    core = True
    causality = "prompt"
    chunked = "approximate"
    budgeted = False
    search = tries(
        block=(32, 64, 128), gamma=(0.7, 0.8, 0.9, 0.95, 0.99), tau=(0.0, 0.1, 0.2), min_budget=(128, 256, 512, 1024)
    )

    block: int = 128
    gamma: float = 0.9
    tau: float = 0.1
    min_budget: int = 1024
    max_budget: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block < 1:
            raise BadArgument("block", self.block, "give at least 1 token")
        if self.gamma <= 0:
            raise BadArgument("gamma", self.gamma, "give a share above 0")
        if self.max_budget is not None and self.max_budget < self.min_budget:
            raise BadArgument("max_budget", self.max_budget, f"it must not be below min_budget={self.min_budget}")

    def select(self, q: Tensor, view: View, ctx: Context) -> Parts:
        lengths, fresh = view.host_lengths.max(1), view.host_fresh
        short = max(2 * self.block, self._blocks(self.min_budget) * self.block)
        if (lengths <= short).all():
            return ALL
        keys = view.k()
        blocks, q_blocks = self._blocks(keys.shape[2]), self._blocks(q.shape[2])
        active = torch.zeros(q.shape[0], q.shape[1], q_blocks, blocks, dtype=torch.bool, device=q.device)
        for row, (m, n) in enumerate(zip(lengths.tolist(), fresh.tolist(), strict=True)):
            if n:
                chosen = self._row(q[row, :, :n], keys[row, :, :m], short, ctx)
                active[row, :, : chosen.shape[-2], : chosen.shape[-1]] = chosen
        return Selection(lists=mask_lists(active), q_block=self.block, k_block=self.block)

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self.block)

    def _row(self, q: Tensor, k: Tensor, short: int, ctx: Context) -> Tensor:
        """Active blocks [1 or H, query and key blocks] of one sequence: q [H, n, D] are the last of k [Hk, m, D]."""
        n, m = q.shape[1], k.shape[1]
        causal = probes.causal_blocks(m, n, self.block, q.device)
        if m <= short:
            return causal.unsqueeze(0)
        rows = min(self.block, n)
        vertical, slash = probes.probe_lines(probes.last_rows(q, k, rows, ctx.scale, ctx.softcap))
        mean_k = probes.block_mean(k, self.block).repeat_interleave(q.shape[0] // k.shape[0], dim=0)
        # Means are compared with probabilities, so they pass the softcap that these passed.
        estimate = (q[:, -rows:].float().mean(1, keepdim=True) @ mean_k.transpose(1, 2)).squeeze(1) * ctx.scale
        columns = probes.block_sum(vertical, self.block)
        aware = probes.js_distance(probes.capped(estimate, ctx.softcap).softmax(-1), columns) < self.tau
        bounds = self._blocks(self.min_budget), None if self.max_budget is None else self._blocks(self.max_budget)
        lines = probes.line_blocks(vertical, slash, aware, causal, bounds, self.block, self.gamma, whole=n == m)
        if not aware.any():
            return lines
        pooled = probes.capped(probes.block_mean(q, self.block) @ mean_k.transpose(1, 2) * ctx.scale, ctx.softcap)
        mass = pooled.masked_fill(~causal, -torch.inf).softmax(-1)
        covered = coverage_mask(mass.flatten(1), self.gamma * mass.shape[1]).view_as(mass) & causal
        return torch.where(aware[:, None, None], lines | covered, lines)
