"""Which of all combinations of method and model are tried when not all are.

Methods × families × group sizes × methods grow faster than anybody's patience. Every method runs every test of the
contract on one plain model, or the one that it names; on other models, and beside other methods, they take turns, so
that each test still meets every model and each method several models. `--whole` runs all.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

PLAIN = ("llama", 2)
PARTNERS = (1, 2, 5)
"""Distances, in the list of methods, of those that are composed."""

ELSEWHERE = 3
"""One test of so many takes a method to a model that is not the plain one, too."""


def place_of(params: Mapping[str, Any]) -> tuple[str, int]:
    return params.get("family", PLAIN[0]), params.get("group", PLAIN[1])


def is_on_turn(test: str, params: Mapping[str, Any], places: Sequence[tuple[str, int]], ids: Sequence[str]) -> bool:
    """Whether a combination is tried.

    Args:
        test: its name.
        params: its parameters; `case` is the method, `other` the one beside it.
        places: every (family, group) that this test is written for.
        ids: of all methods, in order.
    """
    case, other = params["case"], params.get("other")
    if case.id == "dense" and other is None:
        return True
    turn = ids.index(case.id) + zlib.crc32(test.encode())
    if other is not None:
        apart = abs(ids.index(case.id) - ids.index(other.id))
        if min(apart, len(ids) - apart) not in PARTNERS:
            return False
        turn += ids.index(other.id)
    home = (getattr(case, "family", PLAIN[0]), PLAIN[1])
    elsewhere = [place for place in places if place != home]
    here = place_of(params)
    if not elsewhere or (here == home and other is None):
        return True
    # A pair is tried in one place; a single method in the plain one, and in one test of three in another.
    if other is not None:
        return here == places[turn % len(places)]
    rounds, choice = divmod(turn, len(elsewhere))
    return here == elsewhere[choice] and rounds % ELSEWHERE == 0
