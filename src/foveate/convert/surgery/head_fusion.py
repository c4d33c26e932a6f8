"""Learn to fuse heads: combinations of a group's heads are driven together while the model trains (DHA, section 3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace as with_changes
from itertools import cycle
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from foveate.convert.base import Calibration
from foveate.convert.surgery.head_maps import read
from foveate.convert.surgery.head_merge import key_weights, merge_keys, merge_values, second, value_metrics, with_bias
from foveate.heads.moments import Moments
from foveate.layers.head_mapped import HeadMappedAttention
from foveate.models.weights import HeadWeights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ANNEAL = 0.8
"""Share of the steps after which fused heads may no longer differ."""
_ASCENT = 20.0
"""Step size of the multipliers."""
_SMALLEST = 0.25
"""Of a pair's factor: pairs that have little in common are turned, but not blown up."""


def aligned(weights: HeadWeights, moments: Moments, key_groups: Sequence[Sequence[int]],
            value_groups: Sequence[Sequence[int]]) -> HeadWeights:  # fmt: skip
    """The same function with the heads of each group turned so that they are alike: keys by a turn and a scale of each
    rotated pair, turned back in W_q; values by an orthogonal matrix, turned back in W_o. Normed keys stay."""
    s, per = second(moments), weights.groups
    k, v = with_bias(weights.k, weights.k_bias), with_bias(weights.v, weights.v_bias)
    q, o = with_bias(weights.q, weights.q_bias).clone(), weights.o.clone()
    costs = key_weights(weights, moments).unflatten(0, (-1, per)).sum(1)
    metrics = value_metrics(weights).unflatten(0, (-1, per)).sum(1)
    for group in key_groups if weights.k_norm is None else ():
        if len(group) > 1:
            for j, turn in zip(group, merge_keys(k[group], s, costs[group], weights.rotary_dim).maps, strict=True):
                turn = _regular(turn, weights.rotary_dim)
                k[j] = torch.linalg.solve(turn, k[j])
                q[j * per : (j + 1) * per] = turn.T @ q[j * per : (j + 1) * per]
    for group in value_groups:
        if len(group) > 1:
            for j, turn in zip(group, merge_values(v[group], s, metrics[group]).maps, strict=True):
                turn = _orthogonal(turn)
                v[j] = turn.T @ v[j]
                o[j * per : (j + 1) * per] = o[j * per : (j + 1) * per] @ turn
    changes: dict[str, Any] = {"q": q[..., :-1], "k": k[..., :-1], "v": v[..., :-1], "o": o}
    for name, rows in (("q", q), ("k", k), ("v", v)):
        if getattr(weights, f"{name}_bias") is not None:
            changes[f"{name}_bias"] = rows[..., -1]
    return with_changes(weights, **changes)


def _orthogonal(x: Tensor) -> Tensor:
    left, _, right = torch.linalg.svd(x)
    return left @ right


def _regular(turn: Tensor, rotary_dim: int) -> Tensor:
    half, out = rotary_dim // 2, torch.zeros_like(turn)
    i = torch.arange(half, device=turn.device)
    c = torch.complex(turn[i, i], turn[i + half, i])
    size = c.abs()
    c = torch.where(size > 0, c / size.clamp_min(1e-12), torch.ones_like(c)) * size.clamp(_SMALLEST, 1 / _SMALLEST)
    out[i, i] = out[i + half, i + half] = c.real
    out[i + half, i], out[i, i + half] = c.imag, -c.imag
    if rotary_dim < len(turn):
        out[rotary_dim:, rotary_dim:] = _orthogonal(turn[rotary_dim:, rotary_dim:])
    return out


class _Shift(nn.Module):
    """A matrix and what training adds to it, kept in float32."""

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros_like(like, dtype=torch.float32))

    def forward(self, weight: Tensor) -> Tensor:
        return (weight.float() + self.shift).to(weight.dtype)


class Fusion(nn.Module):
    """Each head of a projection [heads * D, d] as a combination of its group's heads: head i is sum_j omega[i, j] W_j.

    `omega` starts as the identity, so that nothing is changed. What the combinations of a group then have in common is
    their weighted mean, and `together`, 0 to 1, says how far each one has already moved there.

    Args:
        linear: the projection; its weight, and its bias if it has one, are seen through this from now on.
        groups: heads that shall become one.
        costs: what an error of each dim of a head costs, [heads, D]: its weight in the mean.
    """

    allowed: Tensor
    share: Tensor

    def __init__(self, linear: nn.Linear, groups: Sequence[Sequence[int]], costs: Tensor) -> None:
        super().__init__()
        heads, dim = costs.shape
        self.linear, self.dim = [linear], dim  # in a list, so that it is no part of this module
        self.groups = [list(group) for group in groups]
        weight = linear.weight.detach()
        allowed = torch.zeros(heads, heads, device=weight.device)
        share = torch.zeros(heads, heads, dim, device=weight.device)
        for group in self.groups:
            part = costs[group].float().clamp_min(0) + 1e-6 * costs.float().amax().clamp_min(1e-30)
            for i in group:
                allowed[i, group] = 1.0
                share[i, group] = (part / part.sum(0)).to(share)
        self.register_buffer("allowed", allowed)
        self.register_buffer("share", share)
        self.together = 0.0
        self.omega = nn.Parameter(torch.eye(heads, device=weight.device))
        self.shift = nn.Parameter(torch.zeros_like(weight, dtype=torch.float32))
        self.energy = float(weight.double().square().sum())
        parametrize.register_parametrization(linear, "weight", self)
        if linear.bias is not None:
            parametrize.register_parametrization(linear, "bias", _Combined(self))

    def combine(self, rows: Tensor) -> Tensor:
        """[heads * D, ...] in float32."""
        heads = torch.einsum("ij,jd...->id...", self.omega * self.allowed, rows.unflatten(0, (-1, self.dim)))
        if self.together:
            heads = heads + self.together * (self._means(heads) - heads)
        return heads.flatten(0, 1)

    def _means(self, heads: Tensor) -> Tensor:
        return torch.einsum("ijd,jd...->id...", self.share, heads)

    def forward(self, weight: Tensor) -> Tensor:
        return self.combine(weight.float() + self.shift).to(weight.dtype)

    def loss(self) -> Tensor:
        """Mean square distance of a group's heads from their mean, in shares of the heads' energy; 0: they coincide."""
        given: Any = self.linear[0].parametrizations
        rows = given.weight.original.detach().float() + self.shift
        heads = torch.einsum("ij,jd...->id...", self.omega * self.allowed, rows.unflatten(0, (-1, self.dim)))
        return (heads - self._means(heads)).square().sum() / self.energy

    @torch.no_grad()
    def finish(self) -> None:
        """Leave what each group has in common in the place of its heads, and a plain projection."""
        self.together = 1.0
        linear = self.linear[0]
        names = [name for name in ("weight", "bias") if parametrize.is_parametrized(linear, name)]
        for name in names:
            parametrize.remove_parametrizations(linear, name, leave_parametrized=True)
            heads = getattr(linear, name).unflatten(0, (-1, self.dim))
            for group in self.groups:
                for other in group[1:]:
                    heads[other].copy_(heads[group[0]])


class _Combined(nn.Module):
    """A bias by the combinations of its weight."""

    def __init__(self, fusion: Fusion) -> None:
        super().__init__()
        self.fusion = [fusion]

    def forward(self, bias: Tensor) -> Tensor:
        return self.fusion[0].combine(bias.float()).to(bias.dtype)


def train(
    model: PreTrainedModel,
    layers: Sequence[HeadMappedAttention],
    groups: Sequence[tuple[Sequence[Sequence[int]], Sequence[Sequence[int]]]],
    moments: Mapping[int, Moments],
    calibration: Calibration,
    steps: int,
    lr: float,
    weight_lr: float,
) -> dict[str, Any]:
    """Fuse the key and value heads of these layers by groups, for good: min over combinations and weights, max over
    multipliers, of L_LM + l1 (L_fus - t) + l2 (L_fus - t)^2, with t annealed to 0. With t each head moves to what its
    group has in common, so that the last steps train the fused model itself.

    Args:
        groups: of key and of value heads, for each layer.
        lr: of the combinations. weight_lr: of the projections, those of queries and outputs included.

    Returns:
        Fusion loss and loss of the next token, before and after.
    """
    frozen = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    model.requires_grad_(False)
    fusions: list[Fusion] = []
    shifts: list[_Shift] = []
    for layer, (keys, values) in zip(layers, groups, strict=True):
        weights = read(layer)
        per_key = key_weights(weights, moments[layer.layer_idx]).unflatten(0, (-1, weights.groups)).sum(1)
        per_value = value_metrics(weights).diagonal(dim1=1, dim2=2).unflatten(0, (-1, weights.groups)).sum(1)
        fusions += [Fusion(layer.k_proj, keys, per_key), Fusion(layer.v_proj, values, per_value)]
        for linear in (layer.q_proj, layer.o_proj):
            shifts.append(_Shift(linear.weight))
            parametrize.register_parametrization(linear, "weight", shifts[-1])
    optimizer = torch.optim.Adam(
        [
            {"params": [fusion.omega for fusion in fusions], "lr": lr},
            {"params": [x.shift for x in (*fusions, *shifts)], "lr": weight_lr},
        ]
    )
    first = last = sum(float(fusion.loss().detach()) for fusion in fusions) / len(fusions)
    linear_weight, square_weight = 1.0, 1.0
    losses: list[float] = []
    was_training = model.training
    model.eval()
    with torch.enable_grad():
        for step, batch in zip(range(steps), cycle(calibration.batches())):
            ids = batch.to(model.device)
            for fusion in fusions:
                fusion.together = 1 - max(0.0, 1 - step / (_ANNEAL * steps))
            logits = model(ids, use_cache=False).logits[:, :-1]
            loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
            apart = torch.stack([fusion.loss() for fusion in fusions]).mean()
            target = max(0.0, 1 - (step + 1) / (_ANNEAL * steps))
            gap = apart - first * target
            optimizer.zero_grad()
            (loss + linear_weight * gap + square_weight * gap.square()).backward()
            optimizer.step()
            above = float(gap.detach()) / max(first, 1e-12)
            linear_weight = max(0.0, linear_weight + _ASCENT * above)
            square_weight += _ASCENT * above**2
            losses.append(float(loss.detach()))
            last = float(apart.detach())
            calibration.watch(f"fusing heads, step {step + 1} of {steps}")
    for layer in layers:
        for linear in (layer.q_proj, layer.o_proj):
            parametrize.remove_parametrizations(linear, "weight", leave_parametrized=True)
    for fusion in fusions:
        fusion.finish()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(frozen[name])
    model.train(was_training)
    return {
        "fusion_loss": [round(first, 6), round(last, 6)],
        "loss": [round(x, 4) for x in (losses[0], losses[-1])] if losses else [],
    }
