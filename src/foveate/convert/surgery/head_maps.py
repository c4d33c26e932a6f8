"""Put head-mapped layers in the place of a decoder's attention, from head-wise weights and maps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace as with_changes
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from foveate.attention.request import grouped
from foveate.errors import BadArgument
from foveate.layers.head_mapped import HeadMappedAttention
from foveate.models.converted import decoder_layers, replace
from foveate.models.weights import HeadWeights, read_heads

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LINEARS = (("q_proj", "q"), ("k_proj", "k"), ("v_proj", "v"))


def check_heads(model: PreTrainedModel) -> None:
    """Refuse models of which some layer does not have heads of its own keys and values.

    Raises:
        Refused: with the reason.
    """
    for layer in decoder_layers(model):
        read_heads(layer.self_attn, torch.float32)


def layers_of(model: PreTrainedModel) -> Iterator[tuple[int, HeadWeights]]:
    """Each decoder layer's index and its weights in float64."""
    for index, layer in enumerate(decoder_layers(model)):
        yield index, read_heads(layer.self_attn)


def install(
    model: PreTrainedModel,
    layer: int,
    weights: HeadWeights,
    key_map: Sequence[int] | None = None,
    value_map: Sequence[int] | None = None,
    **more: Any,
) -> HeadMappedAttention:
    """A head-mapped layer with these weights, in the place of one decoder layer's attention.

    Key and value heads that nobody reads are left out. Where keys and values are shared by the same groups of one size,
    query heads are reordered (rows of W_q with columns of W_o, which changes nothing) so that groups are contiguous.

    Args:
        key_map, value_map: head of weights.k and of weights.v that each query head reads; None: contiguous groups.
        more: further numbers of the layer (`HeadMappedAttention`).
    """
    heads = weights.q.shape[0]
    key_map = grouped(heads, weights.k.shape[0]) if key_map is None else tuple(key_map)
    value_map = grouped(heads, weights.v.shape[0]) if value_map is None else tuple(value_map)
    weights, key_map, value_map = ordered(weights, key_map, value_map)
    biases = [f"{name}_proj" for name in "qkvo" if getattr(weights, f"{name}_bias") is not None]
    made = replace(
        model,
        layer,
        "head-mapped",
        num_heads=heads,
        num_k_heads=weights.k.shape[0],
        num_v_heads=weights.v.shape[0],
        head_dim=weights.q.shape[1],
        v_head_dim=weights.v.shape[1],
        key_map=list(key_map),
        value_map=list(value_map),
        rotary_dim=weights.rotary_dim,
        scale=weights.scale,
        softcap=weights.softcap,
        window=weights.window,
        norm_eps=None if weights.k_norm is None else weights.norm_eps,
        biases=biases,
        **more,
    )
    assert isinstance(made, HeadMappedAttention)
    write(made, weights)
    return made


@torch.no_grad()
def write(module: HeadMappedAttention, weights: HeadWeights) -> None:
    """Put weights of the same shapes into a layer without augmented queries, cast to its dtype."""
    for name, part in _LINEARS:
        linear = getattr(module, name)
        linear.weight.copy_(getattr(weights, part).flatten(0, 1))
        if linear.bias is not None:
            linear.bias.copy_(getattr(weights, f"{part}_bias").flatten())
    module.o_proj.weight.copy_(weights.o.transpose(0, 1).flatten(1))
    if weights.o_bias is not None:
        module.o_proj.bias.copy_(weights.o_bias)
    for name in ("q_norm", "k_norm"):
        gain = getattr(weights, name)
        if gain is not None:
            getattr(module, name).weight.copy_(gain)


def read(module: HeadMappedAttention, dtype: torch.dtype = torch.float64) -> HeadWeights:
    """A copy of such a layer's weights, head by head; its maps say who reads what."""

    def rows(linear: Any, dim: int) -> tuple[Tensor, Tensor | None]:
        bias = None if linear.bias is None else linear.bias.detach().to(dtype, copy=True).unflatten(0, (-1, dim))
        return linear.weight.detach().to(dtype, copy=True).unflatten(0, (-1, dim)), bias

    q, q_bias = rows(module.q_proj, module.head_dim)
    k, k_bias = rows(module.k_proj, module.head_dim)
    v, v_bias = rows(module.v_proj, module.v_head_dim)
    o = module.o_proj.weight.detach().to(dtype, copy=True).unflatten(1, (-1, module.v_head_dim))
    normed = module.norm_eps is not None
    return HeadWeights(
        q=q,
        k=k,
        v=v,
        o=o.transpose(0, 1).contiguous(),
        q_bias=q_bias,
        k_bias=k_bias,
        v_bias=v_bias,
        o_bias=None if module.o_proj.bias is None else module.o_proj.bias.detach().to(dtype, copy=True),
        q_norm=module.q_norm.weight.detach().to(dtype, copy=True) if normed else None,  # type: ignore[union-attr]
        k_norm=module.k_norm.weight.detach().to(dtype, copy=True) if normed else None,  # type: ignore[union-attr]
        scale=module.scaling,
        softcap=module.softcap,
        window=module.sliding_window,
        rotary_dim=module.rotary_dim,
        norm_eps=module.norm_eps or 0.0,
    )


def take(weights: HeadWeights, *, q: Sequence[int] | None = None, k: Sequence[int] | None = None,
         v: Sequence[int] | None = None) -> HeadWeights:  # fmt: skip
    """Some query heads (with their columns of W_o), key heads and value heads, in this order; None: all."""
    changes: dict[str, Any] = {}
    for name, heads in (("q", q), ("o", q), ("k", k), ("v", v)):
        if heads is None:
            continue
        index = torch.as_tensor(list(heads), device=weights.q.device)
        changes[name] = getattr(weights, name)[index]
        bias = None if name == "o" else getattr(weights, f"{name}_bias")
        if bias is not None:
            changes[f"{name}_bias"] = bias[index]
    return with_changes(weights, **changes)


def ordered(
    weights: HeadWeights, key_map: Sequence[int], value_map: Sequence[int]
) -> tuple[HeadWeights, tuple[int, ...], tuple[int, ...]]:
    """The same function with unread heads left out, and with contiguous groups where groups are equal."""
    heads = len(key_map)
    keys, values = sorted(set(key_map)), sorted(set(value_map))
    weights = take(weights, k=keys, v=values)
    key_map, value_map = (tuple(keys.index(j) for j in key_map), tuple(values.index(j) for j in value_map))
    same = len(set(zip(key_map, value_map, strict=True))) == len(keys) == len(values)
    equal = len({key_map.count(j) for j in range(len(keys))}) == 1
    if not (same and equal):
        return weights, key_map, value_map
    order = sorted(range(heads), key=lambda h: key_map[h])
    first = [key_map.index(j) for j in range(len(keys))]
    weights = take(weights, q=order, v=[value_map[h] for h in first])
    return weights, grouped(heads, len(keys)), grouped(heads, len(keys))


def floor_map(heads: int, count: int) -> tuple[int, ...]:
    """Query head h reads head floor(h * count / H) (DiffQKV, section 2.1)."""
    return tuple(h * count // heads for h in range(heads))


def heads_for(share: float, heads: int, name: str = "kv") -> int:
    """How many of `heads` heads a share of the cache leaves, rounded down.

    Raises:
        BadArgument: less than one head; the floor is named.
    """
    if not 0 < share <= 1:
        raise BadArgument(name, share, "give a share of the dense cache, above 0 and up to 1")
    left = int(share * heads + 1e-9)
    if left < 1:
        raise BadArgument(name, share, f"one of {heads} heads is the least, {name}={1 / heads:.4g}")
    return left
