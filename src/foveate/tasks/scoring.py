"""RULER's scoring rule."""

from __future__ import annotations

import re
from collections.abc import Sequence

_CONTROL = re.compile(r"[\x00-\x1f]")


def found_share(text: str, references: Sequence[str]) -> float:
    """The share of the references that occur in the text, case ignored: RULER's `string_match_all`, 0..1.

    Control characters count as line ends. As in RULER, a number inside a longer number is found.
    """
    text = _CONTROL.sub("\n", text).strip().lower()
    return sum(reference.lower() in text for reference in references) / len(references)
