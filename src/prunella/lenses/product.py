"""Parameters of which only the product tells how they are read."""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

from torch import nn

from .lens import Lens, Stored
from .registry import register_lens

# Of each parameter that was looked at (learn.py) its lens, or why it has none.
learned: WeakKeyDictionary[nn.Module, dict[str, Lens | str]] = WeakKeyDictionary()


@register_lens("product")
@dataclass(frozen=True)
class Multiplied(Stored):
    """Matrices that the network was seen to multiply by: gates without a module, heads side by side, experts that are
    kept as one matrix or meet their inputs in one batched product."""

    routed = True

    @classmethod
    def of(cls, module: nn.Module, key: str) -> Lens | None:
        found = learned.get(module, {}).get(key)
        return found if isinstance(found, Lens) else None
