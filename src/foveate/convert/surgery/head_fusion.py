"""Learn to fuse heads: combinations of a group's heads are driven together while their layer is trained to return what
it returned (DHA, section 3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from dataclasses import replace as with_changes
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from foveate.convert.surgery.head_maps import read
from foveate.convert.surgery.head_merge import key_weights, merged, second, with_bias
from foveate.heads.moments import Moments
from foveate.layers.head_mapped import HeadMappedAttention
from foveate.models.weights import HeadWeights

_ANNEAL = 0.25
"""Share of the steps after which the layer computes with one head for each group."""
_ASCENT = 0.1
"""Step size of the multipliers, in shares of the first fusion loss. At 20 the constraint wins over what the layer
returns, and the layer ends twice as far off as without training."""
_NOTHING = 1e-9
"""What a layer may miss, fused at once, without there being anything to train."""
_WARM = 8
"""Steps in which learning rates rise; they then fall to 0."""


@dataclass(frozen=True)
class Common:
    """What a group of heads has in common: sum_j take[j] @ head_j, of which head j is nearly give[j] @ that.

    Args:
        heads: the group.
        take, give: [g, D, D].
    """

    heads: list[int]
    take: Tensor
    give: Tensor


def common(
    weights: HeadWeights, moments: Moments, part: str, group: Sequence[int], costs: Tensor, aligned: bool = True
) -> Common:
    """What the key ("k") or value ("v") heads of a group have in common without training (see `surgery.head_merge`).

    Args:
        costs: of errors, for each key or value head: [heads, D] for keys, [heads, Dv, Dv] for values.
    """
    rows = with_bias(getattr(weights, part), getattr(weights, f"{part}_bias"))[list(group)]
    found = merged(rows, second(moments), costs[list(group)], part, weights, aligned)
    take = found.rows @ torch.linalg.pinv(rows.flatten(0, 1), rtol=1e-10)
    return Common(list(group), take.unflatten(1, (len(group), -1)).transpose(0, 1).contiguous(), found.maps)


def key_costs(weights: HeadWeights, moments: Moments) -> Tensor:
    """What an error of each dim of a key head costs the scores of all that read it, [heads, D]."""
    return key_weights(weights, moments).unflatten(0, (-1, weights.groups)).sum(1)


def _wide(x: Tensor) -> Tensor:
    """In float32 at least: what training changes little by little."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class _Shift(nn.Module):
    """A matrix and what training adds to it."""

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros_like(_wide(like)))

    def forward(self, weight: Tensor) -> Tensor:
        return (_wide(weight) + self.shift).to(weight.dtype)


class Fusion(nn.Module):
    """Each head of a projection [heads * D, d] as a combination of its group's heads: head i is sum_j omega[i, j] W_j.

    `omega` starts as the identity, so that nothing is changed. `together`, 0 to 1, says how far each combination has
    moved to what its group's have in common; at 1, without any training, that is what heads merged at once have.

    Args:
        linear: the projection; its weight, and its bias if it has one, are seen through this from now on.
        groups: heads that shall become one.
    """

    def __init__(self, linear: nn.Linear, groups: Sequence[Common]) -> None:
        super().__init__()
        weight = _wide(linear.weight.detach())
        heads, self.dim = sum(len(group.heads) for group in groups), groups[0].take.shape[-1]
        self.linear = [linear]  # in a list, so that it is no part of this module
        self.groups = [Common(g.heads, g.take.to(weight), g.give.to(weight)) for g in groups if len(g.heads) > 1]
        eye = torch.eye(heads, dtype=weight.dtype, device=weight.device)
        self.allowed = eye.clone()
        for group in self.groups:
            for i in group.heads:
                self.allowed[i, group.heads] = 1.0
        self.together = 0.0
        self.omega = nn.Parameter(eye)
        self.shift = nn.Parameter(torch.zeros_like(weight))
        self.energy = float(weight.double().square().sum())
        parametrize.register_parametrization(linear, "weight", self)
        if linear.bias is not None:
            parametrize.register_parametrization(linear, "bias", _Combined(self))

    def combined(self, rows: Tensor) -> Tensor:
        """The combinations of rows [heads * D, ...], each where training left it: [heads, D, ...]."""
        return torch.einsum("ij,jd...->id...", self.omega * self.allowed, rows.unflatten(0, (-1, self.dim)))

    def fused(self, heads: Tensor, together: float) -> Tensor:
        """[heads, D, ...] moved to what groups have in common."""
        out = list(heads.unbind(0))
        for group in self.groups:
            shared = self.shared(heads, group)
            for give, j in zip(group.give, group.heads, strict=True):
                out[j] = torch.lerp(heads[j], torch.einsum("de,e...->d...", give, shared), together)
        return torch.stack(out)

    @staticmethod
    def shared(heads: Tensor, group: Common) -> Tensor:
        """What a group of heads [heads, D, ...] has in common, [D, ...]."""
        return torch.einsum("gde,ge...->d...", group.take, heads[group.heads])

    def forward(self, weight: Tensor) -> Tensor:
        return self.fused(self.combined(_wide(weight) + self.shift), self.together).flatten(0, 1).to(weight.dtype)

    def loss(self) -> Tensor:
        """Square distance of a group's heads from what they have in common, in shares of the heads' energy; 0: heads
        are what one head makes of them."""
        given: Any = self.linear[0].parametrizations
        heads = self.combined(_wide(given.weight.original.detach()) + self.shift)
        return (heads - self.fused(heads, 1.0)).square().sum() / self.energy

    @torch.no_grad()
    def finish(self) -> tuple[Tensor, Tensor | None]:
        """Leave what each group has in common in the place of its heads, and a plain projection.

        Returns:
            In the order of the heads, the weight [heads, D, d] and bias [heads, D] of which `give` makes them: of each
            head of a group the same.
        """
        self.together = 1.0
        linear, found = self.linear[0], []
        given: Any = linear.parametrizations
        for name in ("weight", "bias"):
            if not parametrize.is_parametrized(linear, name):
                found.append(None)
                continue
            rows = _wide(given[name].original)
            heads = self.combined(rows + self.shift if name == "weight" else rows)
            for group in self.groups:
                heads[group.heads] = self.shared(heads, group).expand(len(group.heads), *heads.shape[1:])
            found.append(heads)
        for name in ("weight", "bias"):
            if parametrize.is_parametrized(linear, name):
                parametrize.remove_parametrizations(linear, name, leave_parametrized=True)
        return found[0], found[1]


class _Combined(nn.Module):
    """A bias by the combinations of its weight."""

    def __init__(self, fusion: Fusion) -> None:
        super().__init__()
        self.fusion = [fusion]

    def forward(self, bias: Tensor) -> Tensor:
        fusion = self.fusion[0]
        return fusion.fused(fusion.combined(_wide(bias)), fusion.together).flatten(0, 1).to(bias.dtype)


@dataclass(frozen=True)
class Fused:
    """A layer whose heads were fused.

    Args:
        weights: of the layer with one key and one value head for each group, in the groups' order; what made the heads
            of them is in the queries and the output matrix.
        apart: the fusion loss at the start and at the end, mean of keys and values.
        missed: relative mean square of what the layer does not return of what it returned: without training, fused at
            once, and at the end.
    """

    weights: HeadWeights
    apart: tuple[float, float]
    missed: tuple[float, float]


def fuse(
    layer: HeadMappedAttention,
    old: nn.Module,
    calls: Sequence[Mapping[str, Any]],
    keys: Sequence[Common],
    values: Sequence[Common],
    steps: int,
    lr: float,
    weight_lr: float,
) -> Fused:
    """Fuse the key and value heads of a layer by groups, for good: min over combinations and weights, max over
    multipliers, of L + l1 (L_fus - t) + l2 (L_fus - t)^2, with t annealed to 0. With t each head moves to what its
    group has in common, so that the later steps train the fused layer itself.

    L is the relative square error of what the layer returns. Afterwards the layer computes with fused heads.

    Args:
        layer: has all heads, and the weights of `old`.
        calls: keyword arguments to call both with; one for each step, again from the first after the last.
        keys, values: groups.
        lr: of the combinations. weight_lr: of the four projections.
    """
    calls = list(calls)
    with torch.no_grad():
        wanted = [_wide(old(**call)[0]) for call in calls]
    fusions = [Fusion(layer.k_proj, keys), Fusion(layer.v_proj, values)]
    shifts = [_Shift(linear.weight) for linear in (layer.q_proj, layer.o_proj)]
    for linear, shift in zip((layer.q_proj, layer.o_proj), shifts, strict=True):
        parametrize.register_parametrization(linear, "weight", shift)
    rates = (lr, weight_lr)
    optimizer = torch.optim.Adam(
        [
            {"params": [fusion.omega for fusion in fusions], "lr": lr},
            {"params": [x.shift for x in (*fusions, *shifts)], "lr": weight_lr},
        ],
        betas=(0.9, 0.95),
    )

    def missed(index: int) -> Tensor:
        error = (layer(**calls[index])[0] - wanted[index]).square().sum()
        return error / wanted[index].square().sum().clamp_min(1e-30)

    def over_all() -> float:
        for fusion in fusions:
            fusion.together = 1.0
        with torch.no_grad():
            return sum(float(missed(index)) for index in range(len(calls))) / len(calls)

    before = over_all()
    first = last = sum(float(fusion.loss().detach()) for fusion in fusions) / 2
    linear_weight = square_weight = 0.0
    with torch.enable_grad():
        for step in range(steps if before > _NOTHING else 0):
            share = step / max(1.0, _ANNEAL * steps)
            for fusion in fusions:
                fusion.together = min(1.0, share)
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * min(1.0, (step + 1) / _WARM) * (1 - step / steps)
            apart = torch.stack([fusion.loss() for fusion in fusions]).mean()
            gap = apart - first * max(0.0, 1 - share)
            optimizer.zero_grad()
            (missed(step % len(calls)) + linear_weight * gap + square_weight * gap.square()).backward()
            optimizer.step()
            above = float(gap.detach()) / max(first, 1e-12)
            linear_weight = max(0.0, linear_weight + _ASCENT * above)
            square_weight += _ASCENT * above**2
            last = float(apart.detach())
    after = over_all()
    for linear in (layer.q_proj, layer.o_proj):
        parametrize.remove_parametrizations(linear, "weight", leave_parametrized=True)
    found = [fusion.finish() for fusion in fusions]
    return Fused(_compact(read(layer), keys, values, found), (first, last), (before, after))


def _compact(
    weights: HeadWeights,
    keys: Sequence[Common],
    values: Sequence[Common],
    found: Sequence[tuple[Tensor, Tensor | None]],
) -> HeadWeights:
    """One head for each group, and in queries and output matrix what makes the heads of it."""
    per, changes = weights.groups, {}
    q, o, q_bias = weights.q.clone(), weights.o.clone(), None if weights.q_bias is None else weights.q_bias.clone()
    for part, groups, (rows, bias) in (("k", keys, found[0]), ("v", values, found[1])):
        firsts = [group.heads[0] for group in groups]
        changes[part] = rows[firsts].to(weights.q)
        if bias is not None:
            changes[f"{part}_bias"] = bias[firsts].to(weights.q)
        for group in groups:
            for give, j in zip(group.give.to(weights.q), group.heads, strict=True):
                readers = slice(j * per, (j + 1) * per)
                if len(group.heads) == 1:
                    continue
                if part == "v":
                    o[readers] = o[readers] @ give
                elif weights.k_norm is None:
                    q[readers] = give.T @ q[readers]
                    if q_bias is not None:
                        q_bias[readers] = q_bias[readers] @ give
    return with_changes(weights, q=q, o=o, q_bias=q_bias, **changes)
