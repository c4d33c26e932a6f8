"""Scores of chunks of different length, handed to their tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.methods.policies.probes import block_mean


def chunk_scores(q: Tensor, k: Tensor, starts: Tensor, block: int) -> Tensor:
    """What each block of queries thinks of each token, by the token's chunk: float32 [query blocks, m].

    Args:
        q: [H, n, D]; k: [Hs, m, D]; starts: first tokens of the chunks, ascending, 0 at the front.

    Source: DHSA (2510.24606), section 3: means over tokens and heads, times the square root of the tokens' number.
    """
    n, m = q.shape[1], k.shape[1]
    asked = block_mean(q.float().mean(0, keepdim=True), block)[0]
    sizes = torch.full((len(asked), 1), float(block), device=q.device)
    sizes[-1] = n - (len(asked) - 1) * block
    # Differences of long sums: in float32 they would lose what tells short chunks apart.
    sums = F.pad(k.double().mean(0).cumsum(0), (0, 0, 1, 0))
    bounds = torch.cat([starts, starts.new_tensor([m])])
    lengths = bounds.diff().unsqueeze(1)
    chunks = ((sums[bounds[1:]] - sums[starts]) / lengths.sqrt()).float()  # mean times sqrt(length)
    of = torch.searchsorted(starts, torch.arange(m, device=k.device), right=True) - 1
    return (asked * sizes.sqrt() @ chunks.T)[:, of]
