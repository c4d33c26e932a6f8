"""What `query_graphs` makes of the products of queries and keys, compiled, for one set of keys."""

from __future__ import annotations

import numpy as np

from foveate.methods.policies.native import jit

# Numbers that are ordered by two things, the heavier one first, are one number.
LOW = 32
NUMBER = (1 << LOW) - 1


@jit()
def largest(score, best):
    """The columns of the k largest numbers of each row of score, float32 [n, A], of equal ones the first, into best,
    int64 [n, k] with k <= A: the very largest first, the others in no order."""
    (rows, count), k = score.shape, best.shape[1]
    ordered, bits = np.empty(count, dtype=np.int32), score.view(np.int32)
    parts = max(1, min(16, count // (3 * k)))
    tops = np.empty(count // parts, dtype=np.int32)
    above = np.zeros((count + 7) // 8 * 8, dtype=np.uint8)
    eights = above.view(np.uint64)
    found, value = np.empty(count + 1, dtype=np.int64), np.empty(count, dtype=np.int32)
    for r in range(rows):
        for i in range(count):
            ordered[i] = _ordered(bits[r, i])
        tops[:] = ordered[: len(tops)]
        for start in range(len(tops), parts * len(tops), len(tops)):
            part = ordered[start : start + len(tops)]
            for i in range(len(tops)):
                tops[i] = max(tops[i], part[i])
        # The k-th largest of the parts' largest is no larger than the k-th of all.
        bound = _kth(tops, k, 2)
        for i in range(count):
            above[i] = ordered[i] >= bound
        size = 0
        for eight in range(len(eights)):
            if eights[eight]:
                for i in range(8 * eight, 8 * eight + 8):
                    found[size] = i
                    size += above[i]
        for i in range(size):
            value[i] = ordered[found[i]]
        bound = _kth(value[:size], k, 0)
        equal = k
        for i in range(size):
            equal -= value[i] > bound
        place, top = 0, 0
        for i in range(size):
            if value[i] > bound or (value[i] == bound and equal > 0):
                equal -= value[i] == bound
                best[r, place] = found[i]
                if value[i] > ordered[best[r, top]]:
                    top = place
                place += 1
        best[r, 0], best[r, top] = best[r, top], best[r, 0]


@jit()
def _ordered(bits):
    """A whole number in place of a float: in the same order, and a processor compares several of these at once."""
    return np.int32(bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF)))


@jit()
def _kth(x, k, slack):
    """A number that at least k and at most k + slack of x, int32 [n], reach or exceed; the k-th largest where equal
    ones leave no such number."""
    low, high = np.int64(x[0]), np.int64(x[0])
    for i in range(len(x)):
        low, high = min(low, x[i]), max(high, x[i])
    high += 1
    while high - low > 1:
        middle = np.int32((low + high) >> 1)
        reached = 0
        for i in range(len(x)):
            reached += x[i] >= middle
        if reached < k:
            high = np.int64(middle)
        else:
            low = np.int64(middle)
            if reached <= k + slack:
                break
    return np.int32(low)


@jit()
def shared(best, count, width):
    """See `query_graphs._shared`: best, int64 [n, knn], are each query's best keys of `count`, the very best first.

    Returns:
        of how many queries each key is the best, int64 [A]; the keys that share most with it, int64 [A, width].
    """
    queries, knn = best.shape
    pivots, first, asked = _by_number(best[:, 0].copy(), count)
    # Links from the best key to others, and of how many queries; each is a link of either key.
    one, other = np.empty(queries * knn, dtype=np.int64), np.empty(queries * knn, dtype=np.int64)
    times = np.empty(queries * knn, dtype=np.int64)
    counted, met, links = np.zeros(count, dtype=np.int64), np.empty(count, dtype=np.int64), 0
    for key in range(count):
        size = 0
        for i in range(first[key], first[key + 1]):
            for place in range(1, knn):
                b = best[asked[i], place]
                if counted[b] == 0:
                    met[size] = b
                    size += 1
                counted[b] += 1
        for i in range(size):
            one[links], other[links], times[links] = key, met[i], counted[met[i]]
            counted[met[i]] = 0
            links += 1
    _, first, by_other = _by_number(other[:links], count)
    table, codes = np.full((count, width), -1, dtype=np.int64), np.empty(width, dtype=np.int64)
    link = 0
    for key in range(count):
        size, kept = 0, 0
        while link < links and one[link] == key:
            met[size], counted[other[link]] = other[link], times[link]
            size += 1
            link += 1
        for i in range(first[key], first[key + 1]):
            b = one[by_other[i]]
            if counted[b] == 0:
                met[size] = b
                size += 1
            counted[b] += times[by_other[i]]
        for i in range(size):
            kept = _inserted(codes, kept, ((queries - counted[met[i]]) << LOW) | met[i])
            counted[met[i]] = 0
        for i in range(kept):
            table[key, i] = codes[i] & NUMBER
    return pivots, table


@jit()
def near(table, best, width):
    """See `query_graphs._nearest`: of each key the nearest ones and those it is nearest to, by rank, int64 [A, width].

    Args:
        table: how near two keys are, float32 [A, A].
        best: the columns of the largest numbers of each row, int64 [A, n], which are put in order.
    """
    count, n = best.shape
    bits, codes = table.view(np.int32), np.empty(n, dtype=np.int64)
    for key in range(count):
        for i in range(n):
            b = best[key, i]
            _inserted(codes, i, (-np.int64(_ordered(bits[key, b])) << LOW) | b)
        for i in range(n):
            best[key, i] = codes[i] & NUMBER
    _, first, ranks = _by_number(best.reshape(-1), count)
    near, codes = np.full((count, width), -1, dtype=np.int64), np.empty(width, dtype=np.int64)
    rank = np.full(count, n, dtype=np.int64)
    for key in range(count):
        kept = 0
        for i in range(n):
            rank[best[key, i]] = i
        for i in range(first[key], first[key + 1]):
            b, other = ranks[i] // n, ranks[i] % n
            if other < rank[b] and b != key:
                if rank[b] < n:
                    rank[b] = other
                else:
                    kept = _inserted(codes, kept, (other << LOW) | b)
        for i in range(n):
            b = best[key, i]
            if b != key:
                kept = _inserted(codes, kept, (rank[b] << LOW) | b)
            rank[b] = n
        for i in range(kept):
            near[key, i] = codes[i] & NUMBER
    return near


@jit()
def chosen(table, half, candidates, near, degree):
    """The edges of `query_graphs.query_graph`, int32 [A, degree + 1].

    Args:
        table: products of keys, less half[b] in column b, float32 [A, A]; half: float32 [A].
        candidates, near: numbers of keys, the best first, -1 behind the end.
    """
    count, width = candidates.shape
    edges = np.full((count, degree + 1), -1, dtype=np.int32)
    own, alive = np.empty(width, dtype=np.float32), np.empty(width, dtype=np.bool_)
    for key in range(count):
        for i in range(width):
            alive[i] = candidates[key, i] >= 0
            own[i] = table[key, candidates[key, i]] - half[key]
        kept = 0
        for i in range(width):
            if kept == degree - degree // 4:
                break
            if alive[i]:
                taken = candidates[key, i]
                edges[key, kept] = taken
                kept += 1
                for j in range(i + 1, width):
                    if alive[j]:
                        alive[j] = table[taken, candidates[key, j]] - half[taken] <= own[j]
        spread = kept
        for i in range(near.shape[1]):
            again = near[key, i] < 0 or kept == degree
            for j in range(spread):
                again |= edges[key, j] == near[key, i]
            if not again:
                edges[key, kept] = near[key, i]
                kept += 1
        edges[key, degree] = (key + 1) % count
    return edges


@jit()
def _by_number(x, count):
    """How often each of `count` numbers is among x [n]; where its places begin in the third, [count + 1]; the places of
    all, in order of their numbers."""
    times, first = np.zeros(count, dtype=np.int64), np.zeros(count + 1, dtype=np.int64)
    for number in x:
        times[number] += 1
    first[1:] = np.cumsum(times)
    places, at = np.empty(len(x), dtype=np.int64), first[:-1].copy()
    for place, number in enumerate(x):
        places[at[number]] = place
        at[number] += 1
    return times, first, places


@jit()
def _inserted(codes, size, code):
    """How many of the smallest numbers `codes` holds, in order, when one more is offered."""
    if size == len(codes):
        if code >= codes[size - 1]:
            return size
        size -= 1
    at = size
    while at > 0 and codes[at - 1] > code:
        codes[at] = codes[at - 1]
        at -= 1
    codes[at] = code
    return size + 1
