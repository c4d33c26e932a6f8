"""Head-wise views of an attention module's weights: read them, change them, put them back."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from foveate.compat import is_latent
from foveate.errors import BadArgument, Refused


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
        norm_eps: what the norms of queries and keys add to the mean square.
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
    norm_eps: float = 0.0

    @property
    def groups(self) -> int:
        """Query heads that share a key head."""
        return self.q.shape[0] // self.k.shape[0]


@dataclass
class LatentWeights:
    """The projections of one latent attention layer (MLA; DeepSeek-V2, section 2.1), head by head.

    A token x [d] has the latent c = rmsnorm(w_dkv @ x + dkv_bias) * kv_norm and one rotated key w_kr @ x + kr_bias for
    all heads; head h has the key w_uk[h] @ c without a position, and the value w_uv[h] @ c. Its query, dn dims without
    a position before dr rotated ones, is q[h] @ x, or q_b[h] @ (rmsnorm(q_a @ x + q_a_bias) * q_norm), plus q_bias[h].

    Args:
        q: [H, dn + dr, d], or None where queries have a latent of their own.
        q_a, q_norm, q_b: [rq, d], [rq] and [H, dn + dr, rq]; None where q is not. q_norm: None without that norm.
        w_dkv: [r, d]. w_kr: [dr, d]. kv_norm: [r], None where the latent is not normed.
        w_uk: [H, dn, r]. w_uv: [H, dv, r].
        o: [H, d, dv]: the output is the sum over heads of o[h] @ head, plus o_bias [d].
        q_bias, q_a_bias, dkv_bias, kr_bias: [H, dn + dr], [rq], [r], [dr], or None.
        eps: what both norms add to the mean square.
        scale: what scores are multiplied by, YaRN's factor included.
        interleaved: whether rotated pairs are (2i, 2i + 1), as DeepSeek lays them out, or half-split.
    """

    q: Tensor | None
    q_a: Tensor | None
    q_norm: Tensor | None
    q_b: Tensor | None
    w_dkv: Tensor
    w_kr: Tensor
    kv_norm: Tensor | None
    w_uk: Tensor
    w_uv: Tensor
    o: Tensor
    q_bias: Tensor | None
    q_a_bias: Tensor | None
    dkv_bias: Tensor | None
    kr_bias: Tensor | None
    o_bias: Tensor | None
    eps: float
    scale: float
    interleaved: bool


class _Rows(NamedTuple):
    """Some rows of a linear layer."""

    linear: nn.Linear
    rows: slice

    def weight(self, dtype: torch.dtype) -> Tensor:
        return self.linear.weight.detach()[self.rows].to(dtype, copy=True)

    def bias(self, dtype: torch.dtype) -> Tensor | None:
        return None if self.linear.bias is None else self.linear.bias.detach()[self.rows].to(dtype, copy=True)

    def check(self, name: str, weight: Tensor, bias: Tensor | None) -> None:
        want = self.linear.weight[self.rows]
        if weight.shape != want.shape:
            raise BadArgument(name, tuple(weight.shape), f"as rows give {tuple(want.shape)}, as the module has")
        if bias is not None and bias.numel() != want.shape[0]:
            raise BadArgument(f"{name}_bias", tuple(bias.shape), f"give {want.shape[0]} numbers, as the module has")
        if bias is not None and self.linear.bias is None and bias.count_nonzero():
            raise BadArgument(f"{name}_bias", tuple(bias.shape), "the module has none; give None or zeros")

    def write(self, weight: Tensor, bias: Tensor | None) -> None:
        self.linear.weight[self.rows].copy_(weight)
        if self.linear.bias is not None:
            self.linear.bias[self.rows].copy_(torch.zeros(()) if bias is None else bias.flatten())


def check_readable(module: Any) -> None:
    """Refuse, without copying anything, an attention module that neither `read_heads` nor `read_latent` reads.

    Raises:
        Refused: with the reason.
    """
    if is_latent(module):
        _latent_parts(module)
    else:
        _parts(module)


def read_heads(module: Any, dtype: torch.dtype = torch.float64) -> HeadWeights:
    """A copy of an attention module's weights, head by head.

    Raises:
        Refused: an attention module that is laid out in another way.
    """
    parts, dim = _parts(module), module.head_dim
    q, k, v, o = (part.weight(dtype) for part in parts)
    q_bias, k_bias, v_bias, o_bias = (part.bias(dtype) for part in parts)
    norm = getattr(module, "q_norm", None)
    return HeadWeights(
        q=q.unflatten(0, (-1, dim)),
        k=k.unflatten(0, (-1, dim)),
        v=v.unflatten(0, (-1, dim)),
        o=o.unflatten(1, (-1, dim)).transpose(0, 1).contiguous(),
        q_bias=None if q_bias is None else q_bias.unflatten(0, (-1, dim)),
        k_bias=None if k_bias is None else k_bias.unflatten(0, (-1, dim)),
        v_bias=None if v_bias is None else v_bias.unflatten(0, (-1, dim)),
        o_bias=o_bias,
        q_norm=_gain(norm, dim, dtype),
        k_norm=_gain(getattr(module, "k_norm", None), dim, dtype),
        scale=float(module.scaling),
        softcap=getattr(module, "attn_logit_softcapping", None),
        window=_window(module),
        rotary_dim=_rotary_dim(module),
        norm_eps=0.0 if norm is None else _eps(norm),
    )


@torch.no_grad()
def write_heads(module: Any, weights: HeadWeights) -> None:
    """Put weights of the same shapes back, cast to the module's dtype; nothing is written where something does not fit.

    Raises:
        Refused: an attention module that is laid out in another way.
        BadArgument: weights of other shapes, a bias or norm that the module does not have, or another scale, softcap,
            window or rotary_dim: a module takes those from its configuration.
    """
    parts = _parts(module)
    for name, want in (
        ("scale", float(module.scaling)),
        ("softcap", getattr(module, "attn_logit_softcapping", None)),
        ("window", _window(module)),
        ("rotary_dim", _rotary_dim(module)),
    ):
        if getattr(weights, name) != want:
            raise BadArgument(name, getattr(weights, name), f"the module's configuration makes it {want}")
    if weights.o.shape[0] != weights.q.shape[0]:
        raise BadArgument("o", tuple(weights.o.shape), f"give one for each of the {weights.q.shape[0]} heads of q")
    rows = {
        "q": (weights.q.flatten(0, 1), weights.q_bias),
        "k": (weights.k.flatten(0, 1), weights.k_bias),
        "v": (weights.v.flatten(0, 1), weights.v_bias),
        "o": (weights.o.transpose(0, 1).flatten(1), weights.o_bias),
    }
    norms = [(name, getattr(module, name, None), getattr(weights, name)) for name in ("q_norm", "k_norm")]
    for name, norm, gain in norms:
        _check_gain(name, norm, gain)
    for part, (name, (weight, bias)) in zip(parts, rows.items(), strict=True):
        part.check(name, weight, bias)
    for part, (weight, bias) in zip(parts, rows.values(), strict=True):
        part.write(weight, bias)
    for _, norm, gain in norms:
        _write_gain(norm, gain)


def read_latent(module: Any, dtype: torch.dtype = torch.float64) -> LatentWeights:
    """A copy of a latent attention module's weights, head by head.

    Raises:
        Refused: a module that is not DeepSeek's latent attention.
    """
    down, rope, up, o = _latent_parts(module)
    nope, total = module.qk_nope_head_dim, module.qk_nope_head_dim + module.qk_rope_head_dim
    up_weight = up.weight(dtype).unflatten(0, (-1, nope + module.v_head_dim))
    direct = module.q_lora_rank is None
    norms = [_weighted(module.kv_a_layernorm), None if direct else _weighted(module.q_a_layernorm)]
    eps = {_eps(norm) for norm in norms if norm is not None}
    if len(eps) > 1:
        raise Refused(f"{type(module).__name__}: its norms have two different eps")
    heads, query = _whole(module.q_proj if direct else module.q_b_proj), None if direct else _whole(module.q_a_proj)
    rows, q_bias = heads.weight(dtype).unflatten(0, (-1, total)), heads.bias(dtype)
    return LatentWeights(
        q=rows if direct else None,
        q_a=None if query is None else query.weight(dtype),
        q_norm=_gain(norms[1], module.q_lora_rank, dtype),
        q_b=None if direct else rows,
        w_dkv=down.weight(dtype),
        w_kr=rope.weight(dtype),
        kv_norm=_gain(norms[0], module.kv_lora_rank, dtype),
        w_uk=up_weight[:, :nope].contiguous(),
        w_uv=up_weight[:, nope:].contiguous(),
        o=o.weight(dtype).unflatten(1, (-1, module.v_head_dim)).transpose(0, 1).contiguous(),
        q_bias=None if q_bias is None else q_bias.unflatten(0, (-1, total)),
        q_a_bias=None if query is None else query.bias(dtype),
        dkv_bias=down.bias(dtype),
        kr_bias=rope.bias(dtype),
        o_bias=o.bias(dtype),
        eps=next(iter(eps), 0.0),
        scale=float(module.scaling),
        interleaved=_interleaved(module),
    )


@torch.no_grad()
def write_latent(module: Any, weights: LatentWeights) -> None:
    """Put weights of the same shapes back, cast to the module's dtype; nothing is written where something does not fit.

    Raises:
        Refused: a module that is not DeepSeek's latent attention.
        BadArgument: weights of other shapes, a bias that the module does not have, or another scale, eps or layout: a
            module takes those from its configuration.
    """
    down, rope, up, o = _latent_parts(module)
    direct = module.q_lora_rank is None
    gains = [("kv_norm", _weighted(module.kv_a_layernorm), weights.kv_norm)]
    gains += [("q_norm", None if direct else _weighted(module.q_a_layernorm), weights.q_norm)]
    for name, want in (
        ("scale", float(module.scaling)),
        ("eps", next((_eps(norm) for _, norm, _ in gains if norm is not None), 0.0)),
        ("interleaved", _interleaved(module)),
    ):
        if getattr(weights, name) != want:
            raise BadArgument(name, getattr(weights, name), f"the module's configuration makes it {want}")
    rows = weights.q if direct else weights.q_b
    if rows is None or (weights.q_a is None) != direct:
        raise BadArgument("q", None, "give q, or q_a and q_b: those that the module has")
    up_rows = torch.cat([weights.w_uk, weights.w_uv], dim=1).flatten(0, 1)
    todo: list[tuple[str, _Rows, Tensor, Tensor | None]] = [
        ("w_dkv", down, weights.w_dkv, weights.dkv_bias),
        ("w_kr", rope, weights.w_kr, weights.kr_bias),
        ("w_uk and w_uv", up, up_rows, None),
        ("o", o, weights.o.transpose(0, 1).flatten(1), weights.o_bias),
        ("q", _whole(module.q_proj if direct else module.q_b_proj), rows.flatten(0, 1), weights.q_bias),
    ]
    if weights.q_a is not None:
        todo.append(("q_a", _whole(module.q_a_proj), weights.q_a, weights.q_a_bias))
    for name, norm, gain in gains:
        _check_gain(name, norm, gain)
    for name, part, weight, bias in todo:
        part.check(name, weight, bias)
    for _, part, weight, bias in todo:
        part.write(weight, bias)
    for _, norm, gain in gains:
        _write_gain(norm, gain)


def _whole(linear: Any) -> _Rows:
    """All rows of a plain linear layer; adapters and packed weights hold other numbers than those that multiply."""
    if type(linear) is not nn.Linear:
        raise Refused(f"a projection is a {type(linear).__name__}; merge adapters and undo quantisation first")
    return _Rows(linear, slice(None))


def _parts(module: Any) -> tuple[_Rows, _Rows, _Rows, _Rows]:
    """Where queries, keys, values and the output have their weights."""
    name = type(module).__name__
    if is_latent(module):
        raise Refused(f"{name} is latent attention: read_latent reads it")
    out = getattr(module, "o_proj", None) or getattr(module, "dense", None)
    fused = getattr(module, "qkv_proj", None)
    split = [getattr(module, f"{part}_proj", None) for part in "qkv"]
    if out is None or (fused is None and None in split):
        raise Refused(f"{name} has no q_proj, k_proj, v_proj (or qkv_proj) and o_proj (or dense), which Foveate reads")
    if getattr(module, "qk_layernorm", False):
        raise Refused(f"{name} subtracts the mean of each query and key, which Foveate does not read")
    if fused is None:
        q, k, v = (_whole(linear) for linear in split)
        return q, k, v, _whole(out)
    linear, queries = _whole(fused).linear, _whole(out).linear.in_features
    keys = (linear.out_features - queries) // 2
    bounds = (0, queries, queries + keys, queries + 2 * keys)
    q, k, v = (_Rows(linear, slice(start, stop)) for start, stop in pairwise(bounds))
    return q, k, v, _whole(out)


def _latent_parts(module: Any) -> tuple[_Rows, _Rows, _Rows, _Rows]:
    """Where the latent, the rotated key, what is made of the latent, and the output have their weights."""
    if not is_latent(module):
        raise Refused(f"{type(module).__name__} is not latent attention: read_heads reads others")
    down = _whole(module.kv_a_proj_with_mqa).linear
    rank = module.kv_lora_rank
    return _Rows(down, slice(0, rank)), _Rows(down, slice(rank, None)), _whole(module.kv_b_proj), _whole(module.o_proj)


def _rotary_dim(module: Any) -> int:
    """How many dims of a head are rotated, where families differ in how they say it."""
    if hasattr(module, "rotary_ndims"):
        return int(module.rotary_ndims)
    rope = getattr(module.config, "rope_parameters", None) or {}
    return int(module.head_dim * rope.get("partial_rotary_factor", 1.0))


def _interleaved(module: Any) -> bool:
    """DeepSeek-V2 has no other layout and no name for it."""
    held = module if hasattr(module, "interleaved") else module.config
    return bool(getattr(held, "interleaved", getattr(held, "rope_interleave", True)))


def _window(module: Any) -> int | None:
    """Modules whose layers differ hold their own; the others take that of the whole model."""
    held = module if hasattr(module, "sliding_window") else module.config
    return getattr(held, "sliding_window", None)


def _weighted(norm: Any) -> Any:
    """The norm, or None for a module in its place that leaves everything as it is."""
    return None if isinstance(norm, nn.Identity) else norm


def _eps(norm: Any) -> float:
    return float(norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps)


@torch.no_grad()
def _offset(norm: Any) -> float:
    """What a norm adds to its weight before it multiplies: families write a gain g as g or as g - 1.

    Asked of the norm itself: of equal numbers it returns the gain.
    """
    weight = norm.weight.detach().float()
    gain = norm(torch.ones_like(norm.weight)).float()
    offset = float((gain - weight).mean().round())
    if offset not in (0.0, 1.0) or not torch.allclose(gain, weight + offset, rtol=1e-2, atol=1e-2):
        raise Refused(f"{type(norm).__name__} is not an RMS norm with one gain per dim, which Foveate reads")
    return offset


def _gain(norm: Any, dim: int, dtype: torch.dtype) -> Tensor | None:
    if norm is None:
        return None
    if norm.weight.shape != (dim,):
        raise Refused(
            f"{type(norm).__name__} has {tuple(norm.weight.shape)} gains; Foveate reads norms over {dim} dims"
        )
    return norm.weight.detach().to(dtype, copy=True) + _offset(norm)


def _check_gain(name: str, norm: Any, gain: Tensor | None) -> None:
    if (norm is None) != (gain is None):
        raise BadArgument(
            name, gain, "the module has none" if norm is None else "the module has this norm; give a gain"
        )
    if gain is not None and gain.shape != norm.weight.shape:
        raise BadArgument(name, tuple(gain.shape), f"give {tuple(norm.weight.shape)}, as the module has")


def _write_gain(norm: Any, gain: Tensor | None) -> None:
    """A gain that is still the same leaves its weight alone: 1 + w has fewer digits than a small w."""
    if norm is None or gain is None:
        return
    offset, held = _offset(norm), norm.weight.detach()
    same = held.to(gain.dtype) + offset == gain
    norm.weight.copy_(torch.where(same, held, (gain - offset).to(held)))
