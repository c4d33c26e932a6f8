"""BM25: passages ranked by the words that they share with a query, rare words counting more.

Source: Robertson and Zaragoza, "The probabilistic relevance framework: BM25 and beyond" (2009); the idf is the one of
Lucene, which is never negative.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

K1, B = 1.2, 0.75
_WORD = re.compile(r"\w+")


def words(text: str) -> list[str]:
    """Words in lower case; everything but letters, digits and underscores separates them."""
    return _WORD.findall(text.lower())


class BM25:
    """An index of passages.

    Args:
        counts: how often each passage has each word.
    """

    def __init__(self, counts: Sequence[Counter[str]]) -> None:
        self.counts = list(counts)
        self.lengths = np.array([sum(count.values()) for count in counts], dtype=np.float64)
        postings: dict[str, list[int]] = {}
        for number, count in enumerate(self.counts):
            for word in count:
                postings.setdefault(word, []).append(number)
        self.postings = postings

    @classmethod
    def of(cls, texts: Sequence[str]) -> BM25:
        return cls([Counter(words(text)) for text in texts])

    def scores(self, query: str) -> np.ndarray:
        """One number per passage, higher is better; 0 without a shared word. A word asked for twice counts twice."""
        n = len(self.counts)
        found = np.zeros(n)
        spread = K1 * (1 - B + B * self.lengths / max(self.lengths.mean(), 1e-9))
        for word, times in Counter(words(query)).items():
            holders = self.postings.get(word, [])
            idf = math.log(1 + (n - len(holders) + 0.5) / (len(holders) + 0.5))
            for number in holders:
                count = self.counts[number][word]
                found[number] += times * idf * count * (K1 + 1) / (count + spread[number])
        return found

    def grouped(self, groups: Sequence[Sequence[int]]) -> BM25:
        """An index of sections, each made of some of the passages."""
        return BM25([sum((self.counts[number] for number in group), Counter()) for group in groups])
