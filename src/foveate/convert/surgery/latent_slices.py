"""Slices of a latent: bases in which they are cut, and factors that make up for what a slice does not see."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor

from foveate.compat import LatentProjection
from foveate.convert.base import Calibration
from foveate.errors import BadArgument
from foveate.layers.eager import visible, weigh
from foveate.layers.tensor_latent import TensorLatentAttention, even_parts

SCALES = ("none", "variance", "least-squares")
"""Ways to choose the factors of the slices."""

BASES = ("pca", "hadamard", "identity")


def hadamard(width: int, seed: int = 0) -> Tensor:
    """A random orthogonal matrix [width, width], float64, that spreads every vector's energy over all dims.

    A Hadamard matrix of the largest power of two in `width`, times cosines for the odd rest, the signs of its rows
    drawn. Where the width is a power of two, all entries are +-1 / sqrt(width).
    """
    power = width & -width
    rest = width // power
    flat = torch.ones(1, 1, dtype=torch.float64)
    while flat.shape[0] < power:
        flat = torch.cat([torch.cat([flat, flat], 1), torch.cat([flat, -flat], 1)]) / math.sqrt(2)
    index = torch.arange(rest, dtype=torch.float64)
    cosines = torch.cos(math.pi * index[:, None] * (index + 0.5) / rest) * math.sqrt(2 / rest)
    cosines[0] /= math.sqrt(2)
    signs = torch.randint(0, 2, (width, 1), generator=torch.Generator().manual_seed(seed)).double() * 2 - 1
    return signs * torch.kron(flat, cosines)


def basis(name: str, second: Tensor, seed: int = 0) -> Tensor:
    """The orthogonal matrix U [r, r], float64, of this name; a latent c becomes c U.

    Args:
        name: "pca": eigenvectors of the second moment [r, r], those with the most energy first; "hadamard"; "identity".

    Raises:
        BadArgument: an unknown name.
    """
    if name == "pca":
        return torch.linalg.eigh(second.double())[1].flip(1)
    if name == "hadamard":
        return hadamard(second.shape[0], seed).to(second.device)
    if name == "identity":
        return torch.eye(second.shape[0], dtype=torch.float64, device=second.device)
    raise BadArgument("basis", name, f"give one of {', '.join(BASES)}")


class Slices:
    """Sums over calibration tokens from which the factors of the slices follow.

    Args:
        rank: dims of the latents.
        shards: slices that they are cut into, as evenly as they go.
    """

    def __init__(self, rank: int, shards: int) -> None:
        self.parts = even_parts(rank, shards)
        self.tokens = 0
        zeros = torch.zeros(shards, dtype=torch.float64)
        self._energy, self._fraction, self._root = zeros.clone(), zeros.clone(), zeros.clone()
        self._cross, self._spread = zeros.clone(), zeros.clone()

    def add_latents(self, latents: Tensor) -> None:
        """Count latents [..., r], normed or not."""
        square = latents.double().square().flatten(0, -2)
        energy = torch.stack([square[:, part].sum(-1) for part in self.parts], dim=-1).cpu()
        fraction = energy / energy.sum(-1, keepdim=True).clamp_min(1e-300)
        self.tokens += energy.shape[0]
        self._energy += energy.sum(0)
        self._fraction += fraction.sum(0)
        self._root += fraction.sqrt().sum(0)

    def add_scores(self, q: Tensor, k: Tensor, weights: Tensor, heads: Sequence[slice]) -> None:
        """Count what each slice's products of query and latent say of the whole ones, where attention looks.

        Args:
            q: absorbed queries [B, H, N, r].
            k: normed latents [B, M, r].
            weights: attention of the layer that is not sliced [B, H, N, M].
            heads: by slice, the query heads that read it.
        """
        whole = torch.einsum("bhnr,bmr->bhnm", q, k)
        for index, (part, rows) in enumerate(zip(self.parts, heads, strict=True)):
            p, x = weights[:, rows], whole[:, rows]
            y = torch.einsum("bhnr,bmr->bhnm", q[:, rows, :, part], k[..., part])
            # Softmax forgets what all scores of a row have in common, so both are taken around their mean under p.
            x = x - (p * x).sum(-1, keepdim=True)
            y = y - (p * y).sum(-1, keepdim=True)
            self._cross[index] += float((p * x * y).sum(dtype=torch.float64))
            self._spread[index] += float((p * y * y).sum(dtype=torch.float64))

    @property
    def shares(self) -> list[float]:
        """Of the latents' energy, what each slice holds; sums to 1."""
        return (self._energy / self._energy.sum()).tolist()

    def norm_scale(self, how: str) -> list[float]:
        """By slice, alpha: alpha times the slice's squared norm stands for the whole latent's.

        "none": as if energy were spread evenly; "variance": one over the slice's mean share of a latent's energy;
        "least-squares": the factor with which the normed slices come closest to the true ones, token by token. Of a
        latent c with slice s these are a^-1/2 s / |s| and s / |c|, in the same direction, so a^-1/2 = mean |s| / |c|.
        """
        if how == "none":
            rank = self.parts[-1].stop
            return [rank / (part.stop - part.start) for part in self.parts]
        if how == "variance":
            return (self.tokens / self._fraction.clamp_min(1e-12 * self.tokens)).tolist()
        if how == "least-squares":
            return (self.tokens / self._root.clamp_min(1e-12 * self.tokens)).square().tolist()
        raise BadArgument("norm_scale", how, f"give one of {', '.join(SCALES)}")

    def score_scale(self, how: str) -> list[float]:
        """By slice, mu: mu times the slice's product of query and latent stands for the whole one.

        "none": 1; "variance": one over the slice's share of all energy; "least-squares": regression of the whole
        products on the slice's, weighted by the attention that they make: to second order the least divergence of the
        slice's attention from it.
        """
        if how == "none":
            return [1.0] * len(self.parts)
        if how == "variance":
            return (self._energy.sum() / self._energy.clamp_min(1e-300)).tolist()
        if how == "least-squares":
            return torch.where(self._spread > 0, self._cross / self._spread.clamp_min(1e-300), 1.0).tolist()
        raise BadArgument("score_scale", how, f"give one of {', '.join(SCALES)}")


@torch.no_grad()
def choose(
    model: Any, layers: Mapping[int, TensorLatentAttention], calibration: Calibration, norm_scale: str, score_scale: str
) -> dict[str, Any]:
    """Choose and set the factors of all layers, by the error that they leave in each layer's output.

    Args:
        layers: sliced, and reading prompts whole (`separation`), so that what they read is the model's as it was.
        norm_scale, score_scale: one of `SCALES`, or "auto": the best of them.

    Returns:
        By layer: the "energy" of each slice, the ways chosen as "norm_scale" and "score_scale", and as "output_error"
        the relative RMS error of the layer's output where every token is read from slices.
    """
    sums = {index: Slices(module.kv_lora_rank, module.shards) for index, module in layers.items()}

    def count(index: int, module: TensorLatentAttention, x: Tensor, out: Tensor, given: dict[str, Any]) -> None:
        q_nope, q_rot, latent, k_rot = module.project(x, given["position_embeddings"])
        latent = module.kv_a_layernorm(latent)
        sums[index].add_latents(latent)
        w_uk, _ = LatentProjection(module).weights(x)
        q = torch.einsum("bhnd,hdr->bhnr", q_nope, w_uk)
        scores = (q @ latent.mT + q_rot @ k_rot.mT) * module.scaling
        weights = weigh(scores, _mask(module, x, given), module.softcap).to(q.dtype)
        sums[index].add_scores(q, latent[:, 0], weights, [module.heads_of(rank) for rank in range(module.shards)])

    calibration.watch("measuring slices")
    _read(model, layers, calibration, count)
    tried = {index: _factors(module, sums[index], norm_scale, score_scale) for index, module in layers.items()}
    errors = {index: dict.fromkeys(factors, 0.0) for index, factors in tried.items()}
    sizes = dict.fromkeys(tried, 0.0)

    def measure(index: int, module: TensorLatentAttention, x: Tensor, out: Tensor, given: dict[str, Any]) -> None:
        q_nope, q_rot, latent, k_rot = module.project(x, given["position_embeddings"])
        mask = _mask(module, x, given)
        sizes[index] += float(out.double().square().sum())
        for key, (module.norm_scale, module.score_scale) in tried[index].items():
            sliced = module.sliced(q_nope, q_rot, module.normed(latent), k_rot, mask)
            errors[index][key] += float((sliced - out).double().square().sum())

    calibration.watch("choosing the factors")
    _read(model, layers, calibration, measure)
    best = {index: min(found, key=found.__getitem__) for index, found in errors.items()}
    for index, module in layers.items():
        module.norm_scale, module.score_scale = tried[index][best[index]]
    return {
        "energy": [one.shares for one in sums.values()],
        "norm_scale": [how for how, _ in best.values()],
        "score_scale": [how for _, how in best.values()],
        "output_error": [(errors[index][key] / sizes[index]) ** 0.5 for index, key in best.items()],
    }


def _factors(
    module: TensorLatentAttention, sums: Slices, norm_scale: str, score_scale: str
) -> dict[tuple[str, str], tuple[list[float], list[float]]]:
    """What is tried in one layer: by the two ways, the factors."""
    norm = SCALES if norm_scale == "auto" else (norm_scale,)
    if module.norm == "none":
        norm = ("none",)
    score = SCALES if score_scale == "auto" else (score_scale,)
    return {(a, b): (sums.norm_scale(a), sums.score_scale(b)) for a, b in product(norm, score)}


def _read(
    model: Any, layers: Mapping[int, TensorLatentAttention], calibration: Calibration, see: Callable[..., None]
) -> None:
    """Show `see` what each layer is given and returns while the model reads the text."""

    def hook(index: int) -> Callable[..., None]:
        return lambda module, args, given, out: see(index, module, given["hidden_states"], out[0], given)

    handles = [layer.register_forward_hook(hook(index), with_kwargs=True) for index, layer in layers.items()]
    try:
        model.eval()
        for batch in calibration.batches():
            model(batch.to(model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()


def _mask(module: TensorLatentAttention, x: Tensor, given: dict[str, Any]) -> Tensor | None:
    return visible(given.get("attention_mask"), x.shape[1], x.shape[1], x.device, module.sliding_window)
