"""Latent attention from the weights of grouped-query attention alone: one SVD of keys and values together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from foveate.compat import rotary_factor
from foveate.convert.surgery.spectrum import truncated_svd
from foveate.errors import BadArgument, Refused
from foveate.layers.rotation import evenly
from foveate.models.converted import decoder_layers, replace
from foveate.models.weights import HeadWeights, LatentWeights, read_heads, write_latent

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROPE_ROWS = ("last", "even", "fastest")


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
    """Key rows over value rows, [Hkv (D + Dv), d], without biases.

    As published they are repeated to H heads first. That multiplies every singular value by sqrt(G), and repeats the
    left vectors over it: the same latent, by a larger decomposition.
    """
    return torch.cat([weights.k.flatten(0, 1), weights.v.flatten(0, 1)])


def joint_svd(
    weights: HeadWeights,
    *,
    rank: int,
    rope_dim: int,
    nope_dim: int | None = None,
    q_rank: int | None = None,
    rope_rows: str = "last",
) -> LatentInit:
    """The initialisation of X-EcoMLA (arXiv 2503.11132, section 3.2), which looks at no text.

    The stacked weights of keys and values are cut at `rank`; queries, if `q_rank` is
    given, at that. The rotated key that all heads share is the mean of the key heads' rows. What loses its rotation
    thereby, and what is rotated otherwise than before, makes this another function even at full rank; the path of the
    values is exact there. Biases take no part in it: that of keys without a position adds the same to all scores of a
    query, which softmax forgets, and that of values adds the same to every output, so it joins the output's.

    Args:
        rope_dim: dims of queries and keys that stay rotated, even; the others of the head's D lose their position.
        nope_dim: how many of those others are kept, the first ones; None: all.
        rope_rows: which stay rotated: "last", the head's last rows, neighbours paired, turned by every
            (D / rope_dim)-th frequency, as published; "even", the pairs of those frequencies, turned as they were;
            "fastest", the pairs of the model's fastest frequencies, turned as they were.

    Raises:
        Refused: norms on queries and keys, which no linear map holds, or partly rotated heads with "last".
        BadArgument: numbers that do not fit.
    """
    check_numbers(weights, rank, rope_dim, nope_dim, q_rank, rope_rows)
    heads, dim, _ = weights.q.shape
    pairs, half = rope_dim // 2, weights.rotary_dim // 2
    picked = list(range(pairs)) if rope_rows == "fastest" else evenly(pairs, half)
    last = rope_rows == "last"
    turned = list(range(dim - rope_dim, dim)) if last else [*picked, *(half + i for i in picked)]
    plain = [row for row in range(dim) if row not in set(turned)]
    plain = plain[:nope_dim]

    cut = truncated_svd(stacked(weights), rank)
    size = weights.groups**0.5
    k_up, v_up = (
        rows.unflatten(0, (len(weights.k), -1)).repeat_interleave(weights.groups, 0) / size
        for rows in cut.left.split([len(weights.k) * dim, len(cut.left) - len(weights.k) * dim])
    )
    o_bias = weights.o_bias
    if weights.v_bias is not None:
        added = torch.einsum("hov,hv->o", weights.o, weights.v_bias.repeat_interleave(weights.groups, 0))
        o_bias = added if o_bias is None else o_bias + added

    order = plain + turned
    q = weights.q[:, order]
    q_energy, q_a, q_b = 1.0, None, None
    if q_rank is not None:
        # The rows that are left out take part, as published.
        cut_q = truncated_svd(weights.q.flatten(0, 1), q_rank)
        q_a, q_energy = cut_q.values[:, None] * cut_q.right, cut_q.share
        q_b = cut_q.left.unflatten(0, (heads, dim))[:, order]
    made = LatentWeights(
        q=q if q_rank is None else None,
        q_a=q_a,
        q_norm=None,
        q_b=q_b,
        w_dkv=size * cut.values[:, None] * cut.right,
        w_kr=weights.k[:, turned].mean(0),
        kv_norm=None,
        w_uk=k_up[:, plain],
        w_uv=v_up,
        o=weights.o,
        q_bias=None if weights.q_bias is None else weights.q_bias[:, order],
        q_a_bias=None,
        dkv_bias=None,
        kr_bias=None if weights.k_bias is None else weights.k_bias[:, turned].mean(0),
        o_bias=o_bias,
        eps=0.0,
        scale=weights.scale,
        interleaved=last,
    )
    queries = "q_proj" if q_rank is None else "q_b_proj"
    there = {"kv_a_proj_with_mqa": made.kr_bias, "o_proj": o_bias, queries: made.q_bias}
    spec = {
        "num_heads": heads,
        "rank": rank,
        "rope_dim": rope_dim,
        "nope_dim": len(plain),
        "v_dim": weights.v.shape[1],
        "q_rank": q_rank,
        "norm": "none",
        "frequencies": picked if rope_rows == "fastest" else None,
        "interleaved": last,
        "scale": weights.scale,
        "softcap": weights.softcap,
        "window": weights.window,
        "biases": [name for name, bias in there.items() if bias is not None],
    }
    return LatentInit(made, spec, cut.share, q_energy)


def check_numbers(
    weights: HeadWeights, rank: int, rope_dim: int, nope_dim: int | None, q_rank: int | None, rope_rows: str
) -> None:
    """What `joint_svd` refuses, without its work."""
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
    if rope_rows != "fastest":
        evenly(rope_dim // 2, weights.rotary_dim // 2)
    if nope_dim is not None and not 0 <= nope_dim <= dim - rope_dim:
        raise BadArgument("nope_dim", nope_dim, f"beside {rope_dim} rotated dims give 0 to {dim - rope_dim}")
    most = largest_rank(weights)
    if not 1 <= rank <= most:
        raise BadArgument("rank", rank, f"keys and values of this model have rank {most}: give 1 to {most}")
    if q_rank is not None and not 1 <= q_rank <= min(width, heads * dim):
        raise BadArgument("q_rank", q_rank, f"give 1 to {min(width, heads * dim)}")


def put_latent(model: PreTrainedModel, layer: int, **numbers: Any) -> LatentInit:
    """Replace one decoder layer's attention by the latent layer that `joint_svd` makes of it with these numbers."""
    init = joint_svd(read_heads(decoder_layers(model)[layer].self_attn), **numbers)
    # What the rotary embedding multiplies scores by, rows that are not rotated any more would miss.
    init.weights.w_uk.mul_(rotary_factor(model))
    write_latent(replace(model, layer, "latent", **init.spec), init.weights)
    return init
