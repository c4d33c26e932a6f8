"""One option for each of many items, at the least loss within several capacities."""

from __future__ import annotations

import numpy as np

ROUNDS = 200
"""Steps of the search for multipliers."""
NODES = 10_000
"""Partial choices that are looked at before the best one so far is taken."""

Array = np.ndarray


def choose(loss: Array, cost: Array, capacity: Array) -> Array | None:
    """The options with the least summed loss whose summed costs stay within every capacity.

    Multipliers for the capacities (Lagrange) give a lower bound and a first answer; options that no better answer can
    contain are struck out, and the rest is searched by branch and bound. The answer is the best there is, unless the
    search ends early (after NODES nodes, in problems of many nearly equal options); it keeps to the capacities anyway.

    Args:
        loss: [items, options], 0 or more. cost: [items, options, capacities], 0 or more. capacity: [capacities].

    Returns:
        The number of the option per item, [items]; None if even the cheapest options exceed a capacity. Each item must
        have an option that is the cheapest for all capacities.
    """
    items = np.arange(len(loss))
    room = np.asarray(capacity, dtype=float) * (1 + 1e-12)
    cheapest = cost.sum(2).argmin(1)
    if (cost[items, cheapest].sum(0) > room).any():
        return None
    price, best = _prices(loss, cost, room, cheapest)
    best = _filled(loss, cost, room, best)
    value = loss[items, best].sum()
    reduced = loss + cost @ price
    least = reduced.min(1)
    tiny = 1e-12 * max(1.0, abs(value))
    # Whoever takes an option pays what it costs beyond the bound: with more than the gap there is no improvement.
    alive = reduced - least[:, None] < value - (least.sum() - price @ room) - tiny
    alive[items, best] = True
    order = np.argsort(-alive.sum(1), kind="stable")
    rest = np.append(np.cumsum(least[order][::-1])[::-1], 0.0) - price @ room
    small = np.where(alive[:, :, None], cost, np.inf).min(1)[order]
    needed = np.concatenate([np.cumsum(small[::-1], axis=0)[::-1], np.zeros((1, len(room)))])
    options = [np.nonzero(alive[i])[0][np.argsort(-reduced[i][alive[i]], kind="stable")] for i in order]
    stack: list[tuple[tuple[int, ...], float, float, Array]] = [((), 0.0, 0.0, np.zeros(len(room)))]
    for _ in range(NODES):
        if not stack:
            break
        taken, paid, weighed, used = stack.pop()
        depth = len(taken)
        if weighed + rest[depth] >= value - tiny:
            continue
        if depth == len(order):
            if paid < value:
                best = best.copy()
                best[order], value = taken, paid
            continue
        item = int(order[depth])
        for o in options[depth]:  # the most promising one last, so that it is looked at first
            total = used + cost[item, o]
            if (total + needed[depth + 1] <= room).all():
                stack.append(((*taken, int(o)), paid + float(loss[item, o]), weighed + float(reduced[item, o]), total))
    return best


def _prices(loss: Array, cost: Array, room: Array, start: Array) -> tuple[Array, Array]:
    """Multipliers [capacities] with the highest lower bound found, and the best choice on the way that fits."""
    items = np.arange(len(loss))
    scale = np.maximum(room, 1e-12)
    best, value = start, loss[items, start].sum()
    price = top = np.zeros(cost.shape[2])
    highest, step = -np.inf, 2.0
    for _ in range(ROUNDS):
        chosen = (loss + (cost / scale) @ price).argmin(1)
        excess = cost[items, chosen].sum(0) / scale - 1
        dual = loss[items, chosen].sum() + price @ excess
        if dual > highest:
            highest, top = dual, price
        else:
            step *= 0.93
        if (excess <= 0).all() and loss[items, chosen].sum() < value:
            best, value = chosen, loss[items, chosen].sum()
        norm = excess @ excess
        if norm < 1e-18:
            break
        price = np.maximum(0.0, price + step * max(value - dual, 0.0) / norm * excess)
    return top / scale, best


def _filled(loss: Array, cost: Array, room: Array, chosen: Array) -> Array:
    """Spend what is left: again and again the affordable change that gains most for what it takes."""
    items = np.arange(len(loss))
    while True:
        used = cost[items, chosen].sum(0)
        more = cost - cost[items, chosen][:, None]
        gain = np.where((used + more <= room).all(2), loss[items, chosen][:, None] - loss, 0.0)
        worth = gain / np.maximum((more / np.maximum(room, 1e-12)).sum(2), 1e-9)
        if not (gain > 0).any():
            return chosen
        item, option = np.unravel_index(np.where(gain > 0, worth, -np.inf).argmax(), worth.shape)
        chosen = chosen.copy()
        chosen[item] = option
