"""The search of `neighbours.walk`, compiled: one query after the other, where products are made as keys are found."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from foveate.methods.policies.native import jit


def search(
    q: Tensor, keys: Tensor, edges: Tensor, entries: Tensor, k: int, beam: int, steps: int
) -> tuple[Tensor, Tensor]:
    """See `neighbours.walk`; `steps` keys are looked at in one round.

    Returns:
        the best keys, int64 [B, H, N, min(k, A)], -1 where there are fewer; keys that were found, int64 [B, H, N].
    """
    batch, heads, queries, dim = q.shape
    stores, count = keys.shape[1:3]
    rows = q.detach().reshape(batch, stores, -1, dim).float().numpy()
    narrow = keys.dtype == torch.bfloat16
    bits = (keys.detach().view(torch.uint16) if narrow else keys.detach().float().view(torch.uint32)).numpy()
    links, first = (x.to(torch.int32).numpy() for x in (edges, entries))
    best = np.empty((*rows.shape[:3], min(k, count)), dtype=np.int64)
    scanned = np.empty(rows.shape[:3], dtype=np.int64)
    for at in np.ndindex(batch, stores):  # each lies in one piece, which all of them together need not
        stored, graph = (np.ascontiguousarray(x[at]) for x in (bits, links))
        options = min(max(beam, k), count), steps, 16 if narrow else 0
        _search(rows[at], stored, graph, np.ascontiguousarray(first[at]), *options, best[at], scanned[at])
    shape = (batch, heads, queries)
    return torch.from_numpy(best).view(*shape, min(k, count)), torch.from_numpy(scanned).view(shape)


@jit()
def _search(q, keys, edges, entries, beam, steps, shift, best, scanned):
    """All queries of one store: float32 [n, D].

    Args:
        keys: the bits of keys [A, D], of which `shift` are left out.
        edges: int32 [A, R]; entries: int32 [E].
        best: int64 [n, k], scanned: int64 [n], both written.
    """
    count, width = edges.shape
    found_by = np.full(count, -1, dtype=np.int32)  # the last query that came by a key
    most = max(steps * width, len(entries))
    # The beam in order, and behind it room for what falls out; what a round adds to it.
    number, value = np.empty(beam + most, dtype=np.int32), np.empty(beam + most, dtype=np.float32)
    looked = np.empty(beam + most, dtype=np.bool_)
    new_number, new_value = np.empty(most, dtype=np.int32), np.empty(most, dtype=np.float32)
    fresh = np.empty(most + 1, dtype=np.int32)  # one more: what is seen again is written behind the end
    bits = np.empty(q.shape[1], dtype=np.uint32)
    key = bits.view(np.float32)
    node, fetched = np.empty(steps, dtype=np.int32), np.empty(2, dtype=np.int64)
    for n in range(len(q)):
        size = _unseen(entries, n, found_by, fresh, 0)
        filled, seen, first, bound = 0, 0, 0, np.float32(-np.inf)
        while True:
            seen += size
            new = 0
            fetched[0] = _fetched(keys, fresh, size)
            for i in range(size):
                x = fresh[i]
                for d in range(len(bits)):
                    bits[d] = np.uint32(keys[x, d]) << np.uint32(shift)
                v = _product(q[n], key)
                if v > bound:  # of equal keys the first found is the better one, of one round's that of lower number
                    at = new
                    while at > 0 and (new_value[at - 1] < v or (new_value[at - 1] == v and new_number[at - 1] > x)):
                        new_value[at], new_number[at] = new_value[at - 1], new_number[at - 1]
                        at -= 1
                    new_value[at], new_number[at] = v, x
                    new += 1
            old, at = filled - 1, filled + new - 1
            filled = min(filled + new, beam)
            while new > 0:
                if old >= 0 and value[old] < new_value[new - 1]:
                    value[at], number[at], looked[at] = value[old], number[old], looked[old]
                    old -= 1
                else:
                    value[at], number[at], looked[at] = new_value[new - 1], new_number[new - 1], False
                    new -= 1
                at -= 1
            first = min(first, old + 1)  # those before it have all been looked at
            if filled == beam:
                bound = value[beam - 1]
            size, turn = 0, 0
            while first < filled and turn < steps:
                if not looked[first]:
                    looked[first] = True
                    node[turn] = number[first]
                    turn += 1
                first += 1
            if turn == 0:
                break
            fetched[1] = _fetched(edges, node, turn)
            for i in range(turn):
                size = _unseen(edges[node[i]], n, found_by, fresh, size)
        scanned[n] = seen
        for i in range(best.shape[1]):
            best[n, i] = number[i] if i < filled else -1


@jit()
def _unseen(listed, n, found_by, fresh, size):
    """Adds to `fresh`, which holds `size`, what of the keys listed query n did not come by yet."""
    for i in range(len(listed)):
        x = listed[i]
        if 0 <= x < len(found_by):
            fresh[size] = x
            size += found_by[x] != n
            found_by[x] = n
    return size


@jit()
def _fetched(table, wanted, size):
    """Numbers out of every line of memory that `size` of the wanted rows lie in: so a processor fetches many lines at
    once, where it would fetch one after the other as each row is worked on. The sum is of no use."""
    total = np.int64(0)
    for i in range(size):
        for at in range(0, table.shape[1], 64 // table.itemsize):
            total ^= table[wanted[i], at]
    return total


@jit(fastmath={"reassoc", "contract"})  # a sum in parts
def _product(a, b):
    total = np.float32(0)
    for i in range(len(a)):
        total += a[i] * b[i]
    return total
