"""Attention of which each token asks only some heads: mixture of heads (MoH).

Source: Jin et al., "MoH: Multi-Head Attention as Mixture-of-Head Attention", arXiv:2410.11842. Keys and values of all
heads are kept, since a later token may read them: MoH saves arithmetic, not memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from foveate.errors import BadArgument
from foveate.layers.eager import visible, weigh
from foveate.layers.mixer import mixer
from foveate.layers.routing import (
    Routed,
    Routing,
    TwoStageRouter,
    norm_scores,
    straight_through,
    top_k,
)
from foveate.layers.softmax import ALL_ATTENTION_FUNCTIONS, SoftmaxHeads, rotate_half

# The last two are what Foveate looks for beside an attention class.
__all__ = ["ALL_ATTENTION_FUNCTIONS", "MixtureOfHeads", "gathered", "rotate_half"]

COMPUTE = ("auto", "masked", "gathered")

_AT_ONCE = 256
"""Pairs of token and head that `gathered` serves in one product: enough to fill it, few enough to end it early."""

_WORTH = 4096
"""Keys from which on a CPU reads the working heads of a token one after the other in less time than all heads at once
(measured with half to three quarters of 8 to 32 heads of 64 dims at work)."""


@mixer("mixture-of-heads")
class MixtureOfHeads(Routed, SoftmaxHeads):
    """Some heads work for every token, of the others each token takes `top_k`; outputs are weighed by gates.

    Args:
        geometry: the numbers of a `HeadGeometry`.
        shared: the heads that always work.
        top_k: how many of the others each token takes; all of them: every head works.
        router: "linear", two-stage scores of the token (see `TwoStageRouter`), or "norm", the paper's router for
            checkpoints: the heads whose query, as projected, is longest work with gate 1, and the gradient of the gate
            goes to the softmax of these lengths.
        compute: "masked" computes all heads and multiplies by the gates; "gathered" computes the pairs of token and
            head that are active and no others; "auto" does so for single tokens behind many keys on a CPU, where it
            pays. They agree. In prompts, products with gathered queries are slower than a fused causal kernel: on a
            CPU they pay where fewer than about 40 % of the heads work. Where the gradient asks what the heads that
            were not taken would have given (router "norm" in training), where dropout is at work, and where a Foveate
            method attends, all heads are computed.

    Raises:
        BadArgument: heads or numbers that the layer does not have.
    """

    def __init__(
        self,
        config: Any,
        layer_idx: int,
        geometry: dict[str, Any],
        shared: Sequence[int],
        top_k: int,
        router: Literal["linear", "norm"] = "linear",
        compute: Literal["auto", "masked", "gathered"] = "auto",
    ) -> None:
        super().__init__(config, layer_idx, geometry)
        heads = self.geometry.num_heads
        if len(set(shared)) != len(shared) or not all(0 <= head < heads for head in shared):
            raise BadArgument("shared", list(shared), f"give different heads from 0 to {heads - 1}")
        routed = [head for head in range(heads) if head not in set(shared)]
        if not routed:
            raise BadArgument("shared", list(shared), "leave at least one head to be routed")
        if router not in ("linear", "norm"):
            raise BadArgument("router", router, 'give "linear" or "norm"')
        if compute not in COMPUTE:
            raise BadArgument("compute", compute, f"give one of {', '.join(COMPUTE)}")
        self.shared, self.routed, self.router, self.compute = sorted(shared), routed, router, compute
        self.active = top_k
        self.gate = TwoStageRouter(config.hidden_size, len(shared), len(routed)) if router == "linear" else None
        # Where each head stands in the row of shared heads and routed ones behind them.
        places = self.shared + routed
        self._places = [places.index(head) for head in range(heads)]

    @property
    def active(self) -> int:
        """How many of the routed heads a token takes; set it to change the layer."""
        return self._active

    @active.setter
    def active(self, k: int) -> None:
        if not 1 <= k <= len(self.routed):
            raise BadArgument("top_k", k, f"give 1 to {len(self.routed)}, the heads to choose among")
        self._active = k

    @property
    def spec(self) -> dict[str, Any]:
        return {
            "geometry": self.geometry.json(),
            "shared": self.shared,
            "top_k": self.active,
            "router": self.router,
            "compute": self.compute,
        }

    def route(self, hidden_states: Tensor, q: Tensor) -> Routing:
        """Gates [B, N, H] of tokens [B, N, d] with queries q [B, H, N, D], as projected."""
        if self.gate is not None:
            within, among, logits = self.gate(hidden_states, self.active)
            chosen = top_k(logits.detach(), self.active)
        else:
            logits = norm_scores(q[:, self.routed].transpose(1, 2))
            chosen = top_k(logits.detach(), self.active)
            within = logits.new_ones(*logits.shape[:-1], len(self.shared))
            among = straight_through(chosen, logits.softmax(-1))
        always = chosen.new_ones(*chosen.shape[:-1], len(self.shared))
        return Routing(
            gates=torch.cat([within, among], dim=-1)[..., self._places],
            active=torch.cat([always, chosen], dim=-1)[..., self._places],
            probabilities=logits.softmax(-1),
            chosen=chosen,
            logits=logits,
        )

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Any = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        q = self.projected(self.q_proj, hidden_states)
        routing = self.route(hidden_states, q)
        self.note(routing)
        q = self.placed(q, self.q_norm, position_embeddings)
        k, v = self.keys_and_values(hidden_states, position_embeddings, past_key_values)
        if self._gathers(q, k):
            out = gathered(q, k, v, routing.active, attention_mask, self.scaling, self.attn_logit_softcapping)
        else:
            out = self.attended(q, k, v, attention_mask, **kwargs)
        out = out * routing.gates.unsqueeze(-1).to(out.dtype)
        return self.o_proj(out.flatten(2)), None

    def _gathers(self, q: Tensor, k: Tensor) -> bool:
        if self.compute == "masked" or self.config._attn_implementation not in ("sdpa", "eager"):
            return False
        if self.compute == "auto" and (q.shape[2] > 1 or k.shape[2] < _WORTH or q.device.type != "cpu"):
            return False
        needs_all = self.router == "norm" and torch.is_grad_enabled()
        return not needs_all and not (self.training and getattr(self.config, "attention_dropout", 0.0))


def gathered(
    q: Tensor, k: Tensor, v: Tensor, active: Tensor, mask: Tensor | None, scale: float, softcap: float | None = None
) -> Tensor:
    """Attention of the active pairs of token and head alone: [B, N, H, Dv], zero where a head is not active.

    The pairs of one key-value head, whichever of its query heads they are of, are one list of queries in the order of
    their tokens; it is read in pieces, each against the keys up to the last one that a query of it sees.

    Args:
        q: [B, H, N, D]. k, v: [B, Hkv, M, D].
        active: bool [B, N, H].
        mask: as transformers hands it to a layer (see `foveate.layers.eager.visible`).
    """
    batch, heads, queries, _ = q.shape
    groups = heads // k.shape[1]
    if queries == 1:
        return _one_token(q, k, v, active, visible(mask, 1, k.shape[2], q.device), scale, softcap)
    seen = visible(mask, queries, k.shape[2], q.device)
    if seen is None:
        seen = torch.ones(1, 1, queries, k.shape[2], dtype=torch.bool, device=q.device)
    keys = seen.shape[-1]
    sees = seen if seen.dtype == torch.bool else seen > torch.finfo(seen.dtype).min / 2
    number = torch.arange(1, keys + 1, device=q.device)
    reach = (sees[:, 0] * number).amax(-1).clamp(min=1).expand(batch, queries).tolist()
    seen = seen[:, 0].expand(batch, -1, -1)
    out = q.new_zeros(batch, queries, heads, v.shape[-1])
    for row in range(batch):
        for head in range(k.shape[1]):
            first = head * groups
            tokens, members = active[row, :, first : first + groups].nonzero(as_tuple=True)
            for start in range(0, len(tokens), _AT_ONCE):
                at, of = tokens[start : start + _AT_ONCE], members[start : start + _AT_ONCE] + first
                end = max(reach[row][int(at[0]) : int(at[-1]) + 1])
                scores = q[row, of, at] @ k[row, head, :end].T * scale
                weights = weigh(scores, seen[row, at, :end], softcap).to(v.dtype)
                out[row, at, of] = weights @ v[row, head, :end]
    return out


def _one_token(
    q: Tensor, k: Tensor, v: Tensor, active: Tensor, seen: Tensor | None, scale: float, softcap: float | None
) -> Tensor:
    """`gathered` for a single token of each row: a key-value head of which no query head works is not read at all."""
    groups = q.shape[1] // k.shape[1]
    out = q.new_zeros(q.shape[0], 1, q.shape[1], v.shape[-1])
    q = q * scale
    for row, working in enumerate(active[:, 0].tolist()):
        mask = None if seen is None else seen[row if seen.shape[0] > 1 else 0, 0]
        for head in range(k.shape[1]):
            members = [h for h in range(head * groups, (head + 1) * groups) if working[h]]
            if members:
                keys = k[row, head] if mask is None else k[row, head, : mask.shape[-1]]
                weights = weigh(q[row, members, 0] @ keys.T, mask, softcap).to(v.dtype)
                out[row, 0, members] = weights @ v[row, head, : keys.shape[0]]
    return out
