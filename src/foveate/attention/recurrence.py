"""The linear recurrence of state space layers: token by token, in chunks of matrix products, and one step at a time.

Each head keeps a matrix S [P, K], from 0 or a state given:

    S_t = a_t S_(t-1) + dt_t x_t b_t'          y_t = S_t c_t + skip x_t

with a decay 0 <= a_t <= 1 per head, given as its logarithm. Read as attention, c is the query, b the key and x the
value, and the weight of key j in row i is dt_j a_(j+1) ... a_i (c_i . b_j), without a softmax. The chunked form is the
SSD algorithm of Mamba-2 (arXiv 2405.21060, section 6): within a chunk that attention, between chunks the state.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from foveate.errors import BadArgument

TOGETHER = 64
"""Chunks that are computed at once; their weights take B H chunk^2 numbers each."""


def reference(
    x: Tensor,
    dt: Tensor,
    log_decay: Tensor,
    b: Tensor,
    c: Tensor,
    skip: Tensor | None = None,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence as it is written, in float64: slow, and what the other forms are held to.

    Arguments and results as in `chunked`; results are float64.
    """
    x, dt, log_decay, b, c = (t.double() for t in (x, dt, log_decay, b, c))
    b, c = _to_heads(b, x.shape[2]), _to_heads(c, x.shape[2])
    held = _begin(x, b, state)
    rows = []
    for t in range(x.shape[1]):
        write = torch.einsum("bh,bhp,bhk->bhpk", dt[:, t], x[:, t], b[:, t])
        held = log_decay[:, t].exp()[..., None, None] * held + write
        row = torch.einsum("bhpk,bhk->bhp", held, c[:, t])
        rows.append(row if skip is None else row + skip.double()[:, None] * x[:, t])
    return torch.stack(rows, 1), held


def chunked(
    x: Tensor,
    dt: Tensor,
    log_decay: Tensor,
    b: Tensor,
    c: Tensor,
    skip: Tensor | None = None,
    state: Tensor | None = None,
    chunk: int = 64,
) -> tuple[Tensor, Tensor]:
    """The recurrence over N tokens at once; differentiable.

    Args:
        x: [B, N, H, P].
        dt: [B, N, H], how strongly a token is written. A token of dt 0 and log decay 0 leaves the state as it is.
        log_decay: [B, N, H], at most 0; minus infinity forgets everything before the token.
        b, c: [B, N, groups, K]; heads share a group in runs of H / groups, and b and c may differ in groups.
        skip: [H], or None.
        state: [B, H, P, K] before the first token; zeros if None.
        chunk: tokens per chunk: work grows with it, sequential steps shrink. The result does not depend on it.

    Returns:
        y [B, N, H, P] in x's dtype, and the state after the last token [B, H, P, K]. It is computed and the state is
        returned in float32, or in float64 where x is.

    Raises:
        BadArgument: heads that are no multiple of a number of groups, or a chunk below 1.
    """
    if chunk < 1:
        raise BadArgument("chunk", chunk, "give at least 1 token")
    given, (batch, length, heads, width) = x.dtype, x.shape
    if length > chunk * TOGETHER:
        parts = []
        for start in range(0, length, chunk * TOGETHER):
            now = slice(start, start + chunk * TOGETHER)
            y, state = chunked(x[:, now], dt[:, now], log_decay[:, now], b[:, now], c[:, now], skip, state, chunk)
            parts.append(y)
        assert state is not None
        return torch.cat(parts, 1), state
    x, dt, log_decay, b, c = (_wide(t, given) for t in (x, dt, log_decay, b, c))
    held = _begin(x, b, state)
    # A chunk longer than the text would be work for nothing.
    chunk = min(chunk, length)
    count = -(-length // chunk)
    extra = count * chunk - length
    xs, bs, cs = (pad(t, (0, 0, 0, 0, 0, extra)).unflatten(1, (count, chunk)) for t in (x, b, c))
    ds, logs = (pad(t, (0, 0, 0, extra)).unflatten(1, (count, chunk)) for t in (dt, log_decay))
    written = xs * ds[..., None]

    decay = _segments(logs.permute(0, 1, 3, 2)).exp()  # [B, n, H, L, L]
    scores = torch.einsum("bnigk,bnjgk->bngij", *_same_groups(cs, bs))
    scores = scores.repeat_interleave(heads // scores.shape[2], dim=2) * decay
    inside = torch.einsum("bnhij,bnjhp->bnihp", scores, written)

    keys, queries = _to_heads(bs, heads), _to_heads(cs, heads)
    # What each token still weighs when its chunk ends is the last row of the decays.
    made = torch.einsum("bnhj,bnjhp,bnjhk->bnhpk", decay[..., -1, :], written, keys)
    since = logs.cumsum(2).exp()  # [B, n, L, H]: what is left of the state before the chunk
    before = []
    for n in range(count):
        before.append(held)
        held = since[:, n, -1, :, None, None] * held + made[:, n]
    from_state = torch.einsum("bnhpk,bnihk->bnihp", torch.stack(before, 1), queries) * since[..., None]
    y = (inside + from_state).flatten(1, 2)[:, :length]
    if skip is not None:
        y = y + _wide(skip, given)[:, None] * x
    return y.reshape(batch, length, heads, width).to(given), held


def step(
    x: Tensor, dt: Tensor, log_decay: Tensor, b: Tensor, c: Tensor, skip: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One token: x [B, H, P], dt and log_decay [B, H], b and c [B, groups, K], state [B, H, P, K].

    Returns:
        y [B, H, P] in x's dtype, and the new state.
    """
    given, heads = x.dtype, x.shape[1]
    x, dt, log_decay, b, c = (_wide(t, given) for t in (x, dt, log_decay, b, c))
    b, c = _to_heads(b, heads), _to_heads(c, heads)
    state = log_decay.exp()[..., None, None] * _wide(state, given) + (dt[..., None] * x)[..., None] * b[..., None, :]
    y = torch.einsum("bhpk,bhk->bhp", state, c)
    if skip is not None:
        y = y + _wide(skip, given)[:, None] * x
    return y.to(given), state


def _wide(t: Tensor, given: torch.dtype) -> Tensor:
    return t.to(torch.float64 if given == torch.float64 else torch.float32)


def _begin(x: Tensor, b: Tensor, state: Tensor | None) -> Tensor:
    if state is not None:
        return state.to(x.dtype)
    return x.new_zeros(x.shape[0], x.shape[2], x.shape[3], b.shape[-1])


def _to_heads(t: Tensor, heads: int) -> Tensor:
    """[..., groups, K] -> [..., H, K]."""
    groups = t.shape[-2]
    if heads % groups:
        raise BadArgument("groups", groups, f"give a divisor of {heads} heads")
    return t if groups == heads else t.repeat_interleave(heads // groups, dim=-2)


def _same_groups(c: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    most = max(c.shape[-2], b.shape[-2])
    return _to_heads(c, most), _to_heads(b, most)


def _segments(logs: Tensor) -> Tensor:
    """[..., L] -> [..., L, L]: the sum of logs over j < t <= i, minus infinity for i < j.

    Summed segment by segment: differences of one running sum would cancel where it has grown large, and be NaN where
    a log is infinite.
    """
    length = logs.shape[-1]
    ones = torch.ones(length, length, dtype=torch.bool, device=logs.device)
    spread = logs[..., :, None].expand(*logs.shape, length).masked_fill(~ones.tril(-1), 0.0)
    return spread.cumsum(-2).masked_fill(~ones.tril(), float("-inf"))
