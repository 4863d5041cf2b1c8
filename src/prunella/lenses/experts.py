"""The experts of a mixture, one behind the other in a parameter of three dimensions."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from .lens import Lens, Stored
from .registry import register_lens


@register_lens("experts", always=True)
@dataclass(frozen=True)
class Experts(Stored):
    """Matrices (E, O, I), or (E, I, O) where transformers says that they are transposed, multiplied by one after the
    other."""

    routed = True
    packed = "list"

    @classmethod
    def of(cls, module: nn.Module, key: str) -> Lens | None:
        parameter, transposed = getattr(module, key), getattr(module, "is_transposed", None)
        if parameter.ndim != 3 or not isinstance(transposed, bool) or not holds_experts(module):
            return None
        _, rows, columns = parameter.shape
        return cls(rows, columns, transposed)


def holds_experts(module: nn.Module) -> bool:
    """Is it a mixture's experts, by the name of its class?"""
    return "expert" in type(module).__name__.lower()
