"""The Mamba-2 layer in an attention layer's place: a state per head instead of keys and values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, silu, softplus

from foveate.attention.recurrence import chunked, step
from foveate.errors import BadArgument, Refused
from foveate.layers.mixer import Mixer, mixer


class GatedNorm(nn.Module):
    """RMS norm of y * SiLU(z), each head by itself."""

    def __init__(self, heads: int, head_dim: int, eps: float) -> None:
        super().__init__()
        self.heads, self.eps = heads, eps
        self.weight = nn.Parameter(torch.ones(heads * head_dim))

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        """[..., H * P], both."""
        wide = torch.promote_types(y.dtype, torch.float32)
        gated = (y.to(wide) * silu(z.to(wide))).unflatten(-1, (self.heads, -1))
        normed = gated * torch.rsqrt(gated.square().mean(-1, keepdim=True) + self.eps)
        return (normed.flatten(-2) * self.weight.to(wide)).to(z.dtype)


@mixer("mamba2")
class Mamba2(Mixer):
    """Mamba-2 with the geometry of grouped-query attention (Zebra-Llama, arXiv 2505.17272; MambaInLlama, 2408.15237).

    One projection gives z [H P], x [Hk P], B [Hk K], C [H K] and dt [H]. Where attention has its queries stands C, for
    keys B, for values x; x and B are shared by the heads of a group. A causal depthwise convolution and SiLU pass over
    [x, B, C], then each head runs the recurrence of `foveate.attention.recurrence` with dt = softplus(dt + dt_bias) and
    decay exp(-exp(A_log) dt), and a gated norm and the output projection end the layer. No positions are rotated.

    Its cache is transformers' own layer for linear attention: the last `conv` inputs of the convolution and the state
    [B, H, P, K] in fp32, whatever the context's length. Padding leaves both untouched, wherever in a row it stands.
    Packed sequences, several texts in one row, are not told apart.

    Args:
        heads: H, query heads. kv_heads: Hk, a divisor.
        head_dim: P, of values. state_dim: K, of queries and keys.
        conv: taps of the convolution.
        repeat_first: repeat x and B over their group before the convolution, which then differs from head to head.
        bias, out_bias: whether the input and the output projection have one.
        chunk: tokens per chunk of the recurrence.
    """

    layer_type = "linear_attention"
    keeps_float32 = ("A_log", "D", "dt_bias")

    def __init__(
        self,
        config: Any,
        layer_idx: int,
        *,
        heads: int,
        kv_heads: int,
        head_dim: int,
        state_dim: int,
        conv: int = 4,
        repeat_first: bool = False,
        bias: bool = False,
        out_bias: bool = False,
        chunk: int = 64,
    ) -> None:
        super().__init__(config, layer_idx)
        if kv_heads < 1 or heads % kv_heads:
            raise BadArgument("kv_heads", kv_heads, f"give a divisor of heads={heads}")
        if conv < 1:
            raise BadArgument("conv", conv, "give at least 1 tap")
        self.heads, self.kv_heads, self.head_dim, self.state_dim = heads, kv_heads, head_dim, state_dim
        self.conv, self.repeat_first, self.bias, self.out_bias, self.chunk = conv, repeat_first, bias, out_bias, chunk
        self.widths = (heads * head_dim, kv_heads * head_dim, kv_heads * state_dim, heads * state_dim, heads)
        """Rows of the input projection: z, x, B, C, dt."""
        shared = heads if repeat_first else kv_heads
        self.mixed = (shared * head_dim, shared * state_dim, heads * state_dim)
        """Channels of the convolution: x, B, C."""
        self.in_proj = nn.Linear(config.hidden_size, sum(self.widths), bias=bias)
        self.conv1d = nn.Conv1d(sum(self.mixed), sum(self.mixed), conv, groups=sum(self.mixed))
        self.A_log = nn.Parameter(torch.zeros(heads, dtype=torch.float32))
        self.D = nn.Parameter(torch.ones(heads, dtype=torch.float32))
        self.dt_bias = nn.Parameter(torch.zeros(heads, dtype=torch.float32))
        self.norm = GatedNorm(heads, head_dim, getattr(config, "rms_norm_eps", 1e-5))
        self.out_proj = nn.Linear(heads * head_dim, config.hidden_size, bias=out_bias)

    @property
    def spec(self) -> dict[str, Any]:
        names = ("heads", "kv_heads", "head_dim", "state_dim", "conv", "repeat_first", "bias", "out_bias", "chunk")
        return {name: getattr(self, name) for name in names}

    @property
    def holds(self) -> dict[str, Any]:
        return {
            "kind": "other",
            "num_heads": self.heads,
            "num_kv_heads": self.kv_heads,
            "head_dim": self.state_dim,
            "v_head_dim": self.head_dim,
            "window": None,
            "latent": False,
            "latent_dim": 0,
            "store_heads": 0,
            "store_k_dim": 0,
            "store_v_dim": 0,
        }

    def state_bytes(self, batch: int = 1) -> int:
        """Bytes of what this layer holds instead of keys and values."""
        window = sum(self.mixed) * self.conv * self.in_proj.weight.element_size()
        wide = torch.promote_types(self.in_proj.weight.dtype, torch.float32)
        return batch * (window + self.heads * self.head_dim * self.state_dim * wide.itemsize)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Mamba2:
        """Casts to a half precision pass the recurrence's own parameters by: their rounding adds up over a text."""
        kept = {name: getattr(self, name).data for name in self.keeps_float32}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            now = getattr(self, name)
            if now.dtype.itemsize < before.dtype.itemsize and now.dtype.itemsize < 4:
                now.data = before.to(now.device)
        return self

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Any = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        return self.out_proj(self.heads_of(hidden_states, attention_mask, past_key_values)), None

    def heads_of(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, past_key_values: Any = None
    ) -> Tensor:
        """What the output projection reads, [B, N, H P]: where attention has its heads side by side."""
        length = hidden_states.shape[1]
        z, x, b, c, dt = self.in_proj(hidden_states).split(self.widths, dim=-1)
        if self.repeat_first:
            x, b = (t.unflatten(-1, (self.kv_heads, -1)) for t in (x, b))
            x, b = (t.repeat_interleave(self.heads // self.kv_heads, dim=2).flatten(2) for t in (x, b))
        held = None if past_key_values is None else _state_layer(past_key_values, self.layer_idx)
        going_on = held is not None and held.has_previous_state[0]
        real = _real_tokens(attention_mask, length)

        mixed = torch.cat([x, b, c], dim=-1)
        seen = held.conv_states[0][..., -self.conv :].transpose(1, 2) if held is not None and going_on else None
        mixed = pad(mixed, (0, 0, self.conv, 0)) if seen is None else torch.cat([seen.to(mixed.dtype), mixed], dim=1)
        dt = softplus(dt.to(self._wide) + self.dt_bias)
        order = None
        if real is not None:
            # Padding first, then what the convolution saw last, then the tokens: as if there were no padding.
            mixed = _take(mixed, pad(real, (self.conv, 0), value=1).argsort(dim=1, stable=True))
            order = real.argsort(dim=1, stable=True)
            dt = _take(dt * real[..., None], order)
        if held is not None:
            held.update_conv_state(mixed[:, -self.conv :].transpose(1, 2), conv_kernel_size=self.conv)
        mixed = silu(self.conv1d(mixed[:, 1:].transpose(1, 2))).transpose(1, 2)

        state = held.recurrent_states[0] if held is not None and going_on else None
        y, state = self._recur(mixed, dt, state)
        if held is not None:
            held.update_recurrent_state(state)
        if order is not None:
            y = _take(y, order.argsort(dim=1))
        return self.norm(y, z)

    @property
    def _wide(self) -> torch.dtype:
        return torch.promote_types(self.in_proj.weight.dtype, torch.float32)

    def _recur(self, mixed: Tensor, dt: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """[B, N, channels] and dt [B, N, H] -> y [B, N, H P], and the state after them."""
        x, b, c = mixed.split(self.mixed, dim=-1)
        x, b, c = (
            x.unflatten(-1, (-1, self.head_dim)),
            b.unflatten(-1, (-1, self.state_dim)),
            c.unflatten(-1, (self.heads, -1)),
        )
        x = x.repeat_interleave(self.heads // x.shape[2], dim=2)
        log_decay = -self.A_log.exp() * dt
        if state is not None and mixed.shape[1] == 1:
            y, state = step(x[:, 0], dt[:, 0], log_decay[:, 0], b[:, 0], c[:, 0], self.D, state)
            return y[:, None].flatten(2), state
        y, state = chunked(x, dt, log_decay, b, c, self.D, state, self.chunk)
        return y.flatten(2), state


def _state_layer(cache: Any, index: int) -> Any:
    """The cache layer that holds this layer's state."""
    layers = cache.layers
    if index >= len(layers) or not hasattr(layers[index], "recurrent_states"):
        raise Refused(
            f"layer {index} holds a state, and this {type(cache).__name__} has no room for one; "
            "pass none, or DynamicCache(config=model.config)"
        )
    if any(hasattr(layer, "max_cache_len") for layer in layers):
        raise Refused("a static cache's mask does not tell which of its columns are padding; use a DynamicCache")
    return layers[index]


def _real_tokens(mask: Tensor | None, length: int) -> Tensor | None:
    """Which of the last `length` tokens are no padding, as 0 and 1 [B, N]; None if all are.

    Args:
        mask: [B, M] with 1 for tokens, or [B, 1, N, M], bool or added to scores: there a token sees itself, and
            padding is seen by nobody.
    """
    if mask is None:
        return None
    if mask.ndim == 2:
        return (mask[:, -length:] != 0).long()
    own = mask[:, 0].diagonal(offset=mask.shape[-1] - length, dim1=-2, dim2=-1)
    seen = own if own.dtype == torch.bool else own > torch.finfo(own.dtype).min / 2
    return seen.long()


def _take(t: Tensor, order: Tensor) -> Tensor:
    """[B, N, C] in the order [B, N] of each row."""
    return t.gather(1, order[..., None].expand(-1, -1, t.shape[2]))
