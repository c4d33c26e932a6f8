"""A small masked-diffusion language model: every token sees every other, and hidden ones are guessed all at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.attention import ALL, Geometry, Selection, attend
from foveate.errors import BadArgument

Read = Callable[[int, Tensor, Tensor], Selection]
"""(layer, q [B, H, N, D], k [B, Hk, N, D], both rotated) -> the pairs that this layer reads."""


@dataclass(frozen=True, kw_only=True)
class DiffusionShape:
    """What a `MaskedDiffusion` is made of.

    Args:
        vocab_size: tokens of the language; the sign for a hidden one is the next number.
        layers, heads, head_dim: of the transformer; the hidden size is heads * head_dim.
        kv_heads: key-value heads, a divisor of `heads`; all of them if None.
        theta: base of the rotation's wave lengths.
    """

    vocab_size: int
    layers: int = 2
    heads: int = 4
    kv_heads: int | None = None
    head_dim: int = 16
    theta: float = 10000.0

    def __post_init__(self) -> None:
        for name in ("vocab_size", "layers", "heads"):
            if getattr(self, name) < 1:
                raise BadArgument(name, getattr(self, name), "give at least 1")
        if self.head_dim < 2 or self.head_dim % 2:
            raise BadArgument("head_dim", self.head_dim, "give an even number: it is rotated in pairs")
        if self.kv_heads is not None and (self.kv_heads < 1 or self.heads % self.kv_heads):
            raise BadArgument("kv_heads", self.kv_heads, f"give a divisor of heads={self.heads}")

    @property
    def mask_id(self) -> int:
        """The sign that stands where a token is hidden."""
        return self.vocab_size


class _Block(nn.Module):
    """Bidirectional attention and a gated MLP, each behind a norm."""

    def __init__(self, shape: DiffusionShape) -> None:
        super().__init__()
        self.heads, self.kv_heads = shape.heads, shape.kv_heads or shape.heads
        width, stored = shape.heads * shape.head_dim, self.kv_heads * shape.head_dim
        self.before, self.between = nn.RMSNorm(width), nn.RMSNorm(width)
        self.q_proj, self.o_proj = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.k_proj, self.v_proj = (nn.Linear(width, stored, bias=False) for _ in range(2))
        self.gate, self.up = (nn.Linear(width, 2 * width, bias=False) for _ in range(2))
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(
        self, x: Tensor, angles: tuple[Tensor, Tensor], geometry: Geometry, read: Callable[[Tensor, Tensor], Selection]
    ) -> Tensor:
        h = self.before(x)
        q = _turned(self.q_proj(h).unflatten(2, (self.heads, -1)).transpose(1, 2), angles)
        k = _turned(self.k_proj(h).unflatten(2, (self.kv_heads, -1)).transpose(1, 2), angles)
        v = self.v_proj(h).unflatten(2, (self.kv_heads, -1)).transpose(1, 2)
        out = attend(q, k, v, read(q, k), geometry, lse=False).out
        x = x + self.o_proj(out.transpose(1, 2).flatten(2))
        h = self.between(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class MaskedDiffusion(nn.Module):
    """Rotary transformer blocks without causality over tokens, some of which are hidden behind `shape.mask_id`.

    Args:
        shape: its sizes.
        seed: of its weights.
    """

    def __init__(self, shape: DiffusionShape, seed: int = 0) -> None:
        super().__init__()
        self.shape = shape
        width = shape.heads * shape.head_dim
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embed = nn.Embedding(shape.vocab_size + 1, width)
            self.blocks = nn.ModuleList(_Block(shape) for _ in range(shape.layers))
            self.norm = nn.RMSNorm(width)
            self.head = nn.Linear(width, shape.vocab_size, bias=False)

    def forward(self, ids: Tensor, read: Read | None = None) -> Tensor:
        """Logits of the token at each place.

        Args:
            ids: int [B, N], all rows N tokens long: there is no padding.
            read: which pairs each layer reads; None: all.

        Returns:
            [B, N, vocab_size]: the sign for hidden is never a guess.
        """
        batch, length = ids.shape
        x = self.embed(ids)
        # Causality is a rule about slots; a first query that stands behind the last key sees them all.
        behind = torch.full((1, 1), length, device=ids.device)
        geometry = Geometry(batch, length, length, first=behind, device=ids.device)
        angles = self._angles(length, x)
        for number, block in enumerate(self.blocks):
            x = block(x, angles, geometry, lambda q, k, n=number: ALL if read is None else read(n, q, k))
        return self.head(self.norm(x))

    def _angles(self, length: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [N, D / 2] of positions 0..N-1."""
        half = self.shape.head_dim // 2
        speed = self.shape.theta ** -(torch.arange(half, device=like.device, dtype=torch.float32) / half)
        angle = torch.arange(length, device=like.device, dtype=torch.float32).unsqueeze(1) * speed
        return angle.cos().to(like.dtype), angle.sin().to(like.dtype)


def _turned(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """x [B, H, N, D] rotated by position, first half of the channels against second."""
    (one, two), (cos, sin) = x.chunk(2, dim=-1), angles
    return torch.cat([one * cos - two * sin, two * cos + one * sin], dim=-1)


def masked_loss(model: MaskedDiffusion, ids: Tensor, prompt: int, generator: torch.Generator) -> Tensor:
    """What a masked-diffusion model is trained by: a bound on the negative log-likelihood per answer token, in nats.

    Each row draws a noise level t in (0, 1]; each of its answer tokens is hidden with probability t, and the cross
    entropies of the hidden ones count 1 / t each. Prompts are never hidden. Source: 2502.09992
    (LLaDA), sections 2.2 and 2.3.

    Args:
        ids: int [B, N], prompt and answer.
        prompt: tokens of the prompt, the same in each row, fewer than N.
        generator: of the noise; on the CPU.
    """
    batch, length = ids.shape
    if not 0 <= prompt < length:
        raise BadArgument("prompt", prompt, f"leave an answer: 0 to {length - 1} of the {length} tokens")
    level = 1 - torch.rand(batch, 1, generator=generator)
    hidden = torch.rand(batch, length, generator=generator) < level
    hidden[:, :prompt] = False
    level, hidden = level.to(ids.device), hidden.to(ids.device)
    logits = model(ids.masked_fill(hidden, model.shape.mask_id))
    entropy = F.cross_entropy(logits.transpose(1, 2).float(), ids, reduction="none")
    return (entropy * hidden / level).sum() / (batch * (length - prompt))
