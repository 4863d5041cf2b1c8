"""Torch's linear layer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from .lens import Lens, Stored
from .registry import register_lens


@register_lens("linear", always=True)
@dataclass(frozen=True)
class Linear(Stored):
    """The weight (O, I) of torch's linear layer, and of those derived from it that compute as it does."""

    packed = "module"

    @classmethod
    def of(cls, module: nn.Module, key: str) -> Lens | None:
        weight = getattr(module, key)
        fits = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
        return cls(*weight.shape) if fits and key == "weight" and weight.ndim == 2 else None
