"""Merge key or value heads into common ones, each head first turned so that it fits the others best.

Key heads. Before rotation a key is linear in the hidden state, and each of its rotated pairs is one complex number. A
complex factor (a turn and a scale of the pair) commutes with rotation, so heads j of a group may share one key kbar if
k_j = c_j kbar pair by pair: the factor moves into the queries, conj(c_j) q. The common pair that leaves the least
weighted error is the first principal component of the group's pairs. Dims that are not rotated allow any matrix.

Value heads. Any D x D matrix per head moves into W_o, so the common value is spanned by the first D principal
components of the group's values, weighted by what reads them.

Behind a norm of keys and queries nothing can be moved into the queries: keys are averaged there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import replace as with_changes

import torch
from torch import Tensor

from foveate.heads.moments import Moments
from foveate.models.weights import HeadWeights

_TINY = 1e-12


@dataclass
class Merged:
    """Heads of a group as one.

    Args:
        rows: [D, d + 1], weights and last the bias of the common head.
        maps: [heads, D, D]: head j is nearly maps[j] @ common.
        error: what is lost, weighted.
        whole: weighted energy of the group, in the unit of `error`.
    """

    rows: Tensor
    maps: Tensor
    error: float
    whole: float


def with_bias(weight: Tensor, bias: Tensor | None) -> Tensor:
    """[heads, D, d] and [heads, D] -> [heads, D, d + 1]."""
    last = torch.zeros_like(weight[..., :1]) if bias is None else bias.unsqueeze(-1)
    return torch.cat([weight, last], dim=-1)


def second(moments: Moments) -> Tensor:
    """Second moment of (x, 1), [d + 1, d + 1]."""
    top = torch.cat([moments.second, moments.mean[:, None]], dim=1)
    last = torch.cat([moments.mean, moments.mean.new_ones(1)])
    return torch.cat([top, last[None]], dim=0)


def mean_of(rows: Tensor, s: Tensor, weights: Tensor, scales: Tensor | None = None) -> Merged:
    """Plain averages.

    Args:
        rows: [g, D, d + 1]. s: second moment of (x, 1). weights: [g, D] of errors.
        scales: [g] that heads are divided by first, behind a norm, which gives the scale back.
    """
    share = torch.ones(rows.shape[0], dtype=rows.dtype, device=rows.device)
    if scales is not None:
        share = weights.mean(-1) / scales.clamp_min(_TINY)
    share = share / share.sum().clamp_min(_TINY)
    common = (share[:, None, None] * rows).sum(0)
    eye = torch.eye(rows.shape[1], dtype=rows.dtype, device=rows.device).expand(rows.shape[0], -1, -1)
    error = _energy(rows - common, s, weights)
    return Merged(common, eye, error, _energy(rows, s, weights))


def merge_keys(rows: Tensor, s: Tensor, weights: Tensor, rotary_dim: int) -> Merged:
    """The common key of a group of heads.

    Args:
        rows: [g, D, d + 1]. s: second moment of (x, 1).
        weights: [g, D], what an error of each dim costs.
        rotary_dim: first dims of a head that are rotated, in half-split pairs.
    """
    g, dim, _ = rows.shape
    if g == 1:
        return mean_of(rows, s, weights)
    half = rotary_dim // 2
    parts, maps = [], rows.new_zeros(g, dim, dim)
    lost = 0.0
    if half:
        z = torch.complex(rows[:, :half], rows[:, half:rotary_dim])
        w = (weights[:, :half] + weights[:, half:rotary_dim]) / 2
        common, c, error = _one_pair(z, s, w)
        parts += [common.real, common.imag]
        i = torch.arange(half, device=rows.device)
        maps[:, i, i], maps[:, i, i + half] = c.real, -c.imag
        maps[:, i + half, i], maps[:, i + half, i + half] = c.imag, c.real
        lost += error
    if rotary_dim < dim:
        rest = merge_values(rows[:, rotary_dim:], s, torch.diag_embed(weights[:, rotary_dim:]))
        parts.append(rest.rows)
        maps[:, rotary_dim:, rotary_dim:] = rest.maps
        lost += rest.error
    return Merged(torch.cat(parts), maps, lost, _energy(rows, s, weights))


def _one_pair(z: Tensor, s: Tensor, w: Tensor) -> tuple[Tensor, Tensor, float]:
    """Of complex heads [g, P, d + 1] the common one [P, d + 1], each head's factors [g, P], and the weighted error."""
    cov = torch.einsum("gpd,hpd->pgh", z @ s.to(z.dtype), z.conj())
    root = w.clamp_min(0).sqrt().T
    values, vectors = torch.linalg.eigh(root[:, :, None] * cov * root[:, None, :])
    u = vectors[..., -1]  # [P, g]
    common = torch.einsum("pg,gpd->pd", u.conj() * root, z)
    # Errors weigh nothing where no weight is; then any common pair will do, the mean for one.
    common = torch.where(values[:, -1:] > _TINY, common, z.mean(0))
    c = _factors(z, s, common)
    # The same keys with factors around 1: a common pair is only known up to a turn and a scale.
    size = ((w * c.abs().square()).sum(0) / w.sum(0).clamp_min(_TINY)).sqrt()
    turn = (w * c).sum(0)
    unit = torch.where(turn.abs() > _TINY, turn / turn.abs().clamp_min(_TINY), torch.ones_like(turn))
    gauge = torch.where(size > _TINY, size * unit, torch.ones_like(unit))
    return common * gauge[:, None], c / gauge, float((values[:, :-1].clamp_min(0)).sum())


def _factors(z: Tensor, s: Tensor, common: Tensor) -> Tensor:
    seen = (common @ s.to(z.dtype)).conj()
    cross, own = torch.einsum("gpd,pd->gp", z, seen), torch.einsum("pd,pd->p", common, seen).real
    return cross / own.clamp_min(_TINY)


def merge_values(rows: Tensor, s: Tensor, metrics: Tensor, rank: int | None = None) -> Merged:
    """The common value of a group of heads.

    Args:
        rows: [g, D, d + 1]. s: second moment of (x, 1).
        metrics: [g, D, D], positive semidefinite: an error e of head j costs e' metrics[j] e.
        rank: dims of the common value; None: D.
    """
    g, dim, width = rows.shape
    rank = dim if rank is None else rank
    stacked = (root(metrics) @ rows).reshape(g * dim, width)
    whole = stacked @ s @ stacked.T
    values, vectors = torch.linalg.eigh((whole + whole.T) / 2)
    common = vectors[:, -rank:].T @ stacked
    maps = _maps(rows, s, common)
    # Any change of basis goes; near the heads' own it is trained and rounded best.
    left, _, right = torch.linalg.svd(maps.mean(0), full_matrices=False)
    size = _mean_square(rows, s) / _mean_square(common, s).clamp_min(_TINY)
    common = size.sqrt() * ((left @ right) @ common if rank == dim else common)
    maps = _maps(rows, s, common)
    return Merged(common, maps, float(values[:-rank].clamp_min(0).sum()), float(values.clamp_min(0).sum()))


def _maps(rows: Tensor, s: Tensor, common: Tensor) -> Tensor:
    held = common @ s @ common.T
    return rows @ s @ common.T @ torch.linalg.pinv((held + held.T) / 2, hermitian=True, rtol=1e-12)


def _mean_square(rows: Tensor, s: Tensor) -> Tensor:
    return (rows @ s * rows).sum(-1).mean()


def root(metric: Tensor) -> Tensor:
    """Symmetric square roots [.., D, D], with a floor so that no direction is left out of a common value altogether."""
    values, vectors = torch.linalg.eigh((metric + metric.mT) / 2)
    floor = values.amax(-1, keepdim=True).clamp_min(_TINY) * 1e-6
    return (vectors * torch.maximum(values, floor).sqrt().unsqueeze(-2)) @ vectors.mT


def _energy(rows: Tensor, s: Tensor, weights: Tensor) -> float:
    return float(((rows @ s * rows).sum(-1) * weights).sum())


def key_weights(weights: HeadWeights, moments: Moments) -> Tensor:
    """What an error of each dim of a key costs each query head's scores, [H, D]: the mean square of its query there.

    Behind norms, where all queries have the same size, every dim costs the same.
    """
    if weights.q_norm is not None:
        return torch.ones_like(weights.q[..., 0])
    rows = with_bias(weights.q, weights.q_bias)
    energy = (rows @ second(moments) * rows).sum(-1)
    half = weights.rotary_dim // 2
    # Turning mixes the two dims of a pair.
    pair = (energy[:, :half] + energy[:, half : 2 * half]) / 2
    return torch.cat([pair, pair, energy[:, 2 * half :]], dim=1)


def value_metrics(weights: HeadWeights) -> Tensor:
    """What an error of each query head's output costs the layer's output, [H, Dv, Dv]."""
    return weights.o.transpose(1, 2) @ weights.o


def merge(
    weights: HeadWeights,
    moments: Moments,
    part: str,
    reads: Sequence[int],
    costs: Tensor | None = None,
    aligned: bool = True,
) -> HeadWeights:
    """Weights in which key heads ("k") or value heads ("v") are merged, and what turned them is in W_q or W_o.

    Args:
        weights: heads in contiguous groups, as in GQA.
        reads: for each query head the new head that it shall read; heads that are read for the same one are merged.
        costs: of errors, for each query head: [H, D] for keys, [H, Dv, Dv] for values; None: `key_weights`,
            `value_metrics`.
        aligned: False averages heads as they are.
    """
    old = getattr(weights, part)
    group = weights.q.shape[0] // old.shape[0]
    rows, s = with_bias(old, getattr(weights, f"{part}_bias")), second(moments)
    if costs is None:
        costs = key_weights(weights, moments) if part == "k" else value_metrics(weights)
    commons, turns = [], rows.new_zeros(weights.q.shape[0], *2 * old.shape[1:2])
    for new in range(max(reads) + 1):
        readers = [h for h, head in enumerate(reads) if head == new]
        sources = sorted({h // group for h in readers})
        cost = torch.stack([costs[[h for h in readers if h // group == j]].sum(0) for j in sources])
        found = merged(rows[sources], s, cost, part, weights, aligned)
        commons.append(found.rows)
        for h in readers:
            turns[h] = found.maps[sources.index(h // group)]
    common = torch.stack(commons)
    changes: dict[str, object] = {part: common[..., :-1].contiguous()}
    if getattr(weights, f"{part}_bias") is not None:
        changes[f"{part}_bias"] = common[..., -1].contiguous()
    if part == "v":
        changes["o"] = weights.o @ turns
    elif weights.k_norm is None:
        changes["q"] = turns.transpose(1, 2) @ weights.q
        if weights.q_bias is not None:
            changes["q_bias"] = torch.einsum("hij,hi->hj", turns, weights.q_bias)
    return with_changes(weights, **changes)


def merged(rows: Tensor, s: Tensor, cost: Tensor, part: str, weights: HeadWeights, aligned: bool = True) -> Merged:
    """What the key ("k") or value ("v") heads of a group have in common.

    Args:
        rows: [g, D, d + 1]. s: second moment of (x, 1).
        cost: of errors, [g, D] for keys, [g, D, D] for values.
        weights: the layer's, which say what is rotated and normed.
        aligned: False averages heads as they are.
    """
    flat = cost if part == "k" else cost.diagonal(dim1=-2, dim2=-1)
    if len(rows) == 1 or not aligned:
        return mean_of(rows, s, flat)
    if part == "v":
        return merge_values(rows, s, cost)
    if weights.k_norm is not None:
        return mean_of(rows, s, flat, (rows @ s * rows).sum(-1).mean(-1).sqrt())
    return merge_keys(rows, s, cost, weights.rotary_dim)
