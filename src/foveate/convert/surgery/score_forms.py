"""The nearest forms of a head's scores x_i W x_j, in the mean square over independent tokens x of a second moment.

Closed forms of our own, for conversions to layers with one matrix for queries and keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.layers.rotation import rotate_half


def symmetric(q: Tensor, k: Tensor, second: Tensor, rotary_dim: int) -> tuple[Tensor, float]:
    """The projection T that serves as queries and keys with scores nearest to those of q and k.

    A frequency of the rotation turns one pair of dims of query and key, complex numbers a x and b x. Their product is
    conj(a x_i) (b x_j) turned by the distance; the nearest conj(t x_i) (t x_j) has t along a / |a| + c b / |b|, lengths
    and products taken with the second moment of x, c of length 1. Dims that are not rotated form one real product, and
    its nearest semidefinite one has the positive eigenvalues of the symmetric part.

    Args:
        q, k: [H, D, d]. second: [d, d].

    Returns:
        T [H, D, d], and the share of the mean square of the scores that it explains.
    """
    half = rotary_dim // 2
    a = torch.complex(q[:, :half], q[:, half:rotary_dim])
    b = torch.complex(k[:, :half], k[:, half:rotary_dim])
    moment = second.to(a.dtype)
    length_a, length_b = (((x @ moment) * x.conj()).sum(-1).real.clamp(min=1e-60).sqrt() for x in (a, b))
    inner = ((a @ moment) * b.conj()).sum(-1)
    n = length_a * length_b
    root = (n.square() - inner.imag.square()).clamp(min=0).sqrt()
    value = (inner.real + root) / 2
    turn = torch.complex(root, -inner.imag) / n  # the conjugate of c
    t = a / length_a.unsqueeze(-1) + turn.unsqueeze(-1) * b / length_b.unsqueeze(-1)
    length = ((t @ moment) * t.conj()).sum(-1).real.clamp(min=1e-60).sqrt()
    t = t * (value.sqrt() / length).unsqueeze(-1)
    # Of real scores only the real part is seen, half of the mean square.
    total, left = n.square().sum() / 2, (n.square() - value.square()).sum() / 2
    rest, total_rest, left_rest = _semidefinite(q[:, rotary_dim:], k[:, rotary_dim:], second)
    whole, missed = float(total) + total_rest, float(left) + left_rest
    return torch.cat([t.real, t.imag, rest], dim=1), 1 - missed / max(whole, 1e-60)


def _semidefinite(q: Tensor, k: Tensor, second: Tensor) -> tuple[Tensor, float, float]:
    """T [H, R, d] with T' T nearest to q' k, the mean square of the scores, and what of it is missed."""
    made, total, left = torch.zeros_like(q), 0.0, 0.0
    if not q.shape[1]:
        return made, total, left
    root = _root(second)
    for head in range(len(q)):
        basis, inner = torch.linalg.qr((torch.cat([q[head], k[head]]) @ root).T)
        a, b = inner.split(q.shape[1], dim=1)
        whole = a @ b.T
        values, vectors = torch.linalg.eigh((whole + whole.T) / 2)
        best = values.argsort(descending=True)[: q.shape[1]]
        chosen = vectors[:, best] * values[best].clamp(min=0).sqrt()
        made[head, : len(best)] = torch.linalg.lstsq(root, basis @ chosen).solution.T
        total += float(whole.square().sum())
        left += float((whole - chosen @ chosen.T).square().sum())
    return made, total, left


def mean_form(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, weights: Tensor) -> Tensor:
    """W [H, d, d] of the mean score of q and k [H, D, d] over distances, which `mean_square` explains."""
    rotary = cos.shape[1]
    turned = k[:, :rotary].transpose(1, 2)
    # A key n tokens before its query is turned back by n.
    turned = turned * (weights @ cos) - rotate_half(turned) * (weights @ sin)
    return q.transpose(1, 2) @ torch.cat([turned.transpose(1, 2), k[:, rotary:]], dim=1)


def mean_square(q: Tensor, k: Tensor, second: Tensor, cos: Tensor, sin: Tensor, weights: Tensor) -> float:
    """Mean square of the scores of q and k [H, D, d], over heads' sum and distances.

    Args:
        cos, sin: [N, R] of the N distances, by which the first R dims of a key are turned back.
        weights: [N] of the distances; they sum to 1.
    """
    rest = q.shape[1] - cos.shape[1]
    cos, sin = torch.nn.functional.pad(cos, (0, rest), value=1.0), torch.nn.functional.pad(sin, (0, rest))
    both, mixed, sines = ((weights.unsqueeze(-1) * x).T @ y for x, y in ((cos, cos), (cos, sin), (sin, sin)))
    queries, keys = (x @ second @ x.transpose(1, 2) for x in (q, k))
    rotary = q.shape[1] - rest
    # Rows turned by a quarter; tr(R' A R B) with R = diag(cos) - diag(sin) J, entry by entry.
    quarter = torch.zeros_like(both)
    quarter[:rotary, :rotary] = rotate_half(torch.eye(rotary, dtype=q.dtype, device=q.device)).T
    once = quarter @ keys
    twice = once @ quarter.T
    return float((queries * (both * keys - mixed * once.transpose(1, 2) - mixed.T * once + sines * twice)).sum())


def form_square(whole: Tensor, second: Tensor) -> float:
    """Mean square of x_i W x_j, summed over W [H, d, d]."""
    return float(((second @ whole) * (whole @ second)).sum())


def triangular(whole: Tensor, second: Tensor) -> tuple[Tensor, float]:
    """Lower triangles T [H, d, d] with T T' nearest to W [H, d, d], and the mean square that is missed."""
    root = _root(second)
    made, left = [], 0.0
    for form in whole:
        seen = root @ form @ root
        values, vectors = torch.linalg.eigh((seen + seen.T) / 2)
        chosen = vectors * values.clamp(min=0).sqrt()
        # S^1/2 T T' S^1/2 is what was found: T' is the R of a QR of its root, brought back.
        upper = torch.linalg.qr(torch.linalg.solve(root, chosen).T).R
        made.append(upper.T)
        left += float((seen - chosen @ chosen.T).square().sum())
    return torch.stack(made).tril(), left


def _root(second: Tensor) -> Tensor:
    """The symmetric root of a second moment; directions that no token has get a little, so that it can be inverted."""
    values, vectors = torch.linalg.eigh(second)
    return vectors @ torch.diag(values.clamp(min=1e-8 * float(values[-1])).sqrt()) @ vectors.T
