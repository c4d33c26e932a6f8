"""Graphs over keys that follow queries: made when the prompt is over, searched at each step (`neighbours.walk`).

They are made where the keys are. On a processor that is one (row, kv head) after the other, whose scores stay in its
caches, by compiled loops where there are any; on a device many at once, which is asked for few and large products,
sorts and lookups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from foveate.methods.policies.native import native
from foveate.methods.policies.orders import Best, counted, in_order, on_processor, ranked

ENTRIES = 8
"""Keys at which a search in a graph begins."""
TOGETHER = 1 << 28
"""Products of keys that are held at once (float32). Those of a set with more are made anew where they are needed."""
IN_CACHE = 1 << 20
"""Scores that are looked through at once on a processor."""

Dots = Callable[[Tensor, Tensor], Tensor]
"""Products of keys a [n], which count over all sets, with keys b [n, C] of the same set each, which count within it:
[n, C], up to a term that b alone decides."""


def query_graph(keys: Tensor, queries: Tensor, knn: int, degree: int) -> dict[str, Tensor]:
    """A graph over keys [A, D] that follows queries [n, D]: keys near the same query are neighbours, however far apart
    they lie themselves.

    Of each query's `knn` best keys the best is linked with all others. Every key keeps the neighbours it shares most
    queries with, none of which is nearer to a kept one than to the key itself; what is left of its `degree` goes to the
    nearest keys. A ring over all keys makes each reachable.

    Returns:
        edges: int32 [A, degree + 1], -1 behind the end; entries: int32 [ENTRIES], the best keys of most queries.

    Source: RetrievalAttention (2409.10516) section 3.2, after RoarGraph.
    """
    return query_graphs([keys], [queries], knn, degree)[0]


def query_graphs(keys: Sequence[Tensor], queries: Sequence[Tensor], knn: int, degree: int) -> list[dict[str, Tensor]]:
    """`query_graph` of several sets of keys, each with queries of its own."""
    made, finder = [], Best()
    for bunch in _bunches(keys):
        first, loops = bunch[0], native("graphs") if on_processor(keys[bunch[0]]) else None
        if loops is not None and len(bunch) == 1 and len(keys[first]) ** 2 <= TOGETHER:
            made.append(_compiled(keys[first], queries[first], knn, degree, finder, loops))
            continue
        counts = [len(keys[i]) for i in bunch]
        stored, real = _padded([keys[i] for i in bunch])
        asked, some = _padded([queries[i] for i in bunch])
        pivots, candidates = _shared(stored, real, asked, some, knn, 2 * degree, finder)
        # Where the keys lie makes no difference to how far apart they are, but to how exactly that can be told.
        middle = stored.sum(1, keepdim=True) / real.sum(1)[:, None, None]
        centred = (stored - middle).masked_fill_(~real.unsqueeze(-1), 0)
        half = centred.square().sum(-1) / 2
        near, dots = _nearest(centred, half.masked_fill(~real, torch.inf), degree, finder)
        projected = _spread_out(dots, half.flatten(), stored.shape[1], candidates, degree - degree // 4)
        edges = _first_unique(projected, near, degree).unflatten(0, (len(bunch), -1))
        popular = pivots.masked_fill(~real, -1).argsort(dim=1, descending=True, stable=True)[:, :ENTRIES]
        for own, entries, count in zip(edges, popular, counts, strict=True):
            ring = (torch.arange(count, device=own.device) + 1) % count
            whole = torch.cat([own[:count], ring[:, None]], dim=1)
            entries = F.pad(entries[:count], (0, ENTRIES - len(entries[:count])), value=-1)
            made.append({"edges": whole.to(torch.int32), "entries": entries.to(torch.int32)})
    return made


def _compiled(keys: Tensor, queries: Tensor, knn: int, degree: int, finder: Best, loops: Any) -> dict[str, Tensor]:
    """`query_graph` by the loops of `native_graphs`."""
    stored, asked, count = keys.detach().float(), queries.detach().float(), len(keys)
    step, best = _at_once(stored[None]), torch.empty(len(asked), min(knn, count), dtype=torch.long)
    room = finder.scores((step, count), stored)
    for part, into in zip(asked.split(step), best.split(step), strict=True):
        loops.largest(torch.mm(part, stored.T, out=room[: len(part)]).numpy(), into.numpy())
    pivots, candidates = loops.shared(best.numpy(), count, 2 * degree)
    centred = stored - stored.mean(0)
    half = centred.square().sum(-1) / 2
    table, best = (
        finder.scores((count, count), stored),
        torch.empty(count, max(1, min(degree, count - 1)), dtype=torch.long),
    )
    for start in range(0, count, step):
        score = torch.addmm(-half, centred[start : start + step], centred.T, out=table[start : start + step])
        score.diagonal(offset=start).fill_(-torch.inf)
        loops.largest(score.numpy(), best[start : start + step].numpy())
    near = loops.near(table.numpy(), best.numpy(), degree)
    edges = torch.from_numpy(loops.chosen(table.numpy(), half.numpy(), candidates, near, degree))
    popular = torch.from_numpy(pivots).argsort(descending=True, stable=True)[:ENTRIES]
    return {"edges": edges, "entries": F.pad(popular, (0, ENTRIES - len(popular)), value=-1).to(torch.int32)}


def _bunches(keys: Sequence[Tensor]) -> Iterator[range]:
    """Which sets of keys are dealt with together."""
    first, longest = 0, 0
    for i, some in enumerate(keys):
        longest = max(longest, len(some))
        if i > first and (on_processor(some) or (i + 1 - first) * longest**2 > TOGETHER):
            yield range(first, i)
            first, longest = i, len(some)
    if keys:
        yield range(first, len(keys))


def _padded(parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Rows of several tensors [n, D] as float32 [parts, most, D], and which are real."""
    whole = pad_sequence([part.detach() for part in parts], batch_first=True).float()
    counts = torch.tensor([len(part) for part in parts], device=whole.device)
    return whole, torch.arange(whole.shape[1], device=whole.device) < counts[:, None]


def _at_once(stored: Tensor) -> int:
    """Of the rows of scores with each set of keys [sets, A, D], how many are made at once."""
    return max(16, (IN_CACHE if on_processor(stored) else TOGETHER) // (stored.shape[0] * stored.shape[1]))


def _firsts(sets: int, count: int, rows: int, device: torch.device) -> Tensor:
    """For `rows` rows of each set, what its keys count from: [sets * rows, 1]."""
    return (torch.arange(sets, device=device) * count).repeat_interleave(rows)[:, None]


def _shared(
    stored: Tensor, real: Tensor, asked: Tensor, some: Tensor, knn: int, width: int, finder: Best
) -> tuple[Tensor, Tensor]:
    """Of how many queries each key is the best, [sets, A]; and the keys that share most queries with it, the most
    first: [sets * A, width], numbered within their set, -1 behind the end.

    Args:
        stored, asked: keys [sets, A, D] and queries [sets, n, D], of which `real` and `some` are no padding.
    """
    sets, count, _ = stored.shape
    other, step, found = stored.transpose(1, 2), _at_once(stored), []
    for part in asked.split(step, dim=1):
        score = torch.bmm(part, other, out=finder.scores((sets, part.shape[1], count), part))
        if sets > 1:
            score.masked_fill_(~real.unsqueeze(1), -torch.inf)
        found.append(_columns(score, min(knn, count), finder))
    best, value = (torch.cat(parts, dim=1).flatten(0, 1) for parts in zip(*found, strict=True))
    most, bits, there = asked.shape[1], count.bit_length(), some.reshape(-1, 1)
    pivot, first = best.gather(1, value.argmax(1, keepdim=True)), _firsts(sets, count, most, best.device)
    pivots = torch.zeros(sets * count, dtype=torch.long, device=best.device)
    pivots.scatter_add_(0, (first + pivot).squeeze(1), there.squeeze(1).long())
    best = torch.where(there & (value > -torch.inf), best, pivot)  # a link to itself is none
    link, shared = counted((((first + torch.minimum(best, pivot)) << bits) | torch.maximum(best, pivot)).flatten())
    return pivots.view(sets, count), _both_ways(link, most - shared, most, sets, count, width)


def _nearest(centred: Tensor, half: Tensor, degree: int, finder: Best) -> tuple[Tensor, Dots]:
    """The keys nearest to each key and those it is nearest to, by rank: [sets * A, degree], numbered within their set,
    -1 behind the end; and the products of keys.

    Args:
        centred: keys [sets, A, D]; half: half the squares of their lengths [sets, A], infinite for padding.
    """
    sets, count, _ = centred.shape
    other, step, found = centred.transpose(1, 2), _at_once(centred), []
    whole = sets * count**2 <= TOGETHER
    room = finder.scores((sets, count, count) if whole else (sets, step, count), centred)
    for start in range(0, count, step):
        part = centred[:, start : start + step]
        score = room[:, start : start + step] if whole else room[:, : part.shape[1]]
        torch.baddbmm(-half.unsqueeze(1), part, other, out=score)  # the nearer, the more
        score.diagonal(offset=start, dim1=1, dim2=2).fill_(-torch.inf)
        found.append(_columns(score, max(1, min(degree, count - 1)), finder))
    best, value = (torch.cat(parts, dim=1).flatten(0, 1) for parts in zip(*found, strict=True))
    value, order = value.sort(dim=1, descending=True, stable=True)
    own, first = (
        torch.arange(count, device=best.device).repeat(sets)[:, None],
        _firsts(sets, count, count, best.device),
    )
    best = torch.where((value > -torch.inf) & half.isfinite().reshape(-1, 1), best.gather(1, order), own)
    bits, low = count.bit_length(), degree.bit_length()
    link = ((first + torch.minimum(best, own)) << bits) | torch.maximum(best, own)
    code = in_order(((link << low) | torch.arange(best.shape[1], device=best.device)).flatten())
    link, rank = code >> low, code & ((1 << low) - 1)
    better = F.pad(link[1:] != link[:-1], (1, 0), value=True)  # of the ranks that two keys have for each other
    # Links both ways: who is near to nobody's query can be reached by those that are near to it.
    near = _both_ways(link[better], rank[better], degree, sets, count, degree)
    if whole:
        flat = room.view(-1)
        return near, lambda a, b: flat.index_select(0, (a[:, None] * count + b).view(-1)).view_as(b)
    return near, lambda a, b: _made_anew(centred.flatten(0, 1), a, b + (a - a % count)[:, None])


def _made_anew(keys: Tensor, one: Tensor, others: Tensor) -> Tensor:
    """Products of keys one [n] with others [n, C], both rows of keys [A, D]: [n, C]."""
    most = IN_CACHE if on_processor(keys) else TOGETHER // 4
    step = max(1, most // (others.shape[1] * keys.shape[1]))
    parts = zip(one.split(step), others.split(step), strict=True)
    return torch.cat([torch.bmm(keys[b], keys[a].unsqueeze(2)).squeeze(2) for a, b in parts])


def _columns(score: Tensor, k: int, finder: Best) -> tuple[Tensor, Tensor]:
    """The columns of the k best scores [sets, n, A] of each row, and these: [sets, n, k]."""
    rows = score.flatten(0, 1)
    best = finder.columns(rows, k)
    return best.unflatten(0, score.shape[:2]), rows.gather(1, best).unflatten(0, score.shape[:2])


def _both_ways(link: Tensor, weight: Tensor, most: int, sets: int, count: int, width: int) -> Tensor:
    """Links one -> other and back as a table of `ranked`, [sets * A, width]. In a link, one counts over all sets, other
    within its set, and other is not below one; a key's link to itself is none."""
    bits = count.bit_length()
    one, other = link >> bits, link & ((1 << bits) - 1)
    first = one - one % count
    linked = one - first != other
    one, other, first, weight = one[linked], other[linked], first[linked], weight[linked]
    source, target = torch.cat([one, first + other]), torch.cat([other, one - first])
    return ranked(source, target, weight.repeat(2), (sets * count, count, most), width)


def _spread_out(dots: Dots, half: Tensor, count: int, candidates: Tensor, most: int) -> Tensor:
    """Of each key's candidates [keys, C], in order, at most `most` that are nearer to it than to those taken before.

    Args:
        half: half the square of each key's length, [keys].
        count: keys of a set.
    """
    kept = torch.full((len(candidates), most), -1, dtype=torch.long, device=candidates.device)
    width = candidates.shape[1]
    order = torch.arange(width, dtype=torch.int16, device=candidates.device)
    step = max(1, (IN_CACHE if on_processor(candidates) else TOGETHER // 16) // width)
    for start in range(0, len(candidates), step):
        some = candidates[start : start + step]
        row = torch.arange(start, start + len(some), device=some.device)
        alive, some = some >= 0, some.clamp_min(0)
        own = dots(row, some) - half[row, None]  # the nearer, the more
        for place in range(most):
            first = torch.where(alive, order, width).amin(1)
            left = first < width
            if not bool(left.all()):
                row, some, alive, own, first = (x[left] for x in (row, some, alive, own, first))
            if not len(row):
                break
            first = first.long().unsqueeze(1)
            taken = some.gather(1, first).squeeze(1)
            kept[row, place] = taken
            taken = taken + row - row % count
            alive &= dots(taken, some) - half[taken, None] <= own
            alive.scatter_(1, first, False)
    return kept


def _first_unique(one: Tensor, two: Tensor, width: int) -> Tensor:
    """The numbers of each row of `one`, then those of `two` that are not among them: [rows, width], -1 behind the end.
    Both have -1 behind their ends, and each number once."""
    again = (two.unsqueeze(2) == one.unsqueeze(1)).any(2)
    whole, wanted = torch.cat([one, two], dim=1), torch.cat([one >= 0, (two >= 0) & ~again], dim=1)
    place = torch.where(wanted, wanted.cumsum(1) - 1, width).clamp_max_(width)
    return whole.new_full((len(whole), width + 1), -1).scatter_(1, place, whole)[:, :width]
