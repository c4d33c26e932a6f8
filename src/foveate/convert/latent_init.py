"""Latent attention from the weights of grouped-query attention alone: one SVD of keys and values together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from foveate.convert.spectrum import truncated_svd
from foveate.errors import BadArgument, Refused
from foveate.models.converted import decoder_layers, replace
from foveate.models.weights import HeadWeights, LatentWeights, read_heads, write_latent

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROPE_ROWS = ("last", "fastest")


@dataclass(frozen=True)
class LatentInit:
    """A latent layer that stands for an attention layer.

    Args:
        weights: its projections, in float64.
        spec: the numbers of the layer, kind "latent", that takes them.
        kv_energy, q_energy: shares of the squared norm of the stacked key and value weights, and of the query weights,
            that the ranks hold; 1 for queries of full rank.
    """

    weights: LatentWeights
    spec: dict[str, Any]
    kv_energy: float
    q_energy: float


def largest_rank(weights: HeadWeights) -> int:
    """Ranks above this one hold nothing more: that of all key and value rows, min(d, 2 Hkv D)."""
    return min(weights.k.shape[2], weights.k.shape[:2].numel() + weights.v.shape[:2].numel())


def stacked(weights: HeadWeights) -> Tensor:
    """Key rows over value rows, both repeated to H heads, [H (D + Dv), d]; with biases a last column more."""
    groups = weights.groups
    k, v = (_with_bias(w, b).repeat_interleave(groups, 0) for w, b in _keys_and_values(weights))
    return torch.cat([k.flatten(0, 1), v.flatten(0, 1)])


def joint_svd(
    weights: HeadWeights, *, rank: int, rope_dim: int, q_rank: int | None = None, rope_rows: str = "last"
) -> LatentInit:
    """The initialisation of X-EcoMLA (arXiv 2503.11132, section 3.2), which looks at no text.

    The stacked weights of keys and values, repeated to all query heads, are cut at `rank`; queries, if `q_rank` is
    given, at that. The rotated key that all heads share is the mean of the key heads' rows. What loses its rotation
    thereby, and what is rotated otherwise than before, makes this another function even at full rank; the path of the
    values is exact there. Biases become a constant's column in the same SVD.

    Args:
        rope_dim: dims of queries and keys that stay rotated, even; the others of the head's D lose their position.
        rope_rows: which: "last", the head's last rows, neighbours paired, turned by every (D / rope_dim)-th
            frequency, as published; "fastest", the pairs of the model's fastest frequencies, turned as they were.

    Raises:
        Refused: norms on queries and keys, which no linear map holds, or partly rotated heads with "last".
        BadArgument: numbers that do not fit.
    """
    heads, dim, width = weights.q.shape
    if weights.q_norm is not None or weights.k_norm is not None:
        raise Refused("norms on queries and keys stand between a latent and its keys; take a model without them")
    if rope_rows not in ROPE_ROWS:
        raise BadArgument("rope_rows", rope_rows, f"give one of {', '.join(ROPE_ROWS)}")
    if rope_rows == "last" and weights.rotary_dim != dim:
        raise Refused(
            f"a head's last rows are not rotated here ({weights.rotary_dim} of {dim} are): rope_rows='fastest'"
        )
    if rope_dim < 2 or rope_dim % 2 or rope_dim > weights.rotary_dim:
        raise BadArgument("rope_dim", rope_dim, f"give an even number up to {weights.rotary_dim}")
    most = largest_rank(weights)
    if not 1 <= rank <= most:
        raise BadArgument("rank", rank, f"keys and values of this model have rank {most}: give 1 to {most}")
    if q_rank is not None and not 1 <= q_rank <= min(width, heads * dim):
        raise BadArgument("q_rank", q_rank, f"give 1 to {min(width, heads * dim)}")
    pairs = rope_dim // 2
    if rope_rows == "last":
        turned = list(range(dim - rope_dim, dim))
    else:
        turned = [start + i for start in (0, weights.rotary_dim // 2) for i in range(pairs)]
    plain = [row for row in range(dim) if row not in set(turned)]

    cut = truncated_svd(stacked(weights), rank)
    down = cut.values[:, None] * cut.right
    k_up, v_up = cut.left.split([heads * dim, len(cut.left) - heads * dim])
    key_bias = weights.k_bias is not None or weights.v_bias is not None
    w_kr, kr_bias = _split(_with_bias(weights.k, weights.k_bias, key_bias)[:, turned].mean(0), width)
    w_dkv, dkv_bias = _split(down, width)

    order = plain + turned
    q = _with_bias(weights.q, weights.q_bias)[:, order]
    q_energy, q_a, q_a_bias, q_b = 1.0, None, None, None
    if q_rank is not None:
        cut_q = truncated_svd(q.flatten(0, 1), q_rank)
        q_a, q_a_bias = _split(cut_q.values[:, None] * cut_q.right, width)
        q_b, q_energy = cut_q.left.unflatten(0, (heads, dim)), cut_q.share
    rows, q_bias = _split(q, width)
    made = LatentWeights(
        q=rows if q_rank is None else None,
        q_a=q_a,
        q_norm=None,
        q_b=q_b,
        w_dkv=w_dkv,
        w_kr=w_kr,
        kv_norm=None,
        w_uk=k_up.unflatten(0, (heads, dim))[:, plain],
        w_uv=v_up.unflatten(0, (heads, -1)),
        o=weights.o,
        q_bias=q_bias if q_rank is None else None,
        q_a_bias=q_a_bias,
        dkv_bias=dkv_bias,
        kr_bias=kr_bias,
        o_bias=weights.o_bias,
        eps=0.0,
        scale=weights.scale,
        interleaved=rope_rows == "last",
    )
    there = {"kv_a_proj_with_mqa": dkv_bias, "o_proj": weights.o_bias, "q_a_proj": q_a_bias, "q_proj": made.q_bias}
    spec = {
        "num_heads": heads,
        "rank": rank,
        "rope_dim": rope_dim,
        "nope_dim": dim - rope_dim,
        "v_dim": weights.v.shape[1],
        "q_rank": q_rank,
        "norm": "none",
        "frequencies": None if rope_rows == "last" else list(range(pairs)),
        "interleaved": rope_rows == "last",
        "scale": weights.scale,
        "softcap": weights.softcap,
        "window": weights.window,
        "biases": [name for name, bias in there.items() if bias is not None],
    }
    return LatentInit(made, spec, cut.share, q_energy)


def put_latent(model: PreTrainedModel, layer: int, **numbers: Any) -> LatentInit:
    """Replace one decoder layer's attention by the latent layer that `joint_svd` makes of it with these numbers."""
    init = joint_svd(read_heads(decoder_layers(model)[layer].self_attn), **numbers)
    write_latent(replace(model, layer, "latent", **init.spec), init.weights)
    return init


def _keys_and_values(weights: HeadWeights) -> list[tuple[Tensor, Tensor | None]]:
    """With biases on both or on neither, so that the two stack."""
    both = [(weights.k, weights.k_bias), (weights.v, weights.v_bias)]
    if all(bias is None for _, bias in both):
        return both
    return [(w, w.new_zeros(w.shape[:2]) if bias is None else bias) for w, bias in both]


def _with_bias(rows: Tensor, bias: Tensor | None, column: bool = False) -> Tensor:
    """[..., n, d] and [..., n] -> [..., n, d + 1]: the bias weighs a constant 1. Where it is None, only if asked."""
    if bias is None and not column:
        return rows
    bias = rows.new_zeros(rows.shape[:-1]) if bias is None else bias
    return torch.cat([rows, bias[..., None]], dim=-1)


def _split(rows: Tensor, width: int) -> tuple[Tensor, Tensor | None]:
    """The inverse of `_with_bias`."""
    return rows[..., :width], rows[..., width] if rows.shape[-1] > width else None
