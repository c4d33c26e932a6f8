"""What holds the kept tokens."""

from foveate.cache.band import Band
from foveate.cache.cache import FoveateCache
from foveate.cache.chain import chained
from foveate.cache.column import Column, FittedSide, LowBit, Observed, PackedColumn, Side
from foveate.cache.joint import JointColumn, JointSide, hold_together
from foveate.cache.place import Place, PlacedColumn
from foveate.cache.state import Blocks, Tag
from foveate.cache.store import UNBOUNDED, Store, StoreSpec
from foveate.cache.view import Away, View

__all__ = [
    "UNBOUNDED",
    "Away",
    "Band",
    "Blocks",
    "Column",
    "FittedSide",
    "FoveateCache",
    "JointColumn",
    "JointSide",
    "LowBit",
    "Observed",
    "PackedColumn",
    "Place",
    "PlacedColumn",
    "Side",
    "Store",
    "StoreSpec",
    "Tag",
    "View",
    "chained",
    "hold_together",
]
