"""Attention with fewer matrices: one for queries and keys, none for values.

Source: "Reducing the Transformer Architecture to a Minimum", arXiv:2410.13732. Its models have no positions inside
attention and read images; causal language models, and rotation, are our extension.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from foveate.compat import ALL_ATTENTION_FUNCTIONS
from foveate.errors import BadArgument
from foveate.layers.eager import eager, visible, weigh
from foveate.layers.mixer import Mixer, mixer
from foveate.layers.rotation import rotate_half

_QK = ("separate", "collapsed", "symmetric", "cholesky")


@mixer("minimal")
class MinimalAttention(Mixer):
    """Softmax attention whose scores are x_i W x_j, with W in one of four forms, with or without values of their own.

    Args:
        qk: "separate", W = W_Q' W_K of rank `head_dim`; "collapsed", any W, keys are the tokens themselves;
            "symmetric", W_K = W_Q, so that W is positive semidefinite and a token looks at what is like it, itself
            above all; "cholesky", W = T T' with T lower triangular, d (d + 1) / 2 numbers.
        vo: "full", values and a projection; "none", of one head only: the output is a mean of the tokens read.
        heads: how many.
        head_dim: of queries and keys where they are projected, and of values; None: d / heads.
        rotary_dim: how many of a head's first dims are rotated (separate and symmetric only).
        scale: of the scores; None: 1 / sqrt(d) as in the paper, or of `head_dim` where W is of that rank.
        window: keys that a query sees, its own included; None without a limit.

    The cache holds keys and values of every head; collapsed ones hold the token once for all heads, and where the
    token is the value too, nothing else. "separate" and "symmetric" layers with values are served by Foveate's methods.

    Raises:
        BadArgument: numbers or forms that do not make a layer.
    """

    is_causal = True

    def __init__(
        self,
        config: Any,
        layer_idx: int,
        qk: Literal["separate", "collapsed", "symmetric", "cholesky"] = "collapsed",
        vo: Literal["full", "none"] = "none",
        heads: int = 1,
        head_dim: int | None = None,
        rotary_dim: int = 0,
        scale: float | None = None,
        window: int | None = None,
    ) -> None:
        super().__init__(config, layer_idx)
        width = config.hidden_size
        projected = qk in ("separate", "symmetric")
        if qk not in _QK:
            raise BadArgument("qk", qk, f"give one of {', '.join(_QK)}")
        if vo not in ("full", "none"):
            raise BadArgument("vo", vo, 'give "full" or "none"')
        if heads < 1 or (vo == "none" and heads > 1):
            raise BadArgument("heads", heads, "give at least 1; without values exactly 1")
        if head_dim is None and width % heads:
            raise BadArgument("heads", heads, f"give a divisor of the width {width}, or a head_dim")
        self.head_dim = width // heads if head_dim is None else head_dim
        if rotary_dim % 2 or not 0 <= rotary_dim <= (self.head_dim if projected else 0):
            raise BadArgument("rotary_dim", rotary_dim, "give an even number up to head_dim; 0 where keys are tokens")
        self.qk, self.vo, self.heads, self.rotary_dim, self.window = qk, vo, heads, rotary_dim, window
        self.scaling = scale if scale is not None else (self.head_dim if projected else width) ** -0.5
        self.sliding_window = window
        self.q_proj = self.k_proj = self.v_proj = self.o_proj = None
        if qk in ("separate", "collapsed"):
            self.q_proj = nn.Linear(width, heads * (self.head_dim if projected else width), bias=False)
        if projected:
            self.k_proj = nn.Linear(width, heads * self.head_dim, bias=False)
        if qk == "cholesky":
            # Of each T the entries on and below the diagonal, row by row.
            self.triangles = nn.Linear(width * (width + 1) // 2, heads, bias=False)
        if vo == "full":
            self.v_proj = nn.Linear(width, heads * self.head_dim, bias=False)
            self.o_proj = nn.Linear(heads * self.head_dim, width, bias=False)
        self.managed = projected and vo == "full"
        if self.managed:
            self.num_key_value_groups = 1

    @property
    def spec(self) -> dict[str, Any]:
        return {
            "qk": self.qk,
            "vo": self.vo,
            "heads": self.heads,
            "head_dim": self.head_dim,
            "rotary_dim": self.rotary_dim,
            "scale": self.scaling,
            "window": self.window,
        }

    @property
    def holds(self) -> dict[str, Any]:
        width = self.config.hidden_size
        sizes = {
            "num_heads": self.heads,
            "num_kv_heads": self.heads,
            "head_dim": self.head_dim if self.qk in ("separate", "symmetric") else width,
            "v_head_dim": self.head_dim if self.vo == "full" else width,
            "latent": False,
            "latent_dim": 0,
        }
        if self.managed:
            return sizes | {"store_heads": self.heads, "store_k_dim": self.head_dim, "store_v_dim": self.head_dim}
        keys = width if self.qk == "collapsed" else self.heads * sizes["head_dim"]
        values = self.heads * self.head_dim if self.vo == "full" else 0 if self.qk == "collapsed" else width
        return sizes | {"kind": "other", "store_heads": 1, "store_k_dim": keys, "store_v_dim": values}

    def triangle(self) -> Tensor:
        """T [heads, d, d], lower triangular."""
        width = self.config.hidden_size
        rows, columns = torch.tril_indices(width, width, device=self.triangles.weight.device)
        made = self.triangles.weight.new_zeros(self.heads, width, width)
        return made.index_put((torch.arange(self.heads).unsqueeze(-1), rows, columns), self.triangles.weight)

    @torch.no_grad()
    def set_triangle(self, made: Tensor) -> None:
        """Copy lower triangular matrices [heads, d, d]."""
        rows, columns = torch.tril_indices(made.shape[-1], made.shape[-1], device=made.device)
        self.triangles.weight.copy_(made[:, rows, columns])

    def queries_and_keys(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Before rotation: [B, H, N, D] and [B, H or 1, N, D], whose products are the scores before scaling."""
        if self.qk == "collapsed":
            return self._heads(self.q_proj, hidden_states), hidden_states.unsqueeze(1)
        if self.qk == "cholesky":
            keys = torch.einsum("bnd,hde->bhne", hidden_states, self.triangle())
            return keys, keys
        keys = self._heads(self.k_proj, hidden_states)
        return (keys if self.qk == "symmetric" else self._heads(self.q_proj, hidden_states)), keys

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Any = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        q, k = self.queries_and_keys(hidden_states)
        q, k = (self._turned(x, position_embeddings) for x in (q, k))
        tokens = self.vo == "none"
        v = hidden_states.unsqueeze(1) if tokens else self._heads(self.v_proj, hidden_states)
        once = tokens and self.qk == "collapsed"
        if past_key_values is not None:
            k, v = past_key_values.update(k, v[..., :0] if once else v, self.layer_idx)
        v = k if once else v
        dropout = float(getattr(self.config, "attention_dropout", 0.0)) if self.training else 0.0
        if self.managed:
            attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager)
            numbers = {"dropout": dropout, "scaling": self.scaling, "sliding_window": self.window}
            out, _ = attention(self, q, k, v, attention_mask, **numbers, **kwargs)
        else:
            mask = visible(attention_mask, q.shape[2], k.shape[2], q.device, self.window)
            weights = weigh(q @ k.transpose(-1, -2) * self.scaling, mask).to(v.dtype)
            out = (nn.functional.dropout(weights, dropout, self.training) @ v).transpose(1, 2)
        out = out.flatten(2)
        return (out if self.o_proj is None else self.o_proj(out)), None

    def _heads(self, linear: Any, hidden_states: Tensor) -> Tensor:
        return linear(hidden_states).unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _turned(self, x: Tensor, position_embeddings: Any) -> Tensor:
        if not self.rotary_dim:
            return x
        cos, sin = (part.unsqueeze(1) for part in position_embeddings)
        turned, rest = x[..., : self.rotary_dim], x[..., self.rotary_dim :]
        return torch.cat([turned * cos + rotate_half(turned) * sin, rest], dim=-1)
