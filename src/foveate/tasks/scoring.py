"""RULER's scoring rule, and when a generation can stop without changing its score."""

from __future__ import annotations

import re
from collections.abc import Sequence

from foveate.errors import BadArgument

_CONTROL = re.compile(r"[\x00-\x1f]")


def found_share(prediction: str | Sequence[float], references: Sequence[str]) -> float:
    """The share of the references that occur in the prediction, case ignored: RULER's `string_match_all`.

    Control characters count as line ends. As in RULER, a number inside a longer number is found.
    """
    if not isinstance(prediction, str):
        raise BadArgument("prediction", type(prediction).__name__, "give the generated text")
    text = _CONTROL.sub("\n", prediction).strip().lower()
    return sum(reference.lower() in text for reference in references) / len(references)


def all_found(text: str, references: Sequence[str]) -> bool:
    """True when every reference occurs in `text`: the share can then neither rise nor fall."""
    return found_share(text, references) == 1.0
