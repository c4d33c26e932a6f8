"""The attention core: what is read (Selection), reading it (attend), and putting reads together (merge)."""

from foveate.attention.attend import attend
from foveate.attention.columns import columns, entropies
from foveate.attention.merge import merge
from foveate.attention.reference import reference
from foveate.attention.selection import ALL, Frame, Geometry, Partial, Parts, Selection, Span

__all__ = [
    "ALL",
    "Frame",
    "Geometry",
    "Partial",
    "Parts",
    "Selection",
    "Span",
    "attend",
    "columns",
    "entropies",
    "merge",
    "reference",
]
