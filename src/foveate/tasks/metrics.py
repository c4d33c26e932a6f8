"""Metrics of LongBench (arXiv 2308.14508) and InfiniteBench (arXiv 2402.13718): an answer against a reference, 0..1.

Chinese, which the originals segment with a dictionary, is cut in characters here.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from decimal import Decimal

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation + "！？。，；：、“”‘’（）《》【】…—·")
_WORDS = re.compile(r"[\u3400-\u9fff\uf900-\ufaff]|[^\s\u3400-\u9fff\uf900-\ufaff]+")
_INTEGER = re.compile(r"-?\d+")
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
_LETTER = re.compile(r"(?<![A-Za-z'])([A-D])(?![A-Za-z'])")


def words(text: str) -> list[str]:
    """Words in lower case without punctuation and articles; each Chinese character is one."""
    return _WORDS.findall(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)))


def token_f1(text: str, reference: str) -> float:
    """Harmonic mean of precision and recall over words, each counted as often as it comes."""
    found, wanted = words(text), words(reference)
    same = sum((Counter(found) & Counter(wanted)).values())
    return 2 * same / (len(found) + len(wanted)) if same else 0.0


def rouge_l(text: str, reference: str) -> float:
    """ROUGE-L: F1 of the longest common subsequence of words, in lower case, punctuation left out."""
    found, wanted = (_WORDS.findall(each.lower().translate(_PUNCTUATION)) for each in (text, reference))
    same = common_length(found, wanted)
    return 2 * same / (len(found) + len(wanted)) if same else 0.0


def code_similarity(text: str, reference: str) -> float:
    """Similarity of the first line of code with the reference: 1 - (insertions and deletions) / (both lengths).

    Lines with a backtick, # or // are passed over.
    """
    lines = text.lstrip("\n").split("\n")
    line = next((each for each in lines if not any(mark in each for mark in ("`", "#", "//"))), "")
    if not line and not reference:
        return 1.0
    return 2 * common_length(line, reference) / (len(line) + len(reference))


def common_length(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence, a row of the table at a time as the bits of one number."""
    places: dict[str, int] = {}
    for index, item in enumerate(first):
        places[item] = places.get(item, 0) | 1 << index
    row = everything = (1 << len(first)) - 1
    for item in second:
        hits = row & places.get(item, 0)
        row = ((row + hits) | (row - hits)) & everything
    return len(first) - row.bit_count()


def one_class(text: str, reference: str, classes: Sequence[str]) -> float:
    """1 / (number of classes that the text names) if the right one is among them, else 0.

    A class whose name is part of the right one's name is not counted as named beside it.
    """
    named = [each for each in classes if each in text and (each == reference or each not in reference)]
    return 1 / len(named) if reference in named else 0.0


def share_of_numbers(text: str, reference: str) -> float:
    """The share of the numbers in the text that are the (first) number of the reference."""
    wanted = re.search(r"\d+", reference)
    numbers = re.findall(r"\d+", text)
    return numbers.count(wanted[0]) / len(numbers) if wanted and numbers else 0.0


def first_number(text: str, reference: str) -> float:
    """1 if the first number of the text, with decimals or without, is the reference."""
    found, wanted = _NUMBER.search(text), _NUMBER.search(reference)
    return float(found is not None and wanted is not None and Decimal(found[0]) == Decimal(wanted[0]))


def whole_word(text: str, reference: str) -> float:
    """1 if the reference stands in the text between other signs than letters and digits, case ignored."""
    return float(re.search(rf"(?<!\w){re.escape(reference)}(?!\w)", text, re.IGNORECASE) is not None)


def choice_letter(text: str, reference: str) -> float:
    """1 if the first letter A-D that stands alone is the reference; "answer is (X)" comes before any other."""
    said = re.search(r"answer is:?\s*\(?([A-D])\b", text, re.IGNORECASE) or _LETTER.search(text)
    return float(said is not None and said[1].upper() == reference)


def running_values(text: str, reference: str) -> float:
    """The share of the reference's numbers that the text gives in order before its first error."""
    found, wanted = (_INTEGER.findall(each) for each in (text, reference))
    right = 0
    for said, value in zip(found, wanted, strict=False):
        if int(said) != int(value):
            break
        right += 1
    return right / len(wanted) if wanted else 0.0
