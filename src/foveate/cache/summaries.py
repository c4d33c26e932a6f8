"""What blocks of slots are summarised by."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from foveate.cache.state import Blocks


def minmax(k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    """The fold of a block of keys to their channel-wise minimum and maximum, which kernels know.

    Args:
        k: [P, n, size, D]; valid: [P, n, size].

    Returns:
        [P, n, 2 D], minima first; zeros for a block without tokens.
    """
    inside = valid.unsqueeze(-1)
    low = k.masked_fill(~inside, torch.inf).amin(2)
    high = k.masked_fill(~inside, -torch.inf).amax(2)
    return torch.cat([low, high], dim=-1).masked_fill(~valid.any(-1, keepdim=True), 0.0)


class Summaries(dict[str, Tensor]):
    """By name one summary per block of slots, [P, n, F]; there may be room for more blocks than hold tokens."""

    def refold(
        self,
        declared: Mapping[str, Blocks],
        start: int,
        used: int,
        lengths: Tensor,
        keys: Callable[[int], Tensor],
        values: Callable[[int], Tensor],
    ) -> bool:
        """Recompute every block that holds a slot >= start. True if something was allocated anew.

        Args:
            used: slots of the longest pair; lengths: of each, int [P].
            keys, values: (first slot) -> [P, used - first, D].
        """
        grown = False
        for name, spec in declared.items():
            first, total = start // spec.size, -(-used // spec.size)
            kept = self.get(name)
            if total <= first and kept is not None and kept.shape[1] >= total:
                continue
            lo, hi = first * spec.size, total * spec.size
            slot = torch.arange(lo, hi, device=lengths.device)
            shape = (len(lengths), total - first, spec.size)
            valid = (slot < lengths[:, None]).view(shape)
            k, v = (_filled_up(side(lo), hi - lo) for side in (keys, values))
            fresh = spec.fold(k.reshape(*shape, k.shape[-1]), v.reshape(*shape, v.shape[-1]), valid)
            if kept is None or kept.shape[1] < total:
                room = total + (max(1, total // 16) if kept is not None else 0)
                bigger = fresh.new_zeros(len(lengths), room, fresh.shape[-1])
                if kept is not None:
                    bigger[:, : min(first, kept.shape[1])] = kept[:, :first]
                kept, grown = bigger, True
            kept[:, first:total] = fresh
            self[name] = kept
        return grown

    def pick(self, pairs: Tensor) -> Summaries:
        """A copy with pairs taken (and repeated) in the order given."""
        return Summaries({name: x.index_select(0, pairs) for name, x in self.items()})

    def reserve(self, declared: Mapping[str, Blocks], slots: int) -> bool:
        """Room for the blocks of so many slots. True if something was allocated anew."""
        grown = False
        for name, spec in declared.items():
            kept, blocks = self[name], -(-slots // spec.size)
            if kept.shape[1] < blocks:
                bigger = kept.new_zeros(kept.shape[0], blocks, kept.shape[2])
                bigger[:, : kept.shape[1]] = kept
                self[name], grown = bigger, True
        return grown


def _filled_up(x: Tensor, width: int) -> Tensor:
    if x.shape[1] == width:
        return x
    out = x.new_zeros(x.shape[0], width, x.shape[2])
    out[:, : x.shape[1]] = x
    return out
