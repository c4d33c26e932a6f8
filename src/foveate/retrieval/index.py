"""The order in which passages answer a query: searched flat or down a tree, for one query or for its parts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Protocol, Self

import numpy as np

from foveate.retrieval.bm25 import words


class Index(Protocol):
    """Passages that can be scored."""

    def scores(self, query: str) -> np.ndarray:
        """One number per passage; higher is better."""
        ...

    def grouped(self, groups: Sequence[Sequence[int]]) -> Self:
        """The same over sections, each made of some of the passages."""
        ...


def search(index: Index, passages: int, query: str, *, fanout: int = 0, beam: int = 1) -> list[int]:
    """Numbers of passages, the best first; of equal scores the first in the text.

    Args:
        fanout: 0 scores every passage. Else `fanout` neighbours make a section, as many sections a larger one, and so
            on: the best `beam` of a level are opened, and only the passages in them are found.
    """
    levels, sizes = [index], [passages]
    while fanout and sizes[-1] > fanout:
        groups = [range(i, min(i + fanout, sizes[-1])) for i in range(0, sizes[-1], fanout)]
        levels.append(levels[-1].grouped(groups))
        sizes.append(len(groups))
    open_ones = list(range(sizes[-1]))
    while True:
        level, size = levels.pop(), sizes.pop()
        scores = level.scores(query)
        ranked = sorted(open_ones, key=lambda number: -scores[number])
        if not levels:
            return ranked
        below = sizes[-1]
        assert size == -(-below // fanout)
        open_ones = [
            child
            for number in sorted(ranked[:beam])
            for child in range(number * fanout, min((number + 1) * fanout, below))
        ]


def parts(query: str) -> list[str]:
    """The questions in a query: cut at the ends of sentences, at semicolons, commas and "and"; parts without a word
    are dropped. A query that asks one thing is returned as it is."""
    found = [part.strip() for part in re.split(r"[?!.;,]+(?=\s|$)|\n+|\band\b", query) if words(part)]
    return found if len(found) > 1 else [query]


def in_turn(orders: Sequence[Sequence[int]]) -> list[int]:
    """Several orders as one: the first of each, then the second of each; what comes twice counts once."""
    longest = max(map(len, orders), default=0)
    turns = (order[rank] for rank in range(longest) for order in orders if rank < len(order))
    return list(dict.fromkeys(turns))
