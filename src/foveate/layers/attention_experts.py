"""Attention layers of several models in one, mixed softly token by token: BAM's attention experts.

Source: Zhang et al., "BAM! Just Like That: Simple and Efficient Parameter Upcycling for Mixture of Experts",
arXiv:2408.08274, section 3.2. All heads of all experts are one call of attention; the gate of an expert multiplies what
its heads give.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from foveate.errors import BadArgument
from foveate.layers.mixer import mixer
from foveate.layers.routing import widened
from foveate.layers.softmax import ALL_ATTENTION_FUNCTIONS, HeadGeometry, SoftmaxHeads, rotate_half
from foveate.models.weights import HeadWeights, write_heads

# The last two are what Foveate looks for beside an attention class.
__all__ = ["ALL_ATTENTION_FUNCTIONS", "AttentionExperts", "rotate_half"]


@mixer("attention-experts")
class AttentionExperts(SoftmaxHeads):
    """The sum over experts of softmax(W_r x)_i times the attention of expert i, for every token all of them.

    Args:
        geometry: the numbers of the `HeadGeometry` of one expert.
        experts: how many.
        keys: "experts", keys and values of each expert's own: the cache is as many times that of one model; or
            "shared", one set of keys and values for all: the cache is that of one model.

    Raises:
        BadArgument: numbers that do not make a layer.
    """

    def __init__(
        self,
        config: Any,
        layer_idx: int,
        geometry: dict[str, Any],
        experts: int,
        keys: Literal["experts", "shared"] = "experts",
    ) -> None:
        if experts < 1:
            raise BadArgument("experts", experts, "give at least 1")
        if keys not in ("experts", "shared"):
            raise BadArgument("keys", keys, 'give "experts" or "shared"')
        one = HeadGeometry(**geometry)
        sets = experts if keys == "experts" else 1
        whole = replace(
            one,
            num_heads=experts * one.num_heads,
            num_kv_heads=sets * one.num_kv_heads,
            o_bias=False,
            norm=None if one.norm is None else "heads",
        )
        super().__init__(config, layer_idx, whole.json())
        self.one, self.experts, self.keys = one, experts, keys
        self.gate = nn.Linear(config.hidden_size, experts, bias=False)
        self.expert_biases = nn.Linear(experts, config.hidden_size, bias=False) if one.o_bias else None
        # Query heads stand behind the keys that they read: [sets of keys, key heads, experts that share them, group].
        groups = one.num_heads // one.num_kv_heads
        shared_by = range(experts) if keys == "shared" else None
        self._expert_of = [
            expert
            for own in range(sets)
            for _ in range(one.num_kv_heads)
            for expert in (shared_by or (own,))
            for _ in range(groups)
        ]

    @property
    def spec(self) -> dict[str, Any]:
        return {"geometry": self.one.json(), "experts": self.experts, "keys": self.keys}

    @property
    def holds(self) -> dict[str, Any]:
        heads = self.geometry.num_kv_heads
        return {"num_heads": self.geometry.num_heads, "num_kv_heads": heads, "store_heads": heads}

    @torch.no_grad()
    def take(self, experts: Sequence[HeadWeights]) -> None:
        """Copy the weights of the experts; shared keys and values are the mean of theirs.

        Raises:
            BadArgument: another number of experts, or experts of another geometry.
        """
        if len(experts) != self.experts:
            raise BadArgument("experts", len(experts), f"give {self.experts}")
        write_heads(
            self,
            replace(
                experts[0],
                q=self._queries([e.q for e in experts]),
                q_bias=self._queries([e.q_bias for e in experts]),
                q_norm=self._queries([self._gains(e.q_norm, self.one.num_heads) for e in experts]),
                k=self._keys([e.k for e in experts]),
                k_bias=self._keys([e.k_bias for e in experts]),
                k_norm=self._keys([self._gains(e.k_norm, self.one.num_kv_heads) for e in experts]),
                v=self._keys([e.v for e in experts]),
                v_bias=self._keys([e.v_bias for e in experts]),
                o=self._queries([e.o for e in experts]),
                o_bias=None,
            ),
        )
        if self.expert_biases is not None:
            self.expert_biases.weight.copy_(torch.stack([e.o_bias for e in experts if e.o_bias is not None], dim=1))

    def gates(self, hidden_states: Tensor) -> Tensor:
        """What each expert weighs for each token, [B, N, experts]; they sum to 1."""
        return widened(self.gate(hidden_states)).softmax(-1)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Any = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        gates = self.gates(hidden_states).to(hidden_states.dtype)
        q = self.placed(self.projected(self.q_proj, hidden_states), self.q_norm, position_embeddings)
        k, v = self.keys_and_values(hidden_states, position_embeddings, past_key_values)
        out = self.attended(q, k, v, attention_mask, **kwargs)
        out = self.o_proj((out * gates[..., self._expert_of].unsqueeze(-1)).flatten(2))
        return out if self.expert_biases is None else out + self.expert_biases(gates), None

    def _queries(self, parts: Sequence[Tensor | None]) -> Any:
        """[H, ...] of each expert, in the layer's order of heads."""
        held = [part for part in parts if part is not None]
        if not held:
            return None
        together = torch.stack(held)
        if self.keys == "experts":
            return together.flatten(0, 1)
        return together.unflatten(1, (self.one.num_kv_heads, -1)).transpose(0, 1).flatten(0, 2)

    def _keys(self, parts: Sequence[Tensor | None]) -> Any:
        """[Hkv, ...] of each expert, or their mean."""
        held = [part for part in parts if part is not None]
        if not held:
            return None
        return torch.cat(held) if self.keys == "experts" else torch.stack(held).mean(0)

    def _gains(self, gain: Tensor | None, heads: int) -> Tensor | None:
        """The gain that a module has for all heads, for each of them."""
        return None if gain is None else gain.expand(heads, 1, -1)
