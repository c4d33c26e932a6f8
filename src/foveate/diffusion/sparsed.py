"""SparseD: what a head looks at hardly changes while a text is denoised, so it is looked up once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.attention import ALL, Selection
from foveate.diffusion.denoise import Moment
from foveate.errors import BadArgument
from foveate.methods.policies.lists import top_lists


@dataclass(frozen=True, kw_only=True)
class SparseD:
    """The first steps of a generation read everything. The last of them also makes the lists that all later steps read:
    per layer, query head and block of queries, the key blocks with the largest mean probability. Blocks of the prompt
    and of what is generated are chosen apart, each a share of their own, the latter by a softmax over their keys alone;
    a block that holds tokens of both counts as generated.

    Args:
        ratio: of n blocks int(n * ratio) + 1 are read, as far as there are so many (paper: 0.3, and 0.5 for short
            prompts).
        skip: share of steps before the sparse ones; of S steps, steps 0 to int(S * skip) + 1 are dense.
        block: queries that share a list, and keys that are listed together (paper: 128, and 32 for short prompts).

    Differs from the released code: logits are scaled by the root of the head size, where the release for LLaDA takes
    the root of the number of heads; each part has a count of its own, where the release reads of the prompt what is
    among the best int(n * ratio) + 1 of all n blocks, which may be none; a block with tokens of both counts there as
    prompt, unless it is the last; and the mean of a short last block is taken there over a whole one. Making the lists
    costs all pairs once more, one block of queries at a time.

    Source: 2509.24014; released code for which steps are dense and the count of a part.
    """

    ratio: float = 0.3
    skip: float = 0.2
    block: int = 128

    def __post_init__(self) -> None:
        if not 0 <= self.ratio <= 1:
            raise BadArgument("ratio", self.ratio, "give a share of the blocks from 0 to 1")
        if not 0 <= self.skip <= 1:
            raise BadArgument("skip", self.skip, "give a share of the steps from 0 to 1")
        if self.block < 1:
            raise BadArgument("block", self.block, "give at least 1 token")

    def select(self, q: Tensor, k: Tensor, at: Moment, mine: dict[str, Tensor]) -> Selection:
        last = int(at.steps * self.skip) + 1
        if at.step > last:
            lists = mine["lists"]
            every = lists.shape[-1] == -(-k.shape[2] // self.block)
            return ALL if every else Selection(lists=lists, q_block=self.block, k_block=self.block)
        if at.step == last:
            mine["lists"] = self.lists(q, k, at.prompt)
        return ALL

    def lists(self, q: Tensor, k: Tensor, prompt: int) -> Tensor:
        """The key blocks that are read: int32 [B, H, nq, K], prompt before generated, each ascending.

        Args:
            q: [B, H, N, D], rotated; k: [B, Hk, N, D].
            prompt: tokens of the prompt, 0..N.
        """
        border = prompt // self.block
        blocks = -(-k.shape[2] // self.block)
        chosen = []
        if border:
            overall = block_means(q, k, self.block)[..., :border]
            chosen.append(top_lists(overall, self._count(border)))
        if border < blocks:
            generated = block_means(q, k[:, :, border * self.block :], self.block)
            chosen.append(top_lists(generated, self._count(blocks - border)) + border)
        return torch.cat(chosen, dim=-1)

    def _count(self, blocks: int) -> int:
        return min(blocks, int(blocks * self.ratio) + 1)


@torch.no_grad()
def block_means(q: Tensor, k: Tensor, block: int) -> Tensor:
    """Mean probability of each block of queries on each block of keys, every query seeing every key.

    Args:
        q: [B, H, N, D]; k: [B, Hk, M, D].
        block: tokens of a block; the last block of each may be shorter, and its mean is over the tokens it has.

    Returns:
        float32 [B, H, ceil(N / block), ceil(M / block)].
    """
    keys, grouped = k.float().unsqueeze(2).mT, q.float().unflatten(1, (k.shape[1], -1))
    short = -k.shape[2] % block
    sizes = torch.full((-(-k.shape[2] // block),), block, device=k.device)
    sizes[-1] -= short
    means = []
    for rows in grouped.split(block, dim=3):
        probs = (rows @ keys * q.shape[-1] ** -0.5).softmax(-1).mean(3)
        means.append(F.pad(probs, (0, short)).unflatten(-1, (-1, block)).sum(-1) / sizes)
    return torch.stack(means, dim=3).flatten(1, 2)
