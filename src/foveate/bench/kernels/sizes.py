"""Sizes of what kernels are timed on."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from foveate.errors import BadArgument


@dataclass(frozen=True)
class Sizes:
    """Shapes of all cases.

    Args:
        lengths: tokens of context.
        heads, kv_heads, head_dim: of grouped-query attention.
        latent_heads, latent_rows: query heads and rows of latent attention, whose latents are 512 + 64 wide.
        budget: tokens that a sparse decode step reads of each store head.
        dtype: of queries, keys and values.
    """

    lengths: tuple[int, ...] = (32768, 131072)
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    latent_heads: int = 16
    latent_rows: int = 4
    budget: int = 4096
    dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        if not self.lengths or min(self.lengths) < 256 or any(n % 128 for n in self.lengths):
            raise BadArgument("lengths", self.lengths, "give multiples of 128, from 256 tokens on")
        if self.heads < 1 or self.kv_heads < 1 or self.heads % self.kv_heads:
            raise BadArgument("heads", self.heads, f"give a multiple of the {self.kv_heads} kv heads")
        if self.head_dim not in (32, 64, 128, 256):
            raise BadArgument("head-dim", self.head_dim, "give 32, 64, 128 or 256")

    @classmethod
    def of(cls, device: torch.device, **given: object) -> Sizes:
        """The defaults of a device: the attention of an 8B model on a GPU, a small one elsewhere; `given` overrides."""
        small = {
            "lengths": (512, 2048),
            "heads": 8,
            "kv_heads": 2,
            "head_dim": 64,
            "latent_heads": 4,
            "latent_rows": 1,
            "budget": 256,
            "dtype": torch.float32,
        }
        chosen = {} if device.type == "cuda" else small
        return cls(**{**chosen, **{name: value for name, value in given.items() if value is not None}})  # type: ignore[arg-type]

    @property
    def group(self) -> int:
        """Query heads per kv head."""
        return self.heads // self.kv_heads

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize

    @property
    def words(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        return f"{self.heads} heads over {self.kv_heads}, {self.head_dim} wide, {kind}"
