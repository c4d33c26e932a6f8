"""Decode over latent stores (MLA): keys of which a part are the values, read once for all heads."""

from __future__ import annotations

from torch import Tensor

from foveate.attention.triton.decode import Stores, decode_ragged
from foveate.errors import BadArgument


def decode_latent(
    q: Tensor, c: Tensor, lengths: Tensor, scale: float, value_dim: int, *, first: int = 0, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Softmax attention of absorbed queries over one latent head per row.

    All heads of a row read each token together, in tiles of up to 64 heads; values are taken from the tile that the
    scores were made of. A slice of the values (tensor parallelism over the latent) needs the whole scores: lse is the
    same in every slice, and the outputs stand side by side.

    Args:
        q: [B, H, N, r + d_rope], N from 1 to 8.
        c: [B, C, r + d_rope], normed latents and rotated keys.
        lengths: int32 [B] on the device; the queries are the last N of these tokens.
        scale: factor of the scores (that of the expanded head size; nothing here can tell it).
        value_dim: channels of the values: r, or the width of the slice.
        first: first channel of the slice; a multiple of 8.
        softcap: scores become softcap * tanh(scores / softcap).

    Returns:
        out [B, H, N, value_dim] in the dtype of q, lse [B, H, N] float32; 0 and -inf where a row holds nothing.
    """
    if c.dim() != 3 or c.shape[0] != q.shape[0]:
        raise BadArgument("c", tuple(c.shape), f"give [{q.shape[0]}, tokens, {q.shape[-1]}]")
    if value_dim < 1 or first < 0 or first + value_dim > c.shape[2] or first % 8:
        given = f"channels {first} to {first + value_dim}"
        raise BadArgument("value_dim", given, f"they must lie in the {c.shape[2]} of c, the first a multiple of 8")
    return decode_ragged(q, Stores(c, c[..., first : first + value_dim], lengths), scale, softcap)
