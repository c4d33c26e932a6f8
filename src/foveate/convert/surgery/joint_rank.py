"""Keys without a position and values as one latent: balanced against each other, then of a lower rank.

Source: TransMLA (2502.07864), section 4.3; the queries' own rank as in DeepSeek-V2 (2405.04434), section 2.1.2.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from foveate.convert.surgery.spectrum import principal
from foveate.errors import BadArgument
from foveate.heads.moments import Moments
from foveate.models.weights import LatentWeights


@dataclass(frozen=True)
class Cut:
    """A layer of lower rank, and how much of its latent is left.

    Args:
        energy: share of the mean square of the (balanced) latent that the rank keeps.
        keys, values: the same of its two parts, unbalanced.
    """

    weights: LatentWeights
    energy: float
    keys: float
    values: float


def balanced(weights: LatentWeights, inputs: Moments, keys: int, ratio: float = 1.0) -> tuple[LatentWeights, float]:
    """The first `keys` dims of the latent divided by a factor that makes them `ratio` times as large as the values, and
    what reads them multiplied: the same function. Returns the factor, too.

    Size is the mean over dims of the root mean square over the text, as section 4.3 has it.
    """
    size = inputs.of(weights.w_dkv, weights.dkv_bias).diagonal().clamp_min(0).sqrt()
    if not 0 < keys < len(size) or not float(size[:keys].sum()) or not float(size[keys:].sum()):
        return weights, 1.0
    factor = float(size[:keys].mean() / (size[keys:].mean() * ratio))
    scales = torch.ones_like(size)
    scales[:keys] = factor
    return _scaled(weights, scales), factor


def _scaled(weights: LatentWeights, scales: Tensor) -> LatentWeights:
    return replace(
        weights,
        w_dkv=weights.w_dkv / scales[:, None],
        dkv_bias=None if weights.dkv_bias is None else weights.dkv_bias / scales,
        w_uk=weights.w_uk * scales,
        w_uv=weights.w_uv * scales,
    )


def cut(weights: LatentWeights, inputs: Moments, keys: int, rank: int) -> Cut:
    """The latent's principal components over the text instead of the latent.

    Args:
        keys: how many of the latent's first dims are keys, for the report.
        rank: components kept, up to the latent's dims.
    """
    down, bias = weights.w_dkv, weights.dkv_bias
    second = inputs.of(down, bias)
    found = principal(second, rank)
    basis = found.vectors
    left = second - basis @ (basis.T @ second @ basis) @ basis.T
    total, lost = second.diagonal(), left.diagonal()
    made = replace(
        weights,
        w_dkv=basis.T @ down,
        dkv_bias=None if bias is None else basis.T @ bias,
        w_uk=weights.w_uk @ basis,
        w_uv=weights.w_uv @ basis,
    )
    return Cut(made, found.share, _kept(lost[:keys], total[:keys]), _kept(lost[keys:], total[keys:]))


def _kept(lost: Tensor, total: Tensor) -> float:
    return 1 - float(lost.sum() / total.sum()) if float(total.sum()) > 0 else 1.0


def cut_queries(weights: LatentWeights, inputs: Moments, rank: int) -> tuple[LatentWeights, float]:
    """All heads' queries from one latent of this rank, their principal components over the text; and the share of
    their mean square that is left."""
    if weights.q is None:
        raise BadArgument("q_rank", rank, "the queries have a latent already")
    rows = weights.q.flatten(0, 1)
    bias = None if weights.q_bias is None else weights.q_bias.flatten()
    found = principal(inputs.of(rows, bias), rank)
    made = replace(
        weights,
        q=None,
        q_bias=None,
        q_a=found.vectors.T @ rows,
        q_a_bias=None if bias is None else found.vectors.T @ bias,
        q_b=found.vectors.unflatten(0, weights.q.shape[:2]),
    )
    return made, found.share
