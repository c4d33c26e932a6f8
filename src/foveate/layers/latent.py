"""Multi-head latent attention: one low-rank latent and one rotated key per token, shared by all heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from foveate.attention import Geometry, Partial, attend, merge
from foveate.compat import ALL_ATTENTION_FUNCTIONS, KEYWORD, NAME, LatentProjection
from foveate.errors import BadArgument
from foveate.layers.eager import eager, visible, weigh
from foveate.layers.mixer import Mixer, mixer
from foveate.layers.rotation import angles, evenly, turn

MODES = ("auto", "naive", "absorbed", "chunked")
BIASED = ("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj")


@mixer("latent")
class LatentAttention(Mixer):
    """MLA (DeepSeek-V2, section 2.1; DeepSeek-V3, section 2.1.1), its weights named as in transformers' DeepSeek-V3.

    A token is held as a latent [rank], normed, and a rotated key [rope_dim], whatever the number of heads. Per head the
    latent gives a key without position [nope_dim] and a value [v_dim]; scores are taken over nope_dim + rope_dim dims.

    The same weights can be read in three ways, `mode`, which agree up to rounding: "naive" expands all heads' keys and
    values; "absorbed" moves the queries into latent space and attends to what is held, without expanding it;
    "chunked" expands `chunk` held tokens at a time and merges by log-sum-exp. "auto" takes the one that costs least:
    naive for a prompt, absorbed for few new tokens behind held ones, chunked for many new ones behind a long prefix.
    Foveate's engine reads its own store and is handed expanded new tokens, as by any DeepSeek model; so is every
    attention implementation of transformers that reads no mask (flash, flex).

    Args:
        num_heads: query heads, H.
        rank: of the latent, r.
        rope_dim, nope_dim, v_dim: per head; nope_dim may be 0.
        q_rank: rank of the queries' own down-projection; None: one matrix.
        norm: "rms" norms the latents (1e-6 under the root); "none" leaves them.
        frequencies: which of the model's rotary frequencies turn the rope_dim / 2 pairs, with repetitions; None: every
            (F / pairs)-th of its F.
        interleaved: pairs are neighbours in the rows of the weights, as in DeepSeek's checkpoints, not half-split.
        scale: of scores; None: (nope_dim + rope_dim) ** -0.5.
        softcap: what scores are capped at.
        window: keys that a query sees, its own included; masks come with it where the model makes them.
        biases: projections that have a bias, of `BIASED`.
    """

    mode: Literal["auto", "naive", "absorbed", "chunked"] = "auto"
    chunk: int = 2048
    """Held tokens that the chunked form expands at a time."""

    def __init__(
        self,
        config: Any,
        layer_idx: int,
        *,
        num_heads: int,
        rank: int,
        rope_dim: int,
        nope_dim: int,
        v_dim: int,
        q_rank: int | None = None,
        norm: str = "rms",
        frequencies: Sequence[int] | None = None,
        interleaved: bool = False,
        scale: float | None = None,
        softcap: float | None = None,
        window: int | None = None,
        biases: Sequence[str] = (),
    ) -> None:
        super().__init__(config, layer_idx)
        for name, value, least in (
            ("num_heads", num_heads, 1),
            ("rank", rank, 1),
            ("rope_dim", rope_dim, 2),
            ("nope_dim", nope_dim, 0),
            ("v_dim", v_dim, 1),
        ):
            if value < least:
                raise BadArgument(name, value, f"give at least {least}")
        if rope_dim % 2:
            raise BadArgument("rope_dim", rope_dim, "dims turn in pairs: give an even number")
        if frequencies is not None and len(frequencies) != rope_dim // 2:
            raise BadArgument("frequencies", list(frequencies), f"rope_dim={rope_dim} has {rope_dim // 2} pairs")
        if norm not in ("rms", "none"):
            raise BadArgument("norm", norm, 'give "rms" or "none"')
        there = {"kv_a_proj_with_mqa", "o_proj"} | ({"q_proj"} if q_rank is None else {"q_a_proj", "q_b_proj"})
        if set(biases) - there:
            raise BadArgument("biases", list(biases), f"give some of {', '.join(n for n in BIASED if n in there)}")
        self.num_heads, self.kv_lora_rank, self.q_lora_rank = num_heads, rank, q_rank
        self.qk_rope_head_dim, self.qk_nope_head_dim, self.v_head_dim = rope_dim, nope_dim, v_dim
        self.qk_head_dim = nope_dim + rope_dim
        self.norm, self.interleaved, self.biases = norm, interleaved, tuple(n for n in BIASED if n in biases)
        self.frequencies = None if frequencies is None else [int(index) for index in frequencies]
        self.scale, self.softcap, self.sliding_window = scale, softcap, window
        self.scaling = self.qk_head_dim**-0.5 if scale is None else scale
        self.attention_dropout = getattr(config, "attention_dropout", 0.0) or 0.0
        self.num_key_value_groups = 1
        self.is_causal = True

        width, heads = config.hidden_size, num_heads * self.qk_head_dim
        if q_rank is None:
            self.q_proj = nn.Linear(width, heads, bias="q_proj" in biases)
        else:
            self.q_a_proj = nn.Linear(width, q_rank, bias="q_a_proj" in biases)
            self.q_a_layernorm = _norm(norm, q_rank)
            self.q_b_proj = nn.Linear(q_rank, heads, bias="q_b_proj" in biases)
        self.kv_a_proj_with_mqa = nn.Linear(width, rank + rope_dim, bias="kv_a_proj_with_mqa" in biases)
        self.kv_a_layernorm = _norm(norm, rank)
        self.kv_b_proj = nn.Linear(rank, num_heads * (nope_dim + v_dim), bias=False)
        self.o_proj = nn.Linear(num_heads * v_dim, width, bias="o_proj" in biases)

    @property
    def spec(self) -> dict[str, Any]:
        return {
            "num_heads": self.num_heads,
            "rank": self.kv_lora_rank,
            "rope_dim": self.qk_rope_head_dim,
            "nope_dim": self.qk_nope_head_dim,
            "v_dim": self.v_head_dim,
            "q_rank": self.q_lora_rank,
            "norm": self.norm,
            "frequencies": self.frequencies,
            "interleaved": self.interleaved,
            "scale": self.scale,
            "softcap": self.softcap,
            "window": self.sliding_window,
            "biases": list(self.biases),
        }

    @property
    def holds(self) -> dict[str, Any]:
        return {
            "kind": "full" if self.sliding_window is None else "sliding",
            "num_heads": self.num_heads,
            "num_kv_heads": self.num_heads,
            "head_dim": self.qk_head_dim,
            "v_head_dim": self.v_head_dim,
            "window": self.sliding_window,
            "latent": True,
            "latent_dim": self.kv_lora_rank,
            "store_heads": 1,
            "store_k_dim": self.kv_lora_rank + self.qk_rope_head_dim,
            "store_v_dim": 0,
        }

    def frequency_indices(self, base: int) -> list[int]:
        """Which of the model's `base` rotary frequencies turn each pair."""
        return evenly(self.qk_rope_head_dim // 2, base) if self.frequencies is None else self.frequencies

    def queries(self, hidden_states: Tensor) -> Tensor:
        """Not yet rotated, [B, H, N, nope_dim + rope_dim]."""
        if self.q_lora_rank is None:
            q = self.q_proj(hidden_states)
        else:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden_states)))
        return q.view(*hidden_states.shape[:-1], self.num_heads, self.qk_head_dim).transpose(1, 2)

    def expand_kv(self, kv_nope: Tensor, k_rot: Tensor) -> tuple[Tensor, Tensor]:
        """Held latents [B, 1, M, r] and rotated keys [B, 1, M, rope_dim] -> keys [B, H, M, nope_dim + rope_dim] and
        values [B, H, M, v_dim]."""
        batch, _, keys, _ = kv_nope.shape
        wide = self.kv_b_proj(kv_nope).view(batch, keys, self.num_heads, -1).transpose(1, 2)
        k_nope, value = wide.split([self.qk_nope_head_dim, self.v_head_dim], dim=-1)
        return torch.cat([k_nope, k_rot.expand(-1, self.num_heads, -1, -1)], dim=-1), value

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Any = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        query = self.queries(hidden_states)
        held = self.kv_a_proj_with_mqa(hidden_states).unsqueeze(1)
        latent, k_rot = held.split([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
        latent = self.kv_a_layernorm(latent)
        cos, sin = angles(position_embeddings, self.frequencies, self.qk_rope_head_dim // 2)
        q_nope, q_rot = query.split([self.qk_nope_head_dim, self.qk_rope_head_dim], dim=-1)
        query = torch.cat([q_nope, turn(q_rot, cos, sin, self.interleaved)], dim=-1)
        k_rot = turn(k_rot, cos, sin, self.interleaved)
        if past_key_values is not None:
            latent, k_rot = past_key_values.update(latent, k_rot, self.layer_idx)

        mode = self._mode(query.shape[2], latent.shape[2], kwargs.get(KEYWORD))
        if mode == "naive":
            out = self._naive(query, latent, k_rot, attention_mask, kwargs)
        else:
            mask = visible(attention_mask, query.shape[2], latent.shape[2], query.device, self.sliding_window)
            read = self._absorbed if mode == "absorbed" else self._chunked
            out = read(query, latent, k_rot, mask).transpose(1, 2)
        return self.o_proj(out.reshape(*hidden_states.shape[:-1], -1)), None

    def _mode(self, queries: int, keys: int, call: Any) -> str:
        if self.mode not in MODES:
            raise BadArgument("mode", self.mode, f"give one of {', '.join(MODES)}")
        if call is not None or self.config._attn_implementation not in ("eager", "sdpa", NAME):
            return "naive"
        if self.mode != "auto":
            return self.mode
        if queries == keys:
            return "naive"
        # Multiplications for each held token and head: expanding it and reading it with every query, or reading the
        # latent with every query.
        wide, rank = self.qk_nope_head_dim + self.v_head_dim, self.kv_lora_rank
        if 2 * rank * queries <= wide * (rank + queries):
            return "absorbed"
        return "chunked" if keys - queries > self.chunk else "naive"

    def _naive(self, query: Tensor, latent: Tensor, k_rot: Tensor, mask: Tensor | None, kwargs: dict[str, Any]):
        key, value = self.expand_kv(latent, k_rot)
        name = self.config._attn_implementation
        run = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)
        if self.softcap is not None:
            kwargs = {**kwargs, "softcap": self.softcap}
            run = eager if name == "sdpa" or (name == NAME and kwargs.get(KEYWORD) is None) else run
        dropout = self.attention_dropout if self.training else 0.0
        return run(
            self,
            query,
            key,
            value,
            mask,
            dropout=dropout,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )[0]

    def _absorbed(self, query: Tensor, latent: Tensor, k_rot: Tensor, mask: Tensor | None) -> Tensor:
        projection = LatentProjection(self)
        batch, heads, queries, _ = query.shape
        moved, turned = projection.absorb(query).flatten(1, 2).split([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
        # The heads' queries side by side, so that what is held is read once for all of them.
        scores = moved @ latent[:, 0].mT + turned @ k_rot[:, 0].mT
        scores = scores.view(batch, heads, queries, -1) * self.scaling
        weights = weigh(scores, mask, self.softcap).to(latent.dtype)
        out = (weights.flatten(1, 2) @ latent[:, 0]).view(batch, heads, queries, -1)
        return projection.values(out)

    def _chunked(self, query: Tensor, latent: Tensor, k_rot: Tensor, mask: Tensor | None) -> Tensor:
        batch, _, queries, _ = query.shape
        bias = mask
        if mask is not None and mask.dtype == torch.bool:
            # Finite, because a chunk that a query sees nothing of would have gradients of -inf.
            least = torch.finfo(query.dtype).min / 2
            bias = torch.zeros(mask.shape, dtype=query.dtype, device=mask.device).masked_fill(~mask, least)
        parts: list[Partial] = []
        for start in range(0, latent.shape[2], self.chunk):
            piece = slice(start, start + self.chunk)
            key, value = self.expand_kv(latent[:, :, piece], k_rot[:, :, piece])
            count = key.shape[2]
            # All queries behind all keys of the chunk: what is hidden from them the mask says.
            behind = Geometry(
                batch, queries, count, first=torch.full((1, 1), count, device=query.device), device=query.device
            )
            seen = None if bias is None else bias[..., piece]
            parts.append(
                attend(query, key, value, geometry=behind, scale=self.scaling, bias=seen, softcap=self.softcap)
            )
        return merge(parts).out


def _norm(kind: str, dim: int) -> nn.Module:
    return nn.RMSNorm(dim, eps=1e-6) if kind == "rms" else nn.Identity()


def latent_spec(module: Any) -> dict[str, Any]:
    """The spec of a `LatentAttention` that takes a DeepSeek module's weights as they are."""
    there = [name for name in BIASED if getattr(getattr(module, name, None), "bias", None) is not None]
    return {
        "num_heads": module.num_heads,
        "rank": module.kv_lora_rank,
        "rope_dim": module.qk_rope_head_dim,
        "nope_dim": module.qk_nope_head_dim,
        "v_dim": module.v_head_dim,
        "q_rank": module.q_lora_rank,
        # DeepSeek-V2 in transformers has no such option: its pairs are neighbours.
        "interleaved": bool(getattr(module.config, "rope_interleave", True)),
        "scale": float(module.scaling),
        "biases": there,
    }
