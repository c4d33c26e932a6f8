"""The needle in a haystack (G. Kamradt, 2023) as a grid: one number at fixed depths of running text.

Sample after sample takes the next of eleven depths, 0 % to 100 %, in an order in which any number of samples covers the
text; lengths make the other side of the grid. The needle goes to the border between sentences that is nearest to its
depth. Needle, question and scoring are those of RULER's `niah_single_2` instead of a judge's marks.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from foveate.tasks.generation import GenerationTask, Request
from foveate.tasks.haystack import Haystack
from foveate.tasks.needles import Needles
from foveate.tasks.prompt import Draft

_ORDER = (0, 10, 5, 2, 8, 1, 9, 3, 7, 4, 6)  # tenths: ends, middle, then the wider gaps first


@dataclass(frozen=True)
class Grid:
    """One needle at the depth of the sample's turn."""

    needles: Needles = dataclasses.field(default_factory=lambda: Needles("text"))

    def draft(self, request: Request) -> Draft:
        """The needle's draft, with the needle moved to the sample's depth."""
        draft = self.needles.draft(request)
        tenths = _ORDER[request.index % len(_ORDER)]
        (needle,) = draft.inserts
        moved = dataclasses.replace(needle, place=tenths / 10)
        return dataclasses.replace(draft, inserts=(moved,), bucket=f"depth {10 * tenths}%")

    def haystack(self, request: Request, draft: Draft) -> Haystack:
        """Running text of the corpus."""
        return self.needles.haystack(request, draft)


NEEDLE_GRID = GenerationTask(
    "niah_grid",
    "needle",
    "one number in running text at eleven depths, 0 to 100 %",
    Grid(),
    "Needle In A Haystack, G. Kamradt 2023",
    metric="share of the values found",
)
"""A needle at the eleven depths in turn: with lengths the grid of the original."""
