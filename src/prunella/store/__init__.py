"""Where a run's weights go, and where they are read again. Each file imports only from those above it:

registry.py   what a store is and does; how one is registered, and found by its name
dense.py      files laid out like the source's own, zeros and all
packed.py     files without the zeros (docs/format.md)
"""

from ..model.checkpoint import Source
from ..outcome import BlockResult
from . import dense, packed
from .registry import MakeStore, Store, check_store, find_store, make_store, register_store, stores

__all__ = [
    "BlockResult",
    "MakeStore",
    "Source",
    "Store",
    "check_store",
    "dense",
    "find_store",
    "make_store",
    "packed",
    "register_store",
    "stores",
]
