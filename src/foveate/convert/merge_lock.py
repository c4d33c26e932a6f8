"""MergeLock: move a model far away in weight space without changing what it computes, so that merging it fails."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from foveate.compat import is_latent
from foveate.convert.base import Calibration, Conversion, Stage, register
from foveate.convert.surgery.keyed_matrices import KeyedMatrices
from foveate.errors import BadArgument, Refused
from foveate.layers.mixer import Mixer
from foveate.models.converted import decoder_layers
from foveate.models.rotary_layout import interleaving
from foveate.models.shape import ModelShape
from foveate.models.weights import check_readable, read_heads, read_latent, write_heads, write_latent

if TYPE_CHECKING:
    from transformers import PreTrainedModel

QK, VO = "queries and keys", "values and outputs"


@register
@dataclass(frozen=True)
class MergeLock(Conversion):
    """Per layer and key-value head, keys are multiplied by an invertible matrix and the queries of its group by the
    inverse transposed, so that every score stays; values by another, and the output projection by its inverse (Model
    Unmerging, arXiv 2509.01548).

    Rotation by position stands between queries and keys, so on rotated dims the matrix must commute with every
    rotation: a turn and a scale for each pair of dims. Dims that are not rotated take any matrix, and so do the dims
    without a position of latent attention, whose one rotated key takes turns and scales. Where queries and keys are
    normed (Qwen3, Gemma-3) nothing can be moved past the norm, and values and outputs alone are locked.

    The matrices follow from the seed alone: who knows it can unlock, and models locked with the same seed and condition
    still merge with each other. So `settings`, which is written beside saved models, leaves the seed out.

    Args:
        seed: the key, a number of your own; draw it at random (`secrets.randbits(64)`) and keep it.
        condition: bound on the condition number of the matrices, which is by how much rounding in the model's dtype is
            amplified. The paper's is not published. 1: matrices are orthogonal.
        unlock: undo what the same seed and condition did.
    """

    seed: int | None = None
    condition: float = 4.0
    unlock: bool = False
    id = "mergelock"
    what = "the same function with weights that no longer merge with those of sibling models, undone by its seed"

    def settings(self) -> dict[str, Any]:
        return {name: value for name, value in super().settings().items() if name != "seed"}

    def check(self, model: PreTrainedModel, shape: ModelShape) -> None:
        _check(model, self.seed, self.condition)

    def stages(self, model: PreTrainedModel, calibration: Calibration) -> Iterator[Stage]:
        if self.seed is None:
            raise BadArgument("seed", None, "give a number of your own")
        for branch in _branches(model):
            moved = _turn(model, branch, self.seed, self.condition, self.unlock)
            yield Stage(f"{'unlock' if self.unlock else 'lock'} {branch}", exact=True, facts={"moved": moved})


def merge_lock(model: PreTrainedModel, seed: int, condition: float = 4.0) -> None:
    """Lock a model in place: it computes the same, and merges only with models locked alike. See `MergeLock`.

    Raises:
        Refused: attention that Foveate does not read head by head; nothing is changed.
        BadArgument: a condition below 1.
    """
    _check(model, seed, condition)
    for branch in _branches(model):
        _turn(model, branch, seed, condition, inverse=False)


def unlock(model: PreTrainedModel, seed: int, condition: float = 4.0) -> None:
    """Undo `merge_lock` with the same seed and condition, up to rounding in the model's dtype.

    Another seed is not noticed: it locks the model once more.
    """
    _check(model, seed, condition)
    for branch in _branches(model):
        _turn(model, branch, seed, condition, inverse=True)


def _check(model: Any, seed: int | None, condition: float) -> None:
    if not isinstance(seed, int):
        raise BadArgument("seed", seed, "give a whole number of your own; whoever knows it can unlock the model")
    if not (math.isfinite(condition) and condition >= 1):
        raise BadArgument("condition", condition, "give at least 1, which makes all matrices orthogonal")
    for index, layer in enumerate(decoder_layers(model)):
        module = layer.self_attn
        if isinstance(module, Mixer) and not is_latent(module):
            raise Refused(f"layer {index} was converted to {module.kind}, which mergelock does not lock; lock first")
        check_readable(module)


def _branches(model: Any) -> list[str]:
    normed = any(getattr(layer.self_attn, "q_norm", None) is not None for layer in decoder_layers(model))
    return [VO] if normed else [QK, VO]


def _turn(model: Any, branch: str, seed: int, condition: float, inverse: bool) -> list[float]:
    """Multiply one branch of all layers; how far the weights of each went, as a share of their norm."""
    moved = []
    for index, layer in enumerate(decoder_layers(model)):
        module = layer.self_attn
        draw = KeyedMatrices(f"{seed}/{index}/{branch}", condition, inverse)
        read, write = (read_latent, write_latent) if is_latent(module) else (read_heads, write_heads)
        before, after = read(module), read(module)
        turn = (_latent_qk, _heads_qk, _latent_vo, _heads_vo)[2 * (branch == VO) + (not is_latent(module))]
        turn(after, draw)
        write(module, after)  # pyright: ignore[reportArgumentType]
        pairs = [(x, getattr(before, name)) for name, x in vars(after).items() if isinstance(x, Tensor)]
        changed = [(x, y) for x, y in pairs if not torch.equal(x, y)]
        distance = sum(float((x - y).square().sum()) for x, y in changed)
        moved.append(math.sqrt(distance / max(sum(float(y.square().sum()) for _, y in changed), 1e-300)))
    return moved


def _heads_qk(w: Any, draw: KeyedMatrices) -> None:
    heads, dim = w.k.shape[:2]
    shared = [
        torch.block_diag(draw.turns(f"pairs {h}", w.rotary_dim), draw.invertible(f"rest {h}", dim - w.rotary_dim))
        for h in range(heads)
    ]
    keys = torch.stack(shared).to(w.k)
    queries = torch.linalg.inv(keys).mT.repeat_interleave(w.groups, dim=0)
    w.k, w.k_bias = keys @ w.k, _turned(keys, w.k_bias)
    w.q, w.q_bias = queries @ w.q, _turned(queries, w.q_bias)


def _heads_vo(w: Any, draw: KeyedMatrices) -> None:
    values = torch.stack([draw.invertible(f"{h}", w.v.shape[1]) for h in range(w.v.shape[0])]).to(w.v)
    w.v, w.v_bias = values @ w.v, _turned(values, w.v_bias)
    w.o = w.o @ torch.linalg.inv(values).repeat_interleave(w.groups, dim=0)


def _latent_qk(w: Any, draw: KeyedMatrices) -> None:
    (heads, nope), rope = w.w_uk.shape[:2], w.w_kr.shape[0]
    keys = torch.stack([draw.invertible(f"{h}", nope) for h in range(heads)]).to(w.w_uk)
    key = draw.turns("pairs", rope).to(w.w_kr)
    if w.interleaved:
        order = interleaving(rope).to(key.device)
        key = key[order][:, order]
    w.w_uk = keys @ w.w_uk
    w.w_kr, w.kr_bias = key @ w.w_kr, _turned(key, w.kr_bias)
    both = torch.stack([torch.block_diag(torch.linalg.inv(m).mT, torch.linalg.inv(key).mT) for m in keys])
    if w.q is None:
        w.q_b = both @ w.q_b
    else:
        w.q = both @ w.q
    w.q_bias = _turned(both, w.q_bias)


def _latent_vo(w: Any, draw: KeyedMatrices) -> None:
    values = torch.stack([draw.invertible(f"{h}", w.w_uv.shape[1]) for h in range(w.w_uv.shape[0])]).to(w.w_uv)
    w.w_uv, w.o = values @ w.w_uv, w.o @ torch.linalg.inv(values)


def _turned(matrices: Tensor, bias: Tensor | None) -> Tensor | None:
    return None if bias is None else (matrices @ bias.unsqueeze(-1)).squeeze(-1)
