"""Softmax attention whose geometry is stated by numbers of its own, for layers that gate heads or hold more of them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from foveate.compat import ALL_ATTENTION_FUNCTIONS
from foveate.errors import BadArgument
from foveate.layers.eager import eager
from foveate.layers.mixer import Mixer
from foveate.layers.rotation import rotate_half
from foveate.models.weights import read_heads, write_heads

__all__ = ["ALL_ATTENTION_FUNCTIONS", "HeadGeometry", "HeadNorm", "SoftmaxHeads", "rotate_half"]


@dataclass(frozen=True)
class HeadGeometry:
    """What an attention layer is besides its weights.

    Args:
        scale: what scores are multiplied by.
        rotary_dim: how many of a head's first dims are rotated, in half-split pairs.
        softcap: what scores are capped at, None without.
        window: keys that a query sees, its own included; None without a limit.
        bias: whether queries, keys and values have one. o_bias: whether the output has.
        norm: whether queries and keys of a head are normalised before they are rotated: None, "shared" (one gain for
            all heads) or "heads" (one each).
        norm_eps: what these norms add to the mean square. norm_offset: what they add to their weights.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    rotary_dim: int
    softcap: float | None = None
    window: int | None = None
    bias: bool = False
    o_bias: bool = False
    norm: str | None = None
    norm_eps: float = 0.0
    norm_offset: float = 0.0

    def __post_init__(self) -> None:
        if self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads:
            raise BadArgument("num_kv_heads", self.num_kv_heads, f"give a divisor of num_heads={self.num_heads}")
        if not 0 <= self.rotary_dim <= self.head_dim or self.rotary_dim % 2:
            raise BadArgument("rotary_dim", self.rotary_dim, f"give an even number up to head_dim={self.head_dim}")
        if self.norm not in (None, "shared", "heads"):
            raise BadArgument("norm", self.norm, 'give None, "shared" or "heads"')

    @classmethod
    def of(cls, module: Any) -> HeadGeometry:
        """The geometry of an attention module.

        Raises:
            Refused: a module whose weights cannot be read head by head.
        """
        held = read_heads(module)
        offset = 0.0
        if held.q_norm is not None:
            offset = float((held.q_norm - module.q_norm.weight.detach().to(held.q_norm)).mean().round())
        return cls(
            num_heads=held.q.shape[0],
            num_kv_heads=held.k.shape[0],
            head_dim=held.q.shape[1],
            scale=held.scale,
            rotary_dim=held.rotary_dim,
            softcap=held.softcap,
            window=held.window,
            bias=held.q_bias is not None,
            o_bias=held.o_bias is not None,
            norm=None if held.q_norm is None else "shared",
            norm_eps=held.norm_eps,
            norm_offset=offset,
        )

    def json(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)


class HeadNorm(nn.Module):
    """RMS norm of each head's query or key [B, H, N, D], in float32 as transformers' families have it.

    Args:
        heads: a gain for each of so many; None: one for all.
        offset: what is added to the weight; with 1 the product is rounded once, as in Gemma.
    """

    def __init__(self, heads: int | None, dim: int, eps: float, offset: float) -> None:
        super().__init__()
        shape = (dim,) if heads is None else (heads, 1, dim)
        self.weight = nn.Parameter(torch.full(shape, 1.0 - offset))
        self.eps, self.offset = eps, offset

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        if self.offset:
            return (normed * (self.offset + self.weight.float())).to(x.dtype)
        return self.weight * normed.to(x.dtype)


class SoftmaxHeads(Mixer):
    """Attention as transformers' decoders compute it, with the parts in which its subclasses differ apart.

    Foveate's methods and transformers' attention functions serve it like the module that it replaced, and
    `foveate.models.weights` reads and writes it.

    Args:
        geometry: the numbers of a `HeadGeometry`.
    """

    is_causal = True

    def __init__(self, config: Any, layer_idx: int, geometry: dict[str, Any]) -> None:
        super().__init__(config, layer_idx)
        self.geometry = g = HeadGeometry(**geometry)
        width = config.hidden_size
        self.head_dim, self.scaling, self.rotary_ndims = g.head_dim, g.scale, g.rotary_dim
        self.num_key_value_groups = g.num_heads // g.num_kv_heads
        self.attn_logit_softcapping, self.sliding_window = g.softcap, g.window
        self.q_proj = nn.Linear(width, g.num_heads * g.head_dim, bias=g.bias)
        self.k_proj = nn.Linear(width, g.num_kv_heads * g.head_dim, bias=g.bias)
        self.v_proj = nn.Linear(width, g.num_kv_heads * g.head_dim, bias=g.bias)
        self.o_proj = nn.Linear(g.num_heads * g.head_dim, width, bias=g.o_bias)
        self.q_norm = self.k_norm = None
        if g.norm is not None:
            each = g.norm == "heads"
            self.q_norm = HeadNorm(g.num_heads if each else None, g.head_dim, g.norm_eps, g.norm_offset)
            self.k_norm = HeadNorm(g.num_kv_heads if each else None, g.head_dim, g.norm_eps, g.norm_offset)

    def take(self, module: Any) -> None:
        """Copy the weights of a module of the same geometry."""
        write_heads(self, read_heads(module))

    def projected(self, linear: nn.Linear, hidden_states: Tensor) -> Tensor:
        """[B, N, d] -> [B, heads, N, D]."""
        return linear(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def placed(self, x: Tensor, norm: HeadNorm | None, position_embeddings: Any) -> Tensor:
        """Queries or keys [B, heads, N, D], normalised and rotated."""
        x = x if norm is None else norm(x)
        if not self.rotary_ndims:
            return x
        cos, sin = (part.unsqueeze(1) for part in position_embeddings)
        turned, rest = x[..., : self.rotary_ndims], x[..., self.rotary_ndims :]
        turned = turned * cos + rotate_half(turned) * sin
        return turned if not rest.shape[-1] else torch.cat([turned, rest], dim=-1)

    def keys_and_values(self, hidden_states: Tensor, position_embeddings: Any, cache: Any) -> tuple[Tensor, Tensor]:
        """Of all tokens so far, [B, Hkv, M, D] each; those of the new ones go into the cache."""
        k = self.placed(self.projected(self.k_proj, hidden_states), self.k_norm, position_embeddings)
        v = self.projected(self.v_proj, hidden_states)
        return (k, v) if cache is None else cache.update(k, v, self.layer_idx)

    def attended(self, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None, **kwargs: Any) -> Tensor:
        """Heads' outputs [B, N, H, D] by the attention function that the configuration names."""
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager)
        if self.attn_logit_softcapping is not None:
            kwargs["softcap"] = self.attn_logit_softcapping
        dropout = float(getattr(self.config, "attention_dropout", 0.0)) if self.training else 0.0
        window = {"sliding_window": self.sliding_window}
        out, _ = attention(self, q, k, v, attention_mask, dropout=dropout, scaling=self.scaling, **window, **kwargs)
        return out
