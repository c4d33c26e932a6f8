"""Presets of sparse query attention (arXiv 2510.01817, section 3): the numbers of a head-mapped layer.

Each takes the head count H and head dim D that the model would have without it; D stays, the number of query heads
shrinks. What comes back is what `build("head-mapped", config, layer, spec)` and `models.converted.replace` take.
"""

from __future__ import annotations

from typing import Any

from foveate.errors import BadArgument


def sparse_query(
    heads: int, head_dim: int, query_heads: int, kv_heads: int, window: int | None = None
) -> dict[str, Any]:
    """`query_heads` of `heads` query heads over `kv_heads` key-value heads; the larger number must be a multiple of the
    smaller.

    With fewer query than key-value heads (reverse SQA) each query head is used with several key-value heads.

    Raises:
        BadArgument: numbers that do not divide, or more heads than there are.
    """
    for name, value in (("query_heads", query_heads), ("kv_heads", kv_heads)):
        if not 1 <= value <= heads:
            raise BadArgument(name, value, f"give 1 to heads={heads}")
    large, small = max(query_heads, kv_heads), min(query_heads, kv_heads)
    if large % small:
        raise BadArgument("kv_heads", kv_heads, f"it and query_heads={query_heads} must divide one another")
    spec: dict[str, Any] = {
        "num_heads": large,
        "num_k_heads": kv_heads,
        "num_v_heads": kv_heads,
        "head_dim": head_dim,
        "window": window,
    }
    if query_heads < kv_heads:
        spec |= {"num_q_heads": query_heads, "query_map": [h * query_heads // large for h in range(large)]}
    return spec


def sqa(heads: int, head_dim: int) -> dict[str, Any]:
    """H / 2 query heads, H / 4 key-value heads."""
    return sparse_query(heads, head_dim, _share(heads, 2), _share(heads, 4))


def ssqa(heads: int, head_dim: int) -> dict[str, Any]:
    """Symmetric: H / 2 query and key-value heads."""
    return sparse_query(heads, head_dim, _share(heads, 2), _share(heads, 2))


def xsqa(heads: int, head_dim: int) -> dict[str, Any]:
    """Extreme: H / 4 query and key-value heads."""
    return sparse_query(heads, head_dim, _share(heads, 4), _share(heads, 4))


def xsmqa(heads: int, head_dim: int) -> dict[str, Any]:
    """Extreme with one key-value head: H / 4 query heads."""
    return sparse_query(heads, head_dim, _share(heads, 4), 1)


def lsqa(heads: int, head_dim: int) -> dict[str, Any]:
    """Light: 3 H / 4 query heads, H / 4 key-value heads."""
    return sparse_query(heads, head_dim, 3 * _share(heads, 4), _share(heads, 4))


def rsqa(heads: int, head_dim: int) -> dict[str, Any]:
    """Reverse: H / 4 query heads, each used with two of H / 2 key-value heads."""
    return sparse_query(heads, head_dim, _share(heads, 4), _share(heads, 2))


def swsqa(heads: int, head_dim: int, window: int = 128) -> dict[str, Any]:
    """`sqa` within a sliding window."""
    return sqa(heads, head_dim) | {"window": window}


def _share(heads: int, parts: int) -> int:
    if heads % parts:
        raise BadArgument("heads", heads, f"give a multiple of {parts}, or name the numbers yourself (sparse_query)")
    return heads // parts
