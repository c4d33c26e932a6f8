"""Rotary embeddings of a decode step: queries and keys of one token per row, turned in place where they are needed.

Whoever takes in the key turns it on the way, and the queries beside it, so that a step has a launch less in each layer.
The model's own code stands between: it is handed tensors that say what they are to be turned by. Everything else that
touches one finds an ordinary tensor, turned at that moment.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton.language as tl
from torch import Tensor

from foveate.attention.triton.arrive import Turn, turn_rows
from foveate.attention.triton.workers import jit, power_of_two
from foveate.engine.later import Later


def suits(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether the kernels can turn q [B, H, 1, D] and k [B, Hk, 1, D] by cos and sin, [B, 1, D] or [1, 1, D] each."""
    rows, dim = (1, len(q)), q.shape[3]
    turns = all(x.dim() == 3 and x.shape[0] in rows and x.shape[1:] == (1, dim) for x in (cos, sin))
    return q.shape[2] == k.shape[2] == 1 and dim % 2 == 0 and turns and all(x.stride(-1) == 1 for x in (q, k, cos, sin))


class Rotation:
    """Queries and keys that are turned together when the first of them is needed.

    Args:
        q, k, cos, sin: what suits (see `suits`); q and k are turned in place.
        own: the model's way, (q, k, cos, sin) -> turned q and k.

    Attributes:
        k, turn: for whoever turns both, and says so by `taken`.
    """

    def __init__(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, own: Callable[..., Any]) -> None:
        self.k, self.turn, self.own = k, Turn(q, cos, sin), own
        self.turned: tuple[Tensor, Tensor | None] | None = None

    def laters(self) -> tuple[Later, Later]:
        """What stands in for q and k. Not kept here: they and this would keep each other alive."""
        q, k = self.turn.q, self.k
        return Later(q, q.shape[-1], self._q, rotation=self), Later(k, k.shape[-1], self._k, rotation=self)

    def taken(self) -> None:
        """The queries were turned in place, and the keys where they are kept now."""
        self.turned = self.turn.q, None

    def _q(self) -> Tensor:
        return self._both()[0]

    def _k(self) -> Tensor:
        k = self._both()[1]
        return self.own(self.k, self.k, self.turn.cos, self.turn.sin)[1] if k is None else k

    def _both(self) -> tuple[Tensor, Tensor | None]:
        if self.turned is None:
            self.turned = rotate(self.turn.q, self.k, self.turn.cos, self.turn.sin)
        return self.turned


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """q and k, turned in place: channel d of the first half with channel d of the second. Each product and each sum is
    rounded, as PyTorch does it, and none is fused into the next. The inputs must suit (see `suits`).
    """
    batch, heads, _, dim = q.shape
    rows = [0 if len(x) == 1 else x.stride(0) for x in (cos, sin)]
    _rotate[(batch * (heads + k.shape[1]),)](
        q, k, cos, sin, heads, heads + k.shape[1], *q.stride()[:2], *k.stride()[:2], *rows, HALF=dim // 2,
        WIDE=power_of_two(dim // 2), num_warps=1, enable_fp_fusion=False,
    )  # fmt: skip
    return q, k


@jit(do_not_specialize=["heads", "both"])
def _rotate(
    q, k, cos, sin, heads, both, stride_qb, stride_qh, stride_kb, stride_kh, stride_c, stride_s, HALF: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    row, head = (tl.program_id(0) // both).to(tl.int64), tl.program_id(0) % both
    x = q + row * stride_qb + head * stride_qh
    if head >= heads:
        x = k + row * stride_kb + (head - heads) * stride_kh
    one = tl.arange(0, 1)
    turn_rows(x, one, one < 1, cos + row * stride_c, sin + row * stride_s, HALF, WIDE)
