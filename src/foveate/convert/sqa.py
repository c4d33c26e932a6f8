"""Sparse query attention from a checkpoint: fewer query heads, hence fewer scores (arXiv 2510.01817; our extension)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from dataclasses import replace as with_changes
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from foveate.compat import output_projection
from foveate.convert.base import Calibration, Conversion, Stage, register
from foveate.convert.surgery.head_maps import check_heads, heads_for, install, layers_of, take
from foveate.errors import BadArgument
from foveate.heads.moments import collect
from foveate.models.converted import decoder_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from foveate.models.shape import ModelShape

_RIDGE = 1e-8
"""Of the mean energy of a head's dim; only there so that heads which are sums of others can be solved for."""


@register
@dataclass(frozen=True)
class SparseQueries(Conversion):
    """Keep some query heads of each layer, and give the output matrix of those what it can make up for of the rest.

    The paper trains such layers from scratch; which heads to keep is chosen here. Heads are dropped one by one. The
    next is the one whose contribution to the layer's output can best be replaced: its output is predicted from those of
    the heads that are left, by least squares over the calibration text, the prediction goes into their columns of W_o,
    and what it misses is the price. Every key-value head that stays keeps equally many query heads, so that the layer
    is plain GQA. Key-value heads that nobody reads are dropped from the cache.

    Args:
        heads: query heads that stay; None: half of them, rounded down to a multiple of kv_heads.
        kv_heads: key-value heads that stay; None: all, or as many as `heads` if that is less.
        kv: share of the cache to keep, instead of kv_heads.
    """

    id: ClassVar[str] = "sqa"
    what: ClassVar[str] = "keep fewer query heads, whose output matrix takes over for the others"

    heads: int | None = None
    kv_heads: int | None = None
    kv: float | None = None

    def numbers(self, heads: int, kv_heads: int) -> tuple[int, int]:
        """Query and key-value heads that stay of these many.

        Raises:
            BadArgument: what cannot be had, with what can.
        """
        if self.kv is not None and self.kv_heads is not None:
            raise BadArgument("kv", self.kv, "give kv or kv_heads, not both")
        group = heads // kv_heads
        limit = min(kv_heads, self.heads or kv_heads)
        left = self.kv_heads or (min(limit, heads_for(self.kv, kv_heads)) if self.kv is not None else limit)
        if not 1 <= left <= kv_heads:
            raise BadArgument("kv_heads", self.kv_heads, f"the model has {kv_heads}")
        chosen = max(1, min(heads // 2 // left, group)) * left if self.heads is None else self.heads
        if not 1 <= chosen <= left * group or chosen % left:
            raise BadArgument(
                "heads",
                chosen,
                f"give a multiple of kv_heads={left}, at most {left * group}: a query head that stays keeps its "
                "key-value head (dha merges key-value heads)",
            )
        return chosen, left

    def check(self, model: PreTrainedModel, shape: ModelShape) -> None:
        check_heads(model)
        for layer in shape.layers:
            self.numbers(layer.num_heads, layer.num_kv_heads)

    def stages(self, model: PreTrainedModel, calibration: Calibration) -> Iterator[Stage]:
        calibration.watch("reading what heads return")
        modules = {index: output_projection(layer.self_attn) for index, layer in enumerate(decoder_layers(model))}
        returned = collect(model, modules, calibration.batches())  # type: ignore[arg-type]
        kept, lost, exact = [], [], True
        for index, weights in layers_of(model):
            heads, kv_heads = weights.q.shape[0], weights.k.shape[0]
            chosen, left = self.numbers(heads, kv_heads)
            moments = returned.pop(index)
            if chosen < heads and moments.count < 2 * len(moments.second):
                raise BadArgument("tokens", moments.count, f"give at least {2 * len(moments.second)} of calibration")
            stay, o, share = drop_heads(moments.second, weights.o, kv_heads, chosen, left)
            weights = with_changes(take(weights, q=stay), o=o)
            key_map = [h // (heads // kv_heads) for h in stay]
            install(model, index, weights, key_map, key_map)
            kept.append(stay)
            lost.append(round(share, 6))
            exact = exact and chosen == heads
        yield Stage("fewer query heads", exact, {"kept": kept, "lost": lost})


def drop_heads(second: Tensor, o: Tensor, kv_heads: int, chosen: int, left: int) -> tuple[list[int], Tensor, float]:
    """Which heads stay, their output matrices [chosen, d, Dv], which make up for the rest, and the share of the layer's
    output energy that is lost.

    Args:
        second: second moment of all heads' outputs side by side, [H * Dv, H * Dv].
        o: [H, d, Dv].
        kv_heads: contiguous groups of query heads. chosen, left: query heads and groups that stay.
    """
    heads, width, dim = o.shape
    group = heads // kv_heads
    out = o.transpose(0, 1).reshape(width, heads * dim).clone()
    whole = float(torch.einsum("ij,jk,ik->", out, second, out))
    mean = second.diagonal().mean().clamp_min(torch.finfo(second.dtype).tiny)
    # Blocks of the inverse say how well a head is predicted by all others; dropping one updates it (Schur complement).
    inverse = torch.linalg.inv(
        second + _RIDGE * mean * torch.eye(len(second), dtype=second.dtype, device=second.device)
    )
    stay, lost = list(range(heads)), 0.0

    def columns(which: Sequence[int]) -> Tensor:
        index = torch.as_tensor(which, device=o.device)
        return (index[:, None] * dim + torch.arange(dim, device=o.device)).flatten()

    def price(which: Sequence[int]) -> float:
        c = columns(which)
        return float(torch.linalg.solve(inverse[c][:, c], out[:, c].T).mul(out[:, c].T).sum())

    def drop(which: list[int]) -> None:
        nonlocal inverse, out, lost, stay
        lost += price(which)
        c = columns(which)
        stay = [h for h in stay if h not in which]
        rest = columns(stay)
        shift = torch.linalg.solve(inverse[c][:, c], inverse[c])
        update = inverse - inverse[:, c] @ shift
        out = out.clone()
        out[:, rest] -= out[:, c] @ shift[:, rest]
        inverse = torch.zeros_like(inverse)
        inverse[rest[:, None], rest] = update[rest[:, None], rest]

    def groups() -> dict[int, list[int]]:
        found: dict[int, list[int]] = {}
        for h in stay:
            found.setdefault(h // group, []).append(h)
        return found

    while len(groups()) > left:
        drop(min(groups().values(), key=price))
    while len(stay) > chosen:
        drop(min(([h] for heads in groups().values() if len(heads) > chosen // left for h in heads), key=price))
    return stay, out.reshape(width, heads, dim).transpose(0, 1)[stay], lost / max(whole, 1e-300)
