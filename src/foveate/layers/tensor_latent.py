"""Latent attention cut over ranks: each holds a slice of every latent and serves all heads with it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from foveate.compat import ALL_ATTENTION_FUNCTIONS, LatentProjection
from foveate.errors import BadArgument
from foveate.layers.eager import visible, weigh
from foveate.layers.latent import LatentAttention
from foveate.layers.mixer import mixer
from foveate.layers.rotation import angles, turn

__all__ = [
    "ALL_ATTENTION_FUNCTIONS",
    "TensorLatentAttention",
    "all_reduce",
    "even_parts",
    "normed_slice",
    "shard_output",
]


def all_reduce(parts: Sequence[Tensor]) -> Tensor:
    """The sum over the ranks' partial outputs [B, N, d]: the one collective of a layer."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def even_parts(total: int, shards: int) -> list[slice]:
    """Dims or heads over ranks, as evenly as they go and in order: 9 over 4 are 3, 2, 2 and 2."""
    least, more = divmod(total, shards)
    ends = [rank * least + min(rank, more) for rank in range(shards + 1)]
    return [slice(start, end) for start, end in pairwise(ends)]


def normed_slice(latent: Tensor, rank: int, scale: float, eps: float) -> Tensor:
    """A slice [..., w] of latents of `rank` dims, normed by the energy that the slice lets one expect of the whole.

    The whole's squared norm is taken for `scale` times the slice's (TPLA, eq. 18 to 19).
    """
    wide = latent.double() if latent.dtype == torch.float64 else latent.float()
    energy = wide.square().sum(-1, keepdim=True) * (scale / rank)
    return (wide * torch.rsqrt(energy + eps)).to(latent.dtype)


def shard_output(
    q_nope: Tensor,
    q_rot: Tensor,
    latent: Tensor,
    k_rot: Tensor,
    w_uk: Tensor,
    w_uv: Tensor,
    w_o: Tensor,
    mask: Tensor | None,
    *,
    scaling: float,
    score_scale: float,
    softcap: float | None = None,
) -> Tensor:
    """What one rank adds to the output [B, N, d], from its slice of the latents alone (TPLA, section 4).

    Args:
        q_nope: queries without position [B, H, N, nope_dim]. q_rot: their rotated part [B, H, N, rope_dim].
        latent: the rank's slice of the normed latents [B, M, w].
        k_rot: rotated keys [B, M, rope_dim], which every rank has whole.
        w_uk: [H, nope_dim, w]. w_uv: [H, v_dim, w]. w_o: [d, H * v_dim].
        mask: as `weigh` takes it.
        scaling: of all scores.
        score_scale: of the slice's part of them, beside the rotated part, which is complete.
    """
    batch, heads, queries, _ = q_nope.shape
    moved = torch.einsum("bhnd,hdw->bhnw", q_nope, w_uk).flatten(1, 2) * score_scale
    # The heads' queries side by side, so that what is held is read once for all of them.
    scores = (moved @ latent.mT + q_rot.flatten(1, 2) @ k_rot.mT).view(batch, heads, queries, -1) * scaling
    weights = weigh(scores, mask, softcap).to(latent.dtype)
    read = (weights.flatten(1, 2) @ latent).view(batch, heads, queries, -1)
    values = torch.einsum("bhnw,hvw->bnhv", read, w_uv)
    return functional.linear(values.flatten(2), w_o)


@mixer("tensor-latent")
class TensorLatentAttention(LatentAttention):
    """TPLA (2508.15881) in one process: `LatentAttention` with its latent cut into slices, one for each of some ranks.

    A rank knows its slice of every latent, and the rotated keys whole. With it, it norms, scores and reads for all
    heads, by a softmax of its own; the ranks' outputs are summed. So it holds rank / shards + rope_dim elements per
    token (`rank_elements`) in place of rank + rope_dim. This module goes through the ranks one after the other, and its
    cache holds all slices side by side, once: that is what `holds` states.

    What a slice does not see of a latent's norm and of a score is made up for by two factors per slice, which
    calibration chooses (`convert.tpla`). With one shard, or in a prompt under `separation`, this is `LatentAttention`.

    Args (beside those of `LatentAttention`):
        shards: ranks, at most the latent's rank. What they do not divide is cut as evenly as it goes (`even_parts`).
        separation: prompts are read whole, and only a single new token behind held ones is read from slices
            ("PD separation"). Several new tokens at once, such as a chunk of a prompt, count as prompt. False: all is
            read from slices.
        grouped: each rank serves only its own share of the heads (grouped latent attention, the paper's baseline).
        norm_scale: by slice, the whole latent's squared norm over the slice's; None: the whole's dims over the slice's.
        score_scale: by slice, what its products of query and latent are multiplied by; None: 1.
    """

    def __init__(
        self,
        config: Any,
        layer_idx: int,
        *,
        shards: int = 1,
        separation: bool = True,
        grouped: bool = False,
        norm_scale: Sequence[float] | None = None,
        score_scale: Sequence[float] | None = None,
        **numbers: Any,
    ) -> None:
        super().__init__(config, layer_idx, **numbers)
        rank, heads = self.kv_lora_rank, self.num_heads
        if not 1 <= shards <= rank:
            raise BadArgument("shards", shards, f"give 1 to {rank}, the latent's rank")
        if grouped and shards > heads:
            raise BadArgument("shards", shards, f"grouped, each needs a head of its own; give 1 to {heads}")
        for name, given in (("norm_scale", norm_scale), ("score_scale", score_scale)):
            if given is not None and len(given) != shards:
                raise BadArgument(name, list(given), f"give one number for each of the {shards} shards")
        self.shards, self.separation, self.grouped = shards, separation, grouped
        even = [rank / (part.stop - part.start) for part in even_parts(rank, shards)]
        self.norm_scale = even if norm_scale is None else [float(x) for x in norm_scale]
        self.score_scale = [1.0] * shards if score_scale is None else [float(x) for x in score_scale]

    @property
    def spec(self) -> dict[str, Any]:
        return super().spec | {
            "shards": self.shards,
            "separation": self.separation,
            "grouped": self.grouped,
            "norm_scale": self.norm_scale,
            "score_scale": self.score_scale,
        }

    @property
    def holds(self) -> dict[str, Any]:
        # Sliced scores are not those of any keys that a method could choose among.
        return super().holds | ({} if self.shards == 1 else {"kind": "other"})

    @property
    def rank_elements(self) -> int:
        """Elements that a rank holds per token, the one with the most: its slice and the whole rotated key."""
        return -(-self.kv_lora_rank // self.shards) + self.qk_rope_head_dim

    def slice_of(self, rank: int) -> slice:
        """The dims of the latent that a rank holds."""
        return even_parts(self.kv_lora_rank, self.shards)[rank]

    def heads_of(self, rank: int) -> slice:
        """The query heads that a rank serves."""
        return even_parts(self.num_heads, self.shards)[rank] if self.grouped else slice(0, self.num_heads)

    def project(self, hidden_states: Tensor, position_embeddings: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries without position [B, H, N, nope_dim] and rotated [B, H, N, rope_dim], latents not yet normed
        [B, 1, N, rank], rotated keys [B, 1, N, rope_dim]."""
        rope = self.qk_rope_head_dim
        cos, sin = angles(position_embeddings, self.frequencies, rope // 2)
        q_nope, q_rot = self.queries(hidden_states).split([self.qk_nope_head_dim, rope], dim=-1)
        latent, k_rot = self.kv_a_proj_with_mqa(hidden_states).unsqueeze(1).split([self.kv_lora_rank, rope], dim=-1)
        return q_nope, turn(q_rot, cos, sin, self.interleaved), latent, turn(k_rot, cos, sin, self.interleaved)

    def normed(self, latent: Tensor) -> Tensor:
        """Latents [B, 1, N, rank] as the ranks norm them, each its own slice; without a norm, as they are."""
        if self.norm == "none":
            return latent
        norm: Any = self.kv_a_layernorm
        slices = [
            normed_slice(latent[..., self.slice_of(rank)], self.kv_lora_rank, scale, norm.eps)
            for rank, scale in enumerate(self.norm_scale)
        ]
        # Once folded, the gain is 1; before that, each dim has its own.
        return torch.cat(slices, dim=-1) * norm.weight

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Any = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        past = 0 if past_key_values is None else int(past_key_values.get_seq_length(self.layer_idx))
        step = hidden_states.shape[1] == 1 and past > 0
        if self.shards == 1 or (self.separation and not step):
            return super().forward(hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs)
        q_nope, q_rot, latent, k_rot = self.project(hidden_states, position_embeddings)
        latent = self.normed(latent)
        if past_key_values is not None:
            latent, k_rot = past_key_values.update(latent, k_rot, self.layer_idx)
        mask = self._seen(attention_mask, hidden_states.shape[1], latent.shape[2], past, latent.device)
        return self.sliced(q_nope, q_rot, latent, k_rot, mask), None

    def sliced(self, q_nope: Tensor, q_rot: Tensor, latent: Tensor, k_rot: Tensor, mask: Tensor | None) -> Tensor:
        """The layer's output [B, N, d] from normed latents [B, 1, M, rank] read in slices, rank by rank."""
        w_uk, w_uv = LatentProjection(self).weights(q_nope)
        w_o = self.o_proj.weight.unflatten(1, (self.num_heads, self.v_head_dim))
        parts = []
        for rank, score_scale in enumerate(self.score_scale):
            part, heads = self.slice_of(rank), self.heads_of(rank)
            parts.append(
                shard_output(
                    q_nope[:, heads],
                    q_rot[:, heads],
                    latent[:, 0, :, part],
                    k_rot[:, 0],
                    w_uk[heads, :, part],
                    w_uv[heads, :, part],
                    w_o[:, heads].flatten(1),
                    mask,
                    scaling=self.scaling,
                    score_scale=score_scale,
                    softcap=self.softcap,
                )
            )
        out = all_reduce(parts)
        return out if self.o_proj.bias is None else out + self.o_proj.bias

    def _seen(self, mask: Tensor | None, queries: int, keys: int, past: int, device: torch.device) -> Tensor | None:
        if mask is None and queries > 1 and past:
            # Foveate's own mask function leaves the causality of chunks to who attends.
            return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)[None, None]
        return visible(mask, queries, keys, device, self.sliding_window)
