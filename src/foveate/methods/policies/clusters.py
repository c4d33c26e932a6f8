"""Clusters of neighbouring keys whose attention can be estimated from their means."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from foveate.attention import Partial
from foveate.methods.base import Context

ROUNDS = 10
"""Rounds of k-means."""


def key_clusters(k: Tensor, v: Tensor, segment: int, size: int) -> dict[str, Tensor]:
    """k-means of keys [A, D], centred, in each segment of consecutive tokens: `size` keys to a cluster on average.

    The first centroids are keys at equal distances, so nothing is left to chance.

    Returns:
        means: float32 [C, D] mean keys; values: float32 [C, Dv] mean values; sizes: float32 [C]; labels: int32 [A].

    Source: RetroInfer (2505.02922), wave index.
    """
    k, v = k.float(), v.float()
    labels = torch.empty(len(k), dtype=torch.long, device=k.device)
    total = 0
    for start in range(0, len(k), segment):
        part = k[start : start + segment]
        part = part - part.mean(0)
        count = -(-len(part) // size)
        centre = part[torch.arange(count, device=k.device) * len(part) // count]
        label = torch.cdist(part, centre).argmin(1)
        for _ in range(ROUNDS):
            number = torch.bincount(label, minlength=count).unsqueeze(1)
            mean = torch.zeros_like(centre).index_add_(0, label, part) / number.clamp_min(1)
            centre = torch.where(number > 0, mean, centre)
            label = torch.cdist(part, centre).argmin(1)
        labels[start : start + segment] = label + total
        total += count
    sizes = torch.bincount(labels, minlength=total).float()

    def mean_of(x: Tensor) -> Tensor:
        return x.new_zeros(total, x.shape[1]).index_add_(0, labels, x) / sizes.clamp_min(1).unsqueeze(1)

    return {"means": mean_of(k), "values": mean_of(v), "sizes": sizes, "labels": labels.to(torch.int32)}


class Zones(NamedTuple):
    """How each query reads the clusters.

    Args:
        keys: bool [B, H, N, A], keys that are read exactly.
        estimate: what the next best clusters add.
        estimated: how many clusters those are, int64 [B, H, N].
    """

    keys: Tensor
    estimate: Partial
    estimated: Tensor


def zones(q: Tensor, tables: dict[str, Tensor], tokens: int, share: float, ctx: Context) -> Zones:
    """The best clusters of at most `tokens` keys are read; of the next best, of at most `share` of all keys, each
    counts as its mean, as often as it has keys; the others are left out.

    Args:
        q: [B, H, N, D]; tables: of `key_clusters`, [B, Hs, ...].
    """
    batch, heads, queries, _ = q.shape
    means, sizes, labels = tables["means"], tables["sizes"], tables["labels"].long()
    stores = means.shape[1]
    group = heads // stores
    rows = q.reshape(batch, stores, -1, q.shape[-1]).float()
    logits = rows @ means.transpose(-1, -2) * ctx.scale
    if ctx.softcap is not None:
        logits = torch.tanh(logits / ctx.softcap) * ctx.softcap
    number = sizes.clamp_min(0).unsqueeze(2).expand(-1, -1, group * queries, -1)
    logits = logits.masked_fill(number == 0, -torch.inf)
    order = logits.argsort(dim=-1, descending=True, stable=True)
    before = number.gather(-1, order).cumsum(-1)
    exact = before <= tokens
    total = number.sum(-1, keepdim=True)
    guessed = ~exact & (before <= tokens + share * total)
    exact, guessed = (torch.zeros_like(x).scatter(-1, order, x) & (number > 0) for x in (exact, guessed))
    weight = (logits + number.log()).masked_fill(~guessed, -torch.inf)
    lse = weight.logsumexp(-1)
    out = (weight - lse.unsqueeze(-1).nan_to_num(neginf=0.0)).exp() @ tables["values"]
    index = labels.clamp_min(0).unsqueeze(2).expand(-1, -1, group * queries, -1)
    read = exact.gather(-1, index) & (labels >= 0).unsqueeze(2)
    shape = (batch, heads, queries)
    part = Partial(out.reshape(*shape, -1).to(q.dtype), lse.reshape(shape))
    return Zones(read.reshape(*shape, -1), part, guessed.sum(-1).view(shape))
