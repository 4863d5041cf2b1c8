"""GPT-2's linear layer, which transformers calls Conv1D."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from .lens import Lens, Stored
from .registry import register_lens


@register_lens("conv1d", always=True)
@dataclass(frozen=True)
class Conv1D(Stored):
    """The weight (I, O) of GPT-2's linear layers: the other way round than torch's."""

    packed = "module"

    @classmethod
    def of(cls, module: nn.Module, key: str) -> Lens | None:
        weight = getattr(module, key)
        if type(module).__name__ != "Conv1D" or key != "weight" or weight.ndim != 2:
            return None
        rows, columns = weight.shape
        return cls(rows, columns, transposed=True)
