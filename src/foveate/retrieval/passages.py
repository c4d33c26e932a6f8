"""A row of tokens cut into passages at the ends of its sentences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_ENDS = (".", "!", "?")
_CLOSING = "\"')]}*_”’»"


def cut(tokenizer: Any, ids: Sequence[int], size: int) -> list[tuple[int, int]]:
    """Passages [start, stop) of at most `size` tokens that cover `ids` without a gap.

    A passage ends at the last line end in its second half, else at the last end of a sentence there, else at the last
    end of either kind, else after `size` tokens. Tokens are never changed: the passages joined are `ids`.
    """
    ends = sentence_ends(tokenizer, ids)
    spans = []
    start = 0
    while start < len(ids):
        limit = start + size
        stop = len(ids) if limit >= len(ids) else _stop(ends, start, limit)
        spans.append((start, stop))
        start = stop
    return spans


def _stop(ends: Sequence[int], start: int, limit: int) -> int:
    """Where a passage from `start` that may reach `limit` ends."""
    second_half = range(limit, start + (limit - start) // 2, -1)
    for strength in (2, 1):
        for stop in second_half:
            if ends[stop - 1] >= strength:
                return stop
    return next((stop for stop in range(limit, start, -1) if ends[stop - 1]), limit)


def sentence_ends(tokenizer: Any, ids: Sequence[int]) -> list[int]:
    """For each token what ends with it: 2 a line, 1 a sentence, 0 nothing."""
    texts = {token: tokenizer.decode([token]) for token in set(ids)}
    ends = []
    for place, token in enumerate(ids):
        text = texts[token]
        if "\n" in text:
            ends.append(2)
        elif text.rstrip().rstrip(_CLOSING).endswith(_ENDS) or (place and _closes(texts, ids, place)):
            # "3.14" has a point, too: a sentence ends only before a blank
            following = "" if place + 1 == len(ids) else _behind(tokenizer, token, ids[place + 1])
            ends.append(int(not following or following[:1].isspace()))
        else:
            ends.append(0)
    return ends


def _closes(texts: dict[int, str], ids: Sequence[int], place: int) -> bool:
    """Whether the token is a quotation mark or bracket that closes behind the end of a sentence."""
    text = texts[ids[place]]
    return bool(text) and not text.strip(_CLOSING) and texts[ids[place - 1]].rstrip().endswith(_ENDS)


def _behind(tokenizer: Any, token: int, following: int) -> str:
    """The text of a token where it stands: some tokenizers drop the blank before a token that stands alone."""
    return tokenizer.decode([token, following])[len(tokenizer.decode([token])) :]
