"""Invented names, which no model knows anything about."""

from __future__ import annotations

import random

_CONSONANTS = "bdfghjklmnprstvwz"
_CODAS = "lmnrstx"
_VOWELS = "aeiou"


def invent(rng: random.Random, count: int, absent_from: str = "") -> list[str]:
    """`count` different capitalised words of seven letters; none is part of another (all have the same length) or
    occurs in `absent_from`, case ignored."""
    taken = absent_from.lower()
    made: dict[str, None] = {}
    while len(made) < count:
        word = "".join(rng.choice(_CONSONANTS) + rng.choice(_VOWELS) for _ in range(3)) + rng.choice(_CODAS)
        if word not in taken:
            made.setdefault(word)
    return [word.capitalize() for word in made]
