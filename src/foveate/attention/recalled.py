"""A decode step that recalls blocks of the past, in a few launches (Triton)."""

from __future__ import annotations

from importlib import import_module
from typing import Any, NamedTuple

from torch import Tensor

from foveate.attention.angles import Angles
from foveate.attention.selection import Partial


class Borders(NamedTuple):
    """Where tokens stand: `init` first ones, then blocks of `block` up to the newest: the last `local` and the fewer
    than `block` before them that fill no block yet."""

    init: int
    local: int
    block: int

    @property
    def ahead(self) -> int:
        """Tokens of a text that belong to no block that the next token finds ready."""
        return self.init + self.local - 1

    def ready(self, end: Tensor) -> Tensor:
        """Blocks that lie behind the newest tokens of a piece whose first query stands at `end`, an int tensor."""
        return ((end - self.ahead) // self.block).clamp_min(0)


class Share(NamedTuple):
    """What the layer of this number may take of the `total` blocks that all layers share: at least `least`, at most
    `most`."""

    number: int
    total: int
    least: int
    most: int


def serves(blocks: int) -> bool:
    """Whether the kernels order so many blocks at once."""
    return 1 <= blocks <= _kernels("topk").AT_ONCE


def recall(
    q: Tensor,
    known: Tensor,
    lengths: Tensor,
    angles: Angles,
    at: Borders,
    share: Share,
    left: Tensor | None,
    means: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Blocks with the best cosines to the queries q [B, H, 1, D] of a step, all at position `local`: int32 [B, K],
    ascending, -1 behind the end; the entropies of the choice and the blocks left to the layers behind, [B].

    Args:
        known: float32 [B, Hs, n, D], what blocks are known by; lengths: int32 [B * Hs].
        left: int64 [B], of the layer before; None: all.
        means: float32 [B, layers], mean entropies; negative where unknown.
    """
    cosines = _kernels("block_cosines").block_cosines
    scores = cosines(q, known, lengths, angles, place=at.local, ahead=at.init + at.local, size=at.block)
    choose = _kernels("block_shares").recall_blocks
    found: tuple[Tensor, Tensor, Tensor] = choose(scores, left, means, **share._asdict())
    return found


def read(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    chosen: Tensor,
    angles: Angles,
    at: Borders,
    *,
    scale: float,
    softcap: float | None,
) -> tuple[Partial, Any]:
    """Attention of q [B, H, 1, Dk] over the newest tokens of k [B * Hs, C, Dk] and v [B * Hs, C, Dv], and over the
    first ones and the blocks `chosen` as if they stood `local` tokens back; and what `settle` takes."""
    kernel = _kernels("decode_recalled").decode_recalled
    out, lse, seen = kernel(q, k, v, lengths, chosen, angles, at, scale=scale, softcap=softcap)
    return Partial(out, lse), seen


def settle(
    seen: Any, lengths: Tensor, entropy: Tensor, mass: Tensor, past: Tensor, means: Tensor, at: Borders, number: int
) -> None:
    """Add what the newest tokens weighed to mass [B, C], and the entropy [B] to the past ones [B, n], whose mean goes
    to means [B, layers]: all in place. See `triton.decode_recalled.settle`."""
    _kernels("decode_recalled").settle(seen, lengths, entropy, mass, past, means, at, number=number)


def _kernels(module: str) -> Any:
    return import_module(f"foveate.attention.triton.{module}")
