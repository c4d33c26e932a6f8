"""Head-wise views of an attention module's weights: read them, change them, put them back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from foveate.errors import Refused


@dataclass
class HeadWeights:
    """The projections of one attention layer, head by head; a token x [d] has the query q[h] @ x + q_bias[h].

    Args:
        q: [H, D, d]. k: [Hk, D, d]. v: [Hk, Dv, d].
        o: [H, d, Dv]: the output is the sum over heads of o[h] @ head, plus o_bias [d].
        q_bias, k_bias, v_bias: [heads, dim], or None.
        q_norm, k_norm: gains [D] of the RMS norm over each head's query and key, as multiplied; None without one.
        scale: what scores are multiplied by.
        softcap: what scores are capped at, None without.
        window: keys that a query sees, its own included; None without a limit.
        rotary_dim: how many of a head's first dims are rotated, in half-split pairs (i, i + rotary_dim / 2).
    """

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    q_bias: Tensor | None
    k_bias: Tensor | None
    v_bias: Tensor | None
    o_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    scale: float
    softcap: float | None
    window: int | None
    rotary_dim: int

    @property
    def groups(self) -> int:
        """Query heads that share a key head."""
        return self.q.shape[0] // self.k.shape[0]


def read_heads(module: Any, dtype: torch.dtype = torch.float64) -> HeadWeights:
    """A copy of an attention module's weights, head by head.

    Raises:
        Refused: an attention module whose projections have other names.
    """
    _check(module)
    dim = module.head_dim
    q, q_bias = _rows(module.q_proj, dim, dtype)
    k, k_bias = _rows(module.k_proj, dim, dtype)
    v, v_bias = _rows(module.v_proj, dim, dtype)
    o = module.o_proj.weight.detach().to(dtype)
    o = o.reshape(o.shape[0], -1, v.shape[1]).transpose(0, 1).contiguous()
    return HeadWeights(
        q=q,
        k=k,
        v=v,
        o=o,
        q_bias=q_bias,
        k_bias=k_bias,
        v_bias=v_bias,
        o_bias=None if module.o_proj.bias is None else module.o_proj.bias.detach().to(dtype),
        q_norm=_gain(getattr(module, "q_norm", None), dtype),
        k_norm=_gain(getattr(module, "k_norm", None), dtype),
        scale=float(module.scaling),
        softcap=getattr(module, "attn_logit_softcapping", None),
        window=getattr(module, "sliding_window", None),
        rotary_dim=dim,
    )


@torch.no_grad()
def write_heads(module: Any, weights: HeadWeights) -> None:
    """Put weights of the same shapes back, cast to the module's dtype."""
    _check(module)
    for linear, rows, bias in (
        (module.q_proj, weights.q, weights.q_bias),
        (module.k_proj, weights.k, weights.k_bias),
        (module.v_proj, weights.v, weights.v_bias),
    ):
        linear.weight.copy_(rows.flatten(0, 1))
        if linear.bias is not None and bias is not None:
            linear.bias.copy_(bias.flatten())
    module.o_proj.weight.copy_(weights.o.transpose(0, 1).flatten(1))


def _check(module: Any) -> None:
    if not all(isinstance(getattr(module, name, None), nn.Linear) for name in ("q_proj", "k_proj", "v_proj", "o_proj")):
        raise Refused(f"{type(module).__name__} has no q_proj, k_proj, v_proj and o_proj, which Foveate reads")


def _rows(linear: nn.Linear, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    weight = linear.weight.detach().to(dtype)
    bias = None if linear.bias is None else linear.bias.detach().to(dtype).reshape(-1, dim).clone()
    return weight.reshape(-1, dim, weight.shape[1]).clone(), bias


def _gain(norm: Any, dtype: torch.dtype) -> Tensor | None:
    return None if norm is None else norm.weight.detach().to(dtype).clone()
