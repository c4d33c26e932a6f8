"""The two ways to lay out the pairs that a rotary embedding turns, and how rows go from one to the other.

Llama's checkpoints are half-split: of D dims, i and i + D / 2 are a pair. DeepSeek's are interleaved: 2i and 2i + 1.
Both turn pair i by the same angle, so queries and keys may change their layout together and no score changes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.errors import BadArgument


def interleaving(rotary_dim: int, dim: int | None = None, first: int = 0) -> Tensor:
    """Indices [dim] such that x[indices] is interleaved where x is half-split; what is not rotated stays in place.

    Args:
        rotary_dim: how many dims are rotated.
        dim: of x; rotary_dim if None.
        first: where the rotated dims begin: 0 in Llama's family, dim - rotary_dim in DeepSeek's.

    Raises:
        BadArgument: an odd number of rotated dims, or more than there are.
    """
    dim = rotary_dim if dim is None else dim
    if rotary_dim < 0 or rotary_dim % 2 or first < 0 or first + rotary_dim > dim:
        raise BadArgument("rotary_dim", rotary_dim, f"give an even number of dims that fit into {dim} from {first} on")
    indices = torch.arange(dim)
    pairs = indices[first : first + rotary_dim].reshape(2, -1)
    indices[first : first + rotary_dim] = pairs.T.flatten()
    return indices


def half_splitting(rotary_dim: int, dim: int | None = None, first: int = 0) -> Tensor:
    """The inverse of `interleaving`: indices [dim] such that x[indices] is half-split where x is interleaved."""
    return interleaving(rotary_dim, dim, first).argsort()


def interleaved(rows: Tensor, rotary_dim: int, axis: int = -2, first: int = 0) -> Tensor:
    """Half-split rows laid out interleaved.

    Args:
        rows: such as a head's weights [..., D, d] (axis -2), or its biases or gains [..., D] (axis -1).
        rotary_dim, first: which dims along the axis are rotated, as for `interleaving`.
    """
    return rows.index_select(axis, interleaving(rotary_dim, rows.shape[axis], first).to(rows.device))


def half_split(rows: Tensor, rotary_dim: int, axis: int = -2, first: int = 0) -> Tensor:
    """Interleaved rows laid out half-split: the inverse of `interleaved`."""
    return rows.index_select(axis, half_splitting(rotary_dim, rows.shape[axis], first).to(rows.device))
