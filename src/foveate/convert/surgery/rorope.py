"""Keys of grouped heads as one latent key: lifted, turned so that position gathers in one head, and cut in two.

Source: TransMLA (2502.07864), sections 4.1 and 4.2. All of it is float64 and leaves modules alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.convert.surgery.spectrum import principal
from foveate.errors import BadArgument
from foveate.heads.moments import Moments
from foveate.models.weights import HeadWeights, LatentWeights


@dataclass(frozen=True)
class JointKeys:
    """The keys of all heads as one list of pairs, each turned by one frequency, and how heads read them.

    The key of query head h has the pair l = sum over p of up[h, l, p] * pair p. Where up is 0 between pairs of
    different frequencies this is the original key, turned or not.

    Args:
        heads: the layer as it came.
        rows: [P, 2, d], P = Hk * D / 2: a token x [d] has the pair p = rows[p] @ x + bias[p].
        bias: [P, 2], or None.
        up: [H, D / 2, P].
        frequencies: [P], index of each pair's frequency among the model's D / 2.
    """

    heads: HeadWeights
    rows: Tensor
    bias: Tensor | None
    up: Tensor
    frequencies: Tensor

    def energy(self, inputs: Moments) -> Tensor:
        """Mean square of each pair over the calibration text, [P]."""
        bias = None if self.bias is None else self.bias.flatten()
        return inputs.of(self.rows.flatten(0, 1), bias).diagonal().unflatten(0, (-1, 2)).sum(1)


def lifted(heads: HeadWeights) -> JointKeys:
    """All key heads side by side; up-projections of zeros and ones select each query head's own (section 4.1)."""
    groups, dim, _ = heads.k.shape
    pairs = dim // 2
    # Half-split: the dims l and l + D / 2 of a head are a pair.
    rows = heads.k.unflatten(1, (2, pairs)).transpose(1, 2).flatten(0, 1)
    bias = None if heads.k_bias is None else heads.k_bias.unflatten(1, (2, pairs)).transpose(1, 2).flatten(0, 1)
    up = _selection(heads.groups, groups, pairs, rows)
    return JointKeys(heads, rows, bias, up, torch.arange(pairs, device=rows.device).repeat(groups))


def _selection(share: int, groups: int, dim: int, like: Tensor) -> Tensor:
    """Zeros and ones [H, dim, groups * dim] that give each query head the part of its group."""
    group = torch.eye(groups, dtype=like.dtype, device=like.device).repeat_interleave(share, dim=0)
    same = torch.eye(dim, dtype=like.dtype, device=like.device)
    return (group[:, None, :, None] * same[None, :, None, :]).flatten(2)


def concentrated(keys: JointKeys, inputs: Moments, fold: int = 1, mix: bool = True) -> JointKeys:
    """RoRoPE, and FreqFold with fold > 1: in each block of `fold` neighbouring frequencies, pairs turned into their
    principal components over the calibration text, both dims of a pair alike.

    With fold 1 all pairs of a block have one frequency, and nothing changes: such a turn and a rotation commute. With
    more the m-th component has parts of all the block's frequencies and goes by the (m mod fold)-th.

    Args:
        keys: as `lifted` made them.
        inputs: moments of the layer's input.
        mix: False only sorts the pairs of a block by energy; each keeps its own frequency.

    Returns:
        Pairs by block, within a block by falling energy.
    """
    groups, pairs = keys.heads.k.shape[0], keys.heads.k.shape[1] // 2
    if fold < 1 or pairs % fold:
        raise BadArgument("freqfold", fold, f"give a divisor of the {pairs} frequencies of a head")
    blocks = (
        torch.arange(groups * pairs, device=keys.rows.device)
        .view(groups, pairs // fold, fold)
        .transpose(0, 1)
        .flatten(1)
    )
    rows = keys.rows[blocks]
    bias = None if keys.bias is None else keys.bias[blocks]
    turns = []
    for block in range(len(blocks)):
        parts = [inputs.of(rows[block, :, c], None if bias is None else bias[block, :, c]) for c in (0, 1)]
        second = parts[0] + parts[1]
        if mix:
            turns.append(principal(second).vectors)
        else:
            falling = second.diagonal().argsort(descending=True, stable=True)
            turns.append(torch.eye(len(second), dtype=rows.dtype, device=rows.device)[:, falling])
    turn = torch.stack(turns)
    frequencies = keys.frequencies[blocks]
    frequencies = frequencies[:, :fold].repeat(1, groups) if mix else frequencies.gather(1, turn.argmax(1))
    return JointKeys(
        keys.heads,
        torch.einsum("bpm,bpcd->bmcd", turn, rows).flatten(0, 1),
        None if bias is None else torch.einsum("bpm,bpc->bmc", turn, bias).flatten(0, 1),
        torch.einsum("hlbp,bpm->hlbm", keys.up[:, :, blocks], turn).flatten(2),
        frequencies.flatten(),
    )


def leading(keys: JointKeys, rope_dim: int, fold: int, mix: bool = True) -> tuple[Tensor, Tensor]:
    """Which pairs keep their rotation, [rope_dim / 2], and by which frequencies: every c-th with c = D / rope_dim.

    Each of these frequencies goes to the next component of the block that it lies in, the leading one first.

    Args:
        keys: as `concentrated` made them with this fold and mix; without mix pairs keep the frequency that they have.

    Raises:
        BadArgument: rope_dim does not divide the head size, or neither of fold and c divides the other.
    """
    groups, dim, _ = keys.heads.k.shape
    if rope_dim < 2 or rope_dim % 2 or dim % rope_dim:
        raise BadArgument("rope_dim", rope_dim, f"give an even divisor of the head size {dim}")
    collapse = dim // rope_dim
    if fold % collapse and collapse % fold:
        raise BadArgument("freqfold", fold, f"give a multiple or a divisor of head size / rope_dim = {collapse}")
    grid = torch.arange(0, dim // 2, collapse, device=keys.frequencies.device)
    pairs = grid // fold * (groups * fold) + grid % fold // collapse
    return pairs, grid if mix else keys.frequencies[pairs]


def whole(keys: JointKeys) -> LatentWeights:
    """All pairs rotated, the values as the latent: exactly the layer that it came from.

    The module's queries are [H, Hk * D], its frequencies `keys.frequencies`.
    """
    w = keys.heads
    up = _selection(w.groups, w.v.shape[0], w.v.shape[1], w.v)
    q, q_bias = _turned_queries(keys, torch.arange(len(keys.rows), device=keys.rows.device))
    none = w.v.new_zeros(len(w.q), 0, up.shape[2])
    v_bias = None if w.v_bias is None else w.v_bias.flatten()
    return _latent(w, q, q_bias, w.v.flatten(0, 1), v_bias, keys.rows, keys.bias, none, up)


def divided(keys: JointKeys, kept: Tensor, factor: float = 1.0) -> LatentWeights:
    """The kept pairs rotated, the others without a position in one latent with the values, nothing left out.

    Per head the query without a position is the original one. The latent is [Hk * D - 2 * kept keys | Hk * Dv values].

    Args:
        kept: indices of pairs, in the order of the rotated key.
        factor: what the model's rotary embedding multiplies scores by beside turning (YaRN's attention factor squared),
            which pairs that it no longer reaches need from the queries.
    """
    w = keys.heads
    rest = torch.ones(len(keys.rows), dtype=torch.bool, device=keys.rows.device)
    rest[kept] = False
    heads, pairs, values = len(w.q), keys.up.shape[1], w.v.shape[0] * w.v.shape[1]
    up = keys.up[:, :, rest]
    # Dims of a head's key are half-split, [cosines | sines]; those of the latent's keys are pair by pair.
    both = torch.eye(2, dtype=up.dtype, device=up.device)
    w_uk = torch.einsum("hlp,ce->hclpe", up, both).reshape(heads, 2 * pairs, -1)
    base = whole(keys)
    w_uk = torch.cat([w_uk, w_uk.new_zeros(heads, 2 * pairs, values)], dim=2)
    w_uv = torch.cat([base.w_uv.new_zeros(heads, w.v.shape[1], w_uk.shape[2] - values), base.w_uv], dim=2)
    down = torch.cat([keys.rows[rest].flatten(0, 1), base.w_dkv])
    bias = None
    if keys.bias is not None or base.dkv_bias is not None:
        k_bias = down.new_zeros(len(down) - values) if keys.bias is None else keys.bias[rest].flatten()
        bias = torch.cat([k_bias, down.new_zeros(values) if base.dkv_bias is None else base.dkv_bias])
    q, q_bias = _turned_queries(keys, kept)
    q_nope, q_nope_bias = w.q * factor, None if w.q_bias is None else w.q_bias * factor
    if not rest.any():
        w_uk, q_nope, q_nope_bias = w_uk[:, :0], q_nope[:, :0], None if q_nope_bias is None else q_nope_bias[:, :0]
    q = torch.cat([q_nope, q], dim=1)
    q_bias = None if q_bias is None or q_nope_bias is None else torch.cat([q_nope_bias, q_bias], dim=1)
    kr_bias = None if keys.bias is None else keys.bias[kept]
    return _latent(w, q, q_bias, down, bias, keys.rows[kept], kr_bias, w_uk, w_uv)


def _turned_queries(keys: JointKeys, pairs: Tensor) -> tuple[Tensor, Tensor | None]:
    """Queries [H, 2 * pairs, d] against these pairs, half-split, and their bias."""
    w = keys.heads
    half = w.q.shape[1] // 2
    q = torch.einsum("hlp,hcld->hcpd", keys.up[:, :, pairs], w.q.unflatten(1, (2, half))).flatten(1, 2)
    if w.q_bias is None:
        return q, None
    return q, torch.einsum("hlp,hcl->hcp", keys.up[:, :, pairs], w.q_bias.unflatten(1, (2, half))).flatten(1)


def _latent(
    w: HeadWeights,
    q: Tensor,
    q_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    rope: Tensor,
    rope_bias: Tensor | None,
    w_uk: Tensor,
    w_uv: Tensor,
) -> LatentWeights:
    """Latent attention with these parts, the rotated pairs [P, 2, d] laid out half-split."""
    return LatentWeights(
        q=q,
        q_a=None,
        q_norm=None,
        q_b=None,
        w_dkv=down,
        w_kr=rope.transpose(0, 1).flatten(0, 1),
        kv_norm=None,
        w_uk=w_uk,
        w_uv=w_uv,
        o=w.o,
        q_bias=q_bias,
        q_a_bias=None,
        dkv_bias=down_bias,
        kr_bias=None if rope_bias is None else rope_bias.T.flatten(),
        o_bias=w.o_bias,
        eps=0.0,
        scale=w.scale,
        interleaved=False,
    )
