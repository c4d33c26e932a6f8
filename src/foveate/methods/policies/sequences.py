"""Going through a batch sequence by sequence, where what is chosen must not depend on the batch's padding."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from foveate.cache import View


class Sequence(NamedTuple):
    """Store heads of one row that hold equally many tokens.

    Attributes:
        row: index in the batch.
        stores, heads: int tensors: the store heads, and the query heads that read them, in the same order.
        keys, queries: m and n: the n queries are the last of the m keys.
    """

    row: int
    stores: Tensor
    heads: Tensor
    keys: int
    queries: int


def sequences(view: View, num_heads: int) -> Iterator[Sequence]:
    """The rows that have queries; heads that hold more or fewer tokens than others of their row come apart."""
    lengths, fresh = view.host_lengths, view.host_fresh
    device = view.lengths.device
    group = num_heads // lengths.shape[1]
    for row in range(lengths.shape[0]):
        if not fresh[row]:
            continue
        for m in np.unique(lengths[row]).tolist():
            stores = torch.from_numpy(np.flatnonzero(lengths[row] == m)).to(device)
            heads = (stores[:, None] * group + torch.arange(group, device=device)).flatten()
            yield Sequence(row, stores, heads, m, int(fresh[row]))
