"""What a model directory really holds, read from its files and nothing else."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from .errors import ModelError
from .load import load_model
from .report import Report
from .save import REPORT
from .stream import find_layers

_GROUPS = ((1, 2), (2, 4), (4, 8), (8, 16), (1, 4), (2, 8), (3, 4), (1, 8))  # the strictest of each sparsity first


@dataclass(frozen=True)
class Inspected:
    """One layer as it is stored."""

    name: str
    shape: tuple[int, int]
    zeros: int
    pattern: str
    nbytes: int
    error: float | None
    notes: tuple[str, ...]

    @property
    def weights(self) -> int:
        return self.shape[0] * self.shape[1]

    def plain(self) -> dict[str, Any]:
        return {**asdict(self), "sparsity": self.zeros / self.weights}

    def cells(self) -> tuple[str, ...]:
        return (
            self.name,
            f"{self.shape[0]}x{self.shape[1]}",
            f"{self.zeros / self.weights:.2%}",
            self.pattern,
            f"{self.nbytes / 1e6:.2f}",
            "" if self.error is None else f"{self.error:.4f}",
            "; ".join(self.notes),
        )


def inspect(directory: str) -> list[Inspected]:
    """Every prunable layer: its zeros counted, its N:M pattern recognized. Reconstruction errors and notes come
    from prunella.json where there is one. Raises ModelError for a directory that is no model."""
    if not Path(directory).is_dir():
        raise ModelError(f"'{directory}' is not a directory.")
    said = {}
    if (Path(directory) / REPORT).is_file():
        said = {layer.name: layer for layer in Report.read(directory).layers}
    model = load_model(directory, device="cpu")
    found = []
    for index, name in enumerate(model.blocks):
        with model.block(index) as block:
            for slot in find_layers(block, name):
                weight_OI = slot.view()
                zero_OI = weight_OI == 0
                about = said.get(slot.name)
                found.append(
                    Inspected(
                        slot.name,
                        slot.shape,
                        int(zero_OI.sum()),
                        _pattern(zero_OI),
                        weight_OI.numel() * weight_OI.element_size(),
                        about.error if about else None,
                        about.notes if about else (),
                    )
                )
    return found


def _pattern(zero_OI: torch.Tensor) -> str:
    """The N:M pattern that the zeros keep, `unstructured`, or `dense`."""
    zeros, total = int(zero_OI.sum()), zero_OI.numel()
    if zeros < total * 0.001:
        return "dense"
    for n, m in _GROUPS:
        if zero_OI.shape[1] % m == 0 and abs(zeros / total - (m - n) / m) < 0.01:  # a kept weight may be zero
            if (zero_OI.reshape(-1, m).sum(1) >= m - n).all():
                return f"{n}:{m}"
    return "unstructured"
