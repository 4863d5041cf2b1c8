"""What a model directory really holds, read from its files and nothing else."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .errors import ModelError
from .layers import find_layers, left_out
from .report import Report
from .save import REPORT
from .sparse.format import mask_of
from .sparse.linear import SparseLinear
from .tasks.text import load_model

_GROUPS = ((1, 2), (2, 4), (4, 8), (8, 16), (1, 4), (2, 8), (3, 4), (1, 8))  # the strictest of each sparsity first


DENSE = 0.001  # a smaller share of zeros is none


@dataclass(frozen=True)
class Inspected:
    """One layer, or another matrix of a block, as it is stored; of the latter, `why` it is no layer to prune."""

    name: str
    shape: tuple[int, ...]
    zeros: int
    pattern: str
    nbytes: int
    error: float | None
    notes: tuple[str, ...]
    why: str = ""

    @property
    def weights(self) -> int:
        return math.prod(self.shape)

    def plain(self) -> dict[str, Any]:
        return {**asdict(self), "sparsity": self.zeros / self.weights}

    def cells(self) -> tuple[str, ...]:
        return (
            self.name,
            "x".join(map(str, self.shape)),
            f"{self.zeros / self.weights:.2%}",
            self.pattern,
            f"{self.nbytes / 1e6:.2f}",
            "" if self.error is None else f"{self.error:.4f}",
            "; ".join((*self.notes, *([f"no layer to prune: {self.why}"] if self.why else ()))),
        )


def inspect(directory: str) -> list[Inspected]:
    """Every matrix of the blocks, a block's layers first and then what is no layer to prune: its zeros counted, its N:M
    pattern recognized; of a packed model what is left out counts as zero. Reconstruction errors and notes come from
    prunella.json where there is one. Raises ModelError for a directory that is no model."""
    if not Path(directory).is_dir():
        raise ModelError(f"'{directory}' is not a directory.")
    said = {}
    if (Path(directory) / REPORT).is_file():
        said = {layer.name: layer for layer in Report.read(directory).layers}
    model = load_model(directory, device="cpu", packed=True)
    found = []
    for _, block in model.walk():
        for layer, zero_OI, nbytes in _stored(block.module, block.name):
            about = said.get(layer)
            error, notes = (about.error, about.notes) if about else (None, ())
            rows, columns = zero_OI.shape
            found.append(Inspected(layer, (rows, columns), int(zero_OI.sum()), _pattern(zero_OI), nbytes, error, notes))
        tensors = block.tensors()
        for item in left_out(block.module, block.name):
            pattern = "dense" if item.zeros < item.weights * DENSE else "unstructured"
            nbytes = tensors[item.name].nbytes
            found.append(Inspected(item.name, item.shape, item.zeros, pattern, nbytes, None, (), item.why))
    return found


def _stored(block: nn.Module, prefix: str) -> Iterator[tuple[str, Tensor, int]]:
    """The block's layers: name, where zeros are stored or left out, bytes."""
    for slot in find_layers(block, prefix):
        weight_OI = slot.read()
        yield slot.name, weight_OI == 0, weight_OI.numel() * weight_OI.element_size()
    for path, module in block.named_modules():
        if isinstance(module, SparseLinear):
            packed = module.packed()
            yield f"{prefix}.{path}", ~mask_of(packed.mask, packed.columns), packed.nbytes


def _pattern(zero_OI: Tensor) -> str:
    """The N:M pattern that the zeros keep, `unstructured`, or `dense`."""
    zeros, total = int(zero_OI.sum()), zero_OI.numel()
    if zeros < total * DENSE:
        return "dense"
    for n, m in _GROUPS:
        if zero_OI.shape[1] % m == 0 and abs(zeros / total - (m - n) / m) < 0.01:  # a kept weight may be zero
            if (zero_OI.reshape(-1, m).sum(1) >= m - n).all():
                return f"{n}:{m}"
    return "unstructured"
