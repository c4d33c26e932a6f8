"""Which heads of a layer to merge, and how many to leave in each layer: by what merging them costs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from foveate.errors import BadArgument
from foveate.models.converted import decoder_layers


@dataclass(frozen=True)
class Path:
    """How the heads of one layer are merged one pair after the other.

    Args:
        groups: by the number of heads left, the heads that each of them stands for.
        costs: by the number of heads left, what that costs altogether.
    """

    groups: dict[int, list[list[int]]]
    costs: dict[int, float]


def gram(rows: Tensor, s: Tensor) -> Tensor:
    """Inner products over text of all heads' dims, [P, n, m, n, m], of rows [P, n, m, d + 1] (real or complex)."""
    p, n, m, _ = rows.shape
    flat = rows.flatten(1, 2)
    return (flat @ s.to(rows.dtype) @ flat.mH).reshape(p, n, m, n, m)


def key_grams(rows: Tensor, s: Tensor, weights: Tensor, rotary_dim: int) -> list[Tensor]:
    """Of keys [n, D, d + 1] with weights [n, D] of errors: pairs are complex numbers, dims without rotation vectors."""
    half, root = rotary_dim // 2, weights.clamp_min(0).sqrt()[..., None] * rows
    found = []
    if half:
        pairs = torch.complex(root[:, :half], root[:, half:rotary_dim])
        found.append(gram(pairs.transpose(0, 1)[:, :, None], s))
    if rotary_dim < rows.shape[1]:
        found.append(gram(root[None, :, rotary_dim:], s))
    return found


def merge_path(grams: list[Tensor]) -> Path:
    """Merge the two heads (of what is left) whose common part loses least, again and again, until one is left.

    Args:
        grams: [P, n, m, n, m] each (see `gram`), of weighted heads: of two merged heads' 2m dims the m principal ones
            are kept, in each of the P problems by itself.
    """
    count = grams[0].shape[1]
    clusters = {j: [j] for j in range(count)}
    prices = {(a, b): _price(grams, a, b) for a in range(count) for b in range(a)}
    groups, costs = {count: [[j] for j in range(count)]}, {count: 0.0}
    while len(clusters) > 1:
        a, b = min(prices, key=lambda pair: prices[pair])
        lost = prices[a, b]
        grams = [_joined(g, a, b) for g in grams]
        clusters[b] = sorted(clusters[b] + clusters.pop(a))
        prices = {pair: price for pair, price in prices.items() if not {a, b} & set(pair)}
        for other in clusters:
            if other != b:
                pair = (max(other, b), min(other, b))
                prices[pair] = _price(grams, *pair)
        left = len(clusters)
        groups[left] = sorted(clusters.values())
        costs[left] = costs[left + 1] + lost
    return Path(groups, costs)


def mean_path(rows: Tensor, s: Tensor) -> Path:
    """The same for heads [n, x * (d + 1)] whose common part is their mean (Ward's rule)."""
    n, width = len(rows), len(s)
    flat = rows.reshape(n, -1, width)
    inner = torch.einsum("ape,bpe->ab", flat @ s, flat)
    size = inner.diagonal().clamp_min(torch.finfo(inner.dtype).tiny)
    # A norm gives each head the same size; an error is then in shares of what the head weighed.
    inner, weight = inner / size.sqrt()[:, None] / size.sqrt(), float(size.mean())
    clusters = [[j] for j in range(n)]
    groups, costs = {n: clusters}, {n: 0.0}

    def price(a: list[int], b: list[int]) -> float:
        def mean(x: list[int], y: list[int]) -> float:
            return float(inner[x][:, y].mean())

        return weight * len(a) * len(b) / (len(a) + len(b)) * max(0.0, mean(a, a) + mean(b, b) - 2 * mean(a, b))

    while len(clusters) > 1:
        pairs = [(price(a, b), i, j) for i, a in enumerate(clusters) for j, b in enumerate(clusters[:i])]
        lost, i, j = min(pairs)
        clusters = sorted([c for x, c in enumerate(clusters) if x not in (i, j)] + [sorted(clusters[i] + clusters[j])])
        groups[len(clusters)] = clusters
        costs[len(clusters)] = costs[len(clusters) + 1] + lost
    return Path(groups, costs)


def _pair(g: Tensor, a: int, b: int) -> Tensor:
    both = g[:, [a, b]][:, :, :, [a, b]].flatten(3, 4).flatten(1, 2)
    return (both + both.mH) / 2


def _price(grams: list[Tensor], a: int, b: int) -> float:
    return sum(float(torch.linalg.eigvalsh(_pair(g, a, b))[:, : g.shape[2]].clamp_min(0).sum()) for g in grams)


def _joined(g: Tensor, a: int, b: int) -> Tensor:
    """The principal part of a and b in the place of b; a is left as it was and must not be asked for again."""
    m = g.shape[2]
    top = torch.linalg.eigh(_pair(g, a, b)).eigenvectors[..., -m:].mH.unflatten(-1, (2, m))  # [P, m, 2, m]
    g = g.clone()
    g[:, b] = torch.einsum("pisj,psjnk->pink", top, g[:, [a, b]])
    g[:, :, :, b] = torch.einsum("pisj,pnksj->pnki", top.conj(), g[:, :, :, [a, b]])
    return g


def allocate(paths: Mapping[Any, Path], total: int) -> dict[Any, int]:
    """How many heads each path keeps so that they are `total` together, at little cost: again and again the step is
    taken, of one or several merges, that costs least for each head that it saves.

    Raises:
        BadArgument: less than one head for each.
    """
    left = {key: max(path.costs) for key, path in paths.items()}
    if total < len(left):
        raise BadArgument("kv", total, f"{len(left)} heads must stay, one key and one value head in each layer")
    while (over := sum(left.values()) - total) > 0:
        steps = (
            ((path.costs[left[key] - step] - path.costs[left[key]]) / step, order, key, step)
            for order, (key, path) in enumerate(paths.items())
            for step in range(1, min(left[key] - 1, over) + 1)
        )
        _, _, key, step = min(steps, key=lambda found: found[:2])
        left[key] -= step
    return left


def loss_curvature(model: Any, batches: Iterable[Tensor]) -> dict[tuple[int, str], Tensor]:
    """What an error of each key ("k") and value ("v") of a layer costs in loss: the second moment of the loss' gradient
    there, summed over text, [heads, dim, dim], float64. The loss is that of the next token.

    Layers must have `k_proj` and `v_proj`. Parameters' gradients are neither needed nor touched.
    """
    found: dict[tuple[int, str], Tensor] = {}
    handles = []

    def note(key: tuple[int, str], dim: int) -> Any:
        def hook(module: nn.Module, into: Any, out: tuple[Tensor, ...]) -> None:
            g = out[0].flatten(0, -2).unflatten(-1, (-1, dim)).double()
            second = torch.einsum("nhi,nhj->hij", g, g)
            found[key] = found[key] + second if key in found else second

        return hook

    for index, layer in enumerate(decoder_layers(model)):
        module = layer.self_attn
        handles.append(module.k_proj.register_full_backward_hook(note((index, "k"), module.head_dim)))
        handles.append(module.v_proj.register_full_backward_hook(note((index, "v"), module.v_head_dim)))
    wanted = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    embedding = model.get_input_embeddings()
    handles.append(embedding.register_forward_hook(lambda module, args, out: out.detach().requires_grad_()))
    model.requires_grad_(False)
    try:
        with torch.enable_grad():
            for batch in batches:
                ids = batch.to(model.device)
                logits = model(ids, use_cache=False).logits
                loss = nn.functional.cross_entropy(
                    logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum"
                )
                loss.backward()
    finally:
        for handle in handles:
            handle.remove()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(wanted[name])
    return found
