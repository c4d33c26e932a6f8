"""Softmax attention whose query heads read key and value heads by any maps: one layer for all ways of sharing heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from foveate.attention import Span, attend
from foveate.attention.request import grouped
from foveate.compat import ALL_ATTENTION_FUNCTIONS, four_d
from foveate.errors import BadArgument, Refused
from foveate.layers.eager import eager
from foveate.layers.mixer import Mixer, mixer
from foveate.layers.rotation import angles, evenly, frequency_table, turn

BIASED = ("q_proj", "k_proj", "v_proj", "o_proj")
_WITHOUT_WINDOWS = ("eager", "sdpa")
"""Transformers' functions that see a window only in the mask."""


class HeadNorm(nn.Module):
    """The RMS norm over each head's dims, with one gain per dim; in float32, as transformers computes it."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


@mixer("head-mapped")
class HeadMappedAttention(Mixer):
    """Attention with numbers of query, key and value heads that do not depend on each other.

    Query head h scores against key head `key_map[h]` and reads value head `value_map[h]`. MHA, GQA, MQA, SQA (arXiv
    2510.01817), DiffQKV (2501.13629), DHA (2406.06567) and key-driven GQA (2408.08454) are this layer with other maps.
    A token is cached as num_k_heads * head_dim + num_v_heads * v_head_dim numbers. With as many key as value heads and
    the usual contiguous groups it goes through transformers' attention functions and Foveate's methods manage its
    cache; otherwise it attends by itself, and its keys and values are held, each with its own heads, by transformers'
    cache. So are keys that are expanded (`k_dim`) and values of which a step reads some (`top_values`).

    Args:
        num_heads: heads that scores are computed for, H.
        num_k_heads, num_v_heads: heads that are cached.
        head_dim: of queries and keys.
        v_head_dim: of values; None: head_dim.
        k_dim: numbers that are cached of each key, without position; whenever keys are read, a matrix per key head
            (`k_up`) makes head_dim of them, which are normed and rotated then ("half K dim", DiffQKV section 2.1).
            Tokens count as standing side by side: position ids with gaps are not seen. None: keys are cached as they
            are read.
        key_map, value_map: for each of the H heads the key and value head that it reads; None: floor(h * n / H).
        num_q_heads, query_map: heads that are projected, and the one that each of the H heads takes; None: its own.
            With fewer of them than key heads, query heads are shared (reverse SQA).
        rotary_dim: dims of a head that are rotated, its first ones, in half-split pairs; None: all. Fewer than the
            model's rotary embedding turns take every (F / pairs)-th of its F frequencies.
        scale: of scores; None: head_dim ** -0.5.
        softcap: what scores are capped at.
        window: keys that a query sees, its own included.
        query_width: width between two matrices that make the queries (augmented Q, DiffQKV section 2.1); None: one.
        top_values: a single new token reads, for each query head, the values of this many keys alone, those of the
            highest scores; its weights are a softmax over them (DiffQKV: 100). All keys are read. None: all values.
        norm_eps: queries and keys have an RMS norm with this under the root; None: no norm.
        noise: in training, heads' outputs lose noise of their own mean and spread, times this (PGQA, 2408.08454). Not
            in evaluation, where mean and spread of a whole text would tell a token of its future.
        biases: projections that have a bias, of `BIASED`; the queries' is behind the second of two matrices.

    Raises:
        BadArgument: numbers or maps that do not fit.
    """

    def __init__(
        self,
        config: Any,
        layer_idx: int,
        *,
        num_heads: int,
        num_k_heads: int,
        num_v_heads: int,
        head_dim: int,
        v_head_dim: int | None = None,
        k_dim: int | None = None,
        key_map: Sequence[int] | None = None,
        value_map: Sequence[int] | None = None,
        num_q_heads: int | None = None,
        query_map: Sequence[int] | None = None,
        rotary_dim: int | None = None,
        scale: float | None = None,
        softcap: float | None = None,
        window: int | None = None,
        query_width: int | None = None,
        top_values: int | None = None,
        norm_eps: float | None = None,
        noise: float = 0.0,
        biases: Sequence[str] = (),
    ) -> None:
        super().__init__(config, layer_idx)
        self.num_heads, self.head_dim, self.v_head_dim = num_heads, head_dim, v_head_dim or head_dim
        self.num_k_heads, self.num_v_heads, self.num_q_heads = num_k_heads, num_v_heads, num_q_heads or num_heads
        for name, value in (
            ("num_heads", num_heads),
            ("num_k_heads", num_k_heads),
            ("num_v_heads", num_v_heads),
            ("head_dim", head_dim),
            ("k_dim", head_dim if k_dim is None else k_dim),
            ("top_values", 1 if top_values is None else top_values),
        ):
            if value < 1:
                raise BadArgument(name, value, "give at least 1")
        self.key_map = _map("key_map", key_map, num_heads, num_k_heads)
        self.value_map = _map("value_map", value_map, num_heads, num_v_heads)
        self.query_map = _map("query_map", query_map, num_heads, self.num_q_heads)
        self.rotary_dim = head_dim if rotary_dim is None else rotary_dim
        if self.rotary_dim % 2 or not 0 <= self.rotary_dim <= head_dim:
            raise BadArgument("rotary_dim", rotary_dim, f"give an even number up to head_dim={head_dim}")
        if k_dim is not None and k_dim > head_dim:
            raise BadArgument("k_dim", k_dim, f"give at most head_dim={head_dim}, which keys are expanded to")
        if set(biases) - set(BIASED):
            raise BadArgument("biases", list(biases), f"give some of {', '.join(BIASED)}")
        if window is not None and window < 1:
            raise BadArgument("window", window, "give at least 1, the query's own key")
        self.scale, self.softcap, self.sliding_window = scale, softcap, window
        self.query_width, self.norm_eps, self.noise = query_width, norm_eps, noise
        self.k_dim, self.top_values = k_dim, top_values
        self.biases = tuple(name for name in BIASED if name in biases)
        self.scaling = head_dim**-0.5 if scale is None else scale
        self.attention_dropout = getattr(config, "attention_dropout", 0.0) or 0.0
        self.is_causal = True
        # Only asked for where groups are equal; elsewhere no function of transformers is called.
        self.num_key_value_groups = max(1, num_heads // num_k_heads)

        width, queries = config.hidden_size, self.num_q_heads * head_dim
        if query_width is not None:
            self.q_up_proj = nn.Linear(width, query_width, bias=False)
        self.q_proj = nn.Linear(query_width or width, queries, bias="q_proj" in biases)
        self.k_proj = nn.Linear(width, num_k_heads * (k_dim or head_dim), bias="k_proj" in biases)
        self.v_proj = nn.Linear(width, num_v_heads * self.v_head_dim, bias="v_proj" in biases)
        self.o_proj = nn.Linear(num_heads * self.v_head_dim, width, bias="o_proj" in biases)
        self.q_norm = nn.Identity() if norm_eps is None else HeadNorm(head_dim, norm_eps)
        self.k_norm = nn.Identity() if norm_eps is None else HeadNorm(head_dim, norm_eps)
        if k_dim is not None:
            self.k_up = nn.Parameter(torch.randn(num_k_heads, head_dim, k_dim) * k_dim**-0.5)
        self._table: tuple[Tensor, float] | None = None

    @property
    def grouped(self) -> bool:
        """Whether heads are shared as in GQA: as many key as value heads, read by contiguous groups of one size; and
        all that is held is read as it is held."""
        return (
            self.k_dim is None
            and self.top_values is None
            and self.num_k_heads == self.num_v_heads
            and self.num_heads % self.num_k_heads == 0
            and self.key_map == self.value_map == grouped(self.num_heads, self.num_k_heads)
        )

    @property
    def spec(self) -> dict[str, Any]:
        shared = self.query_map != tuple(range(self.num_heads))
        return {
            "num_heads": self.num_heads,
            "num_k_heads": self.num_k_heads,
            "num_v_heads": self.num_v_heads,
            "head_dim": self.head_dim,
            "v_head_dim": self.v_head_dim,
            "k_dim": self.k_dim,
            "key_map": list(self.key_map),
            "value_map": list(self.value_map),
            "num_q_heads": self.num_q_heads if shared else None,
            "query_map": list(self.query_map) if shared else None,
            "rotary_dim": self.rotary_dim,
            "scale": self.scale,
            "softcap": self.softcap,
            "window": self.sliding_window,
            "query_width": self.query_width,
            "top_values": self.top_values,
            "norm_eps": self.norm_eps,
            "noise": self.noise,
            "biases": list(self.biases),
        }

    @property
    def holds(self) -> dict[str, Any]:
        numbers = {
            "num_heads": self.num_heads,
            "num_kv_heads": self.num_k_heads,
            "head_dim": self.head_dim,
            "v_head_dim": self.v_head_dim,
            "window": self.sliding_window,
            "latent": False,
            "latent_dim": 0,
        }
        if self.grouped:
            kind = "full" if self.sliding_window is None else "sliding"
            store = {"store_heads": self.num_k_heads, "store_k_dim": self.head_dim, "store_v_dim": self.v_head_dim}
            return numbers | store | {"kind": kind}
        return numbers | {
            "kind": "other",
            # Transformers' cache forgets what left the window only in layers that it knows to be sliding.
            "window": self.sliding_window if self._slides else None,
            "store_heads": 1,
            "store_k_dim": self.num_k_heads * (self.k_dim or self.head_dim),
            "store_v_dim": self.num_v_heads * self.v_head_dim,
        }

    @property
    def _slides(self) -> bool:
        """Whether transformers knows this layer's window: its masks and its cache layer then have it."""
        if self.sliding_window is None or self.sliding_window != getattr(self.config, "sliding_window", None):
            return False
        types = getattr(self.config, "layer_types", None)
        return types is None or types[self.layer_idx] == "sliding_attention"

    def frequency_indices(self, base: int) -> list[int]:
        """Which of the model's `base` rotary frequencies turn each pair."""
        return evenly(self.rotary_dim // 2, base)

    def flops(self, queries: int, keys: int) -> int:
        """Of scores and of their use, for `queries` x `keys` pairs: two matrix products for each of the H heads; and of
        expanding the keys, where they are held in fewer dims."""
        expanding = 0 if self.k_dim is None else self.num_k_heads * keys * self.head_dim * self.k_dim
        values = keys if self.top_values is None or queries > 1 else min(keys, self.top_values)
        return 2 * (self.num_heads * queries * (keys * self.head_dim + values * self.v_head_dim) + expanding)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Any = None,
        attention_mask: Any = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        x = hidden_states if self.query_width is None else self.q_up_proj(hidden_states)
        q = self.q_norm(_heads(self.q_proj(x), self.num_q_heads))
        k = _heads(self.k_proj(hidden_states), self.num_k_heads)
        v = _heads(self.v_proj(hidden_states), self.num_v_heads)
        past = 0
        if self.k_dim is None:
            k = self.k_norm(k)
            if self.rotary_dim:
                cos, sin = angles(position_embeddings, None, self.rotary_dim // 2)
                q, k = self._turn(q, cos, sin), self._turn(k, cos, sin)
        elif past_key_values is not None:
            past = int(past_key_values.get_seq_length(self.layer_idx))
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        if self.k_dim is not None:
            q, k = self._expanded(q, k, past)
        if self.query_map != tuple(range(self.num_heads)):
            q = q[:, list(self.query_map)]
        out = (self._grouped if self.grouped else self._mapped)(q, k, v, attention_mask, kwargs)
        if self.training and self.noise:
            out = out - self.noise * _noise(out, self.key_map)
        return self.o_proj(out.flatten(2)), None

    def _turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        if self.rotary_dim == self.head_dim:
            return turn(x, cos, sin)
        return torch.cat([turn(x[..., : self.rotary_dim], cos, sin), x[..., self.rotary_dim :]], dim=-1)

    def _expanded(self, q: Tensor, k: Tensor, past: int) -> tuple[Tensor, Tensor]:
        """Queries, and keys [B, nk, M, head_dim] made of what is held, both turned to their slots in the cache: scores
        know distances alone, and padding on the left moves both alike."""
        new, held = q.shape[2], k.shape[2]
        k = self.k_norm(torch.einsum("bhmc,hdc->bhmd", k, self.k_up))
        if not self.rotary_dim:
            return q, k
        if self._table is None:
            self._table = frequency_table(self.config, self.layer_idx)
        frequencies, factor = self._table[0].to(q.device), self._table[1]
        picked = frequencies[evenly(self.rotary_dim // 2, len(frequencies))]
        # A cache with a window has lost its first tokens; a static one has room behind its last.
        first = max(0, past + new - held)
        made = []
        for x, begin in ((q, past), (k, first)):
            angle = torch.arange(begin, begin + x.shape[2], device=q.device)[None, None, :, None] * picked
            made.append(self._turn(x, factor * angle.cos(), factor * angle.sin()))
        return made[0], made[1]

    def _grouped(self, q: Tensor, k: Tensor, v: Tensor, mask: Any, kwargs: dict[str, Any]) -> Tensor:
        """Out [B, N, H, Dv] by the attention function that the model was opened with."""
        name = self.config._attn_implementation
        if name in _WITHOUT_WINDOWS and self.sliding_window is not None and not self._slides:
            mask = _bias(mask, q, k.shape[2], self.sliding_window)
        more: dict[str, Any] = {} if self.softcap is None else {"softcap": self.softcap}
        if self.sliding_window is not None:
            more["sliding_window"] = self.sliding_window
        out, _ = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)(
            self,
            q,
            k,
            v,
            mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **more,
            **kwargs,
        )
        return out

    def _mapped(self, q: Tensor, k: Tensor, v: Tensor, mask: Any, kwargs: dict[str, Any]) -> Tensor:
        """Out [B, N, H, Dv] by our own primitive, which knows maps."""
        if mask is not None and not isinstance(mask, Tensor):
            raise Refused(
                f"heads shared in this way cannot read a {type(mask).__name__}; open the model with "
                'attn_implementation="sdpa" or "eager"'
            )
        if self.training and self.attention_dropout:
            raise Refused("attention under head maps has no dropout; set config.attention_dropout to 0")
        window = self.sliding_window
        spans = () if window is None or mask is not None else (Span(window=window),)
        bias = None if mask is None else _bias(mask, q, k.shape[2], window)
        if self.top_values is not None and q.shape[2] == 1 and self.top_values < k.shape[2]:
            if window is not None and bias is None:
                bias = _bias(None, q, k.shape[2], window)
            return self._of_top_values(q, k, v, bias)
        return attend(
            q,
            k,
            v,
            visible=spans,
            k_map=self.key_map,
            v_map=self.value_map,
            scale=self.scaling,
            bias=bias,
            softcap=self.softcap,
            lse=False,
        ).out.transpose(1, 2)

    def _of_top_values(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        """Out [B, 1, H, Dv] of one query, which reads all keys and, for each head, the values of the highest scores."""
        assert self.top_values is not None
        scores = q.new_empty(q.shape[0], self.num_heads, k.shape[2])
        for head in range(self.num_k_heads):
            readers = [h for h, key in enumerate(self.key_map) if key == head]
            scores[:, readers] = q[:, readers, 0] @ k[:, head].mT
        scores = (scores * self.scaling).to(torch.promote_types(scores.dtype, torch.float32))
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        if bias is not None:
            scores = scores + bias[:, :, 0]
        best, slots = scores.topk(self.top_values, dim=-1)
        row = torch.arange(q.shape[0], device=q.device)[:, None, None]
        head = torch.tensor(self.value_map, device=q.device)[None, :, None]
        return (best.softmax(-1).to(v.dtype).unsqueeze(2) @ v[row, head, slots]).transpose(1, 2)


def _map(name: str, given: Sequence[int] | None, heads: int, count: int) -> tuple[int, ...]:
    if given is None:
        return tuple(h * count // heads for h in range(heads)) if count <= heads else tuple(range(heads))
    if len(given) != heads or not all(0 <= head < count for head in given):
        raise BadArgument(name, list(given), f"give {heads} heads, each in 0..{count - 1}")
    return tuple(int(head) for head in given)


def _heads(x: Tensor, heads: int) -> Tensor:
    """[B, N, heads * D] -> [B, heads, N, D]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _bias(mask: Tensor | None, q: Tensor, keys: int, window: int | None) -> Tensor:
    """What is added to scores: the mask in any form of transformers (none, 2-D padding, 4-D bool or float) and the
    window, in the dtype of q."""
    queries = q.shape[2]
    if mask is None:
        mask = torch.ones(1, keys, dtype=torch.bool, device=q.device)
    if mask.ndim == 2:
        # Padding is stated for all columns, also for those that a sliding cache forgot.
        mask = four_d(mask[:, -keys:], queries, keys, window)
    mask = mask[..., :keys]
    if window is not None:
        i = torch.arange(keys - queries, keys, device=q.device).unsqueeze(-1)
        near = i - torch.arange(keys, device=q.device) < window
        mask = mask & near if mask.dtype == torch.bool else mask.masked_fill(~near, torch.finfo(mask.dtype).min)
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, torch.finfo(q.dtype).min)
    return mask.to(q.dtype)


def _noise(out: Tensor, key_map: Sequence[int]) -> Tensor:
    """Uniform noise with the mean and spread of each head's outputs [B, N, H, D] over a text (one row of a group).

    The entry of the a-th head of a group at its a-th number is 0 before the noise gets its spread.
    """
    rows = out.detach().transpose(1, 2).flatten(2)
    drawn = torch.rand_like(rows)
    seen: dict[int, int] = {}
    for head, key in enumerate(key_map):
        drawn[:, head, seen.setdefault(key, 0)] = 0.0
        seen[key] += 1
    drawn = (drawn - drawn.mean(-1, keepdim=True)) / drawn.std(-1, keepdim=True)
    drawn = drawn * rows.std(-1, keepdim=True) + rows.mean(-1, keepdim=True)
    return drawn.unflatten(-1, (out.shape[1], out.shape[3])).transpose(1, 2)
