"""What became of a block and of its layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import Tensor

from .grid import Grid
from .layers import Slot


def share_of(where: Tensor) -> float:
    """The share of True, or of what is not zero."""
    return where.count_nonzero().item() / where.numel()


@dataclass(frozen=True)
class LayerResult:
    """What happened to one layer; goes into the report.

    sparsity: share of its weights that are zero: those that its mask prunes, and those that came in as zeros and still
              are (not those that rounding made zero)
    target:   share that was to be pruned; 0: it stayed as it was
    before:   share that came in as zeros
    bits:     of a quantized one, else None
    """

    name: str
    shape: tuple[int, int]
    sparsity: float
    target: float
    pattern: str
    error: float | None
    tokens: int
    notes: tuple[str, ...] = ()
    bits: int | None = None
    weights: dict[str, float | str] | None = None  # `histograms` of a pruned layer
    before: float = 0.0

    @property
    def size(self) -> int:
        """How many weights it has."""
        return self.shape[0] * self.shape[1]

    @classmethod
    def dense(cls, slot: Slot) -> LayerResult:
        """Of a layer, loaded, that stays as it is."""
        zeros = share_of(slot.read() == 0)
        return cls(slot.name, slot.shape, zeros, 0.0, str(slot.pattern), None, 0, before=zeros)


def mean(layers: Iterable[LayerResult], value: Callable[[LayerResult], float | None]) -> float | None:
    """Over layers, weighted by their sizes; None where none has a value."""
    known = [(found, la.size) for la in layers if (found := value(la)) is not None]
    return sum(found * size for found, size in known) / sum(size for _, size in known) if known else None


@dataclass(frozen=True)
class BlockResult:
    """One finished block: its layers, their masks as bits (`pattern.pack`), the grids of the quantized ones, and the
    parameters that changed."""

    index: int
    name: str
    layers: tuple[LayerResult, ...]
    masks: dict[str, Tensor]
    grids: dict[str, Grid]
    changed: dict[str, Tensor]
    seconds: float
