"""What holds the kept tokens."""

from foveate.cache.band import Band
from foveate.cache.cache import FoveateCache
from foveate.cache.column import Column, PackedColumn, Side
from foveate.cache.state import Blocks, Tag
from foveate.cache.store import UNBOUNDED, Store, StoreSpec
from foveate.cache.view import View

__all__ = [
    "UNBOUNDED",
    "Band",
    "Blocks",
    "Column",
    "FoveateCache",
    "PackedColumn",
    "Side",
    "Store",
    "StoreSpec",
    "Tag",
    "View",
]
