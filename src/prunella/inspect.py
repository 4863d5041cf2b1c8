"""What a model directory really holds, read from its files and nothing else."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .errors import ModelError
from .layers import Slot, find_layers, left_out, within
from .report import Report
from .save import REPORT
from .sparse.conv import SparseConv
from .sparse.format import layer_names, mask_of
from .sparse.linear import SparseLinear
from .tasks import open_model

_GROUPS = ((1, 2), (2, 4), (4, 8), (8, 16), (1, 4), (2, 8), (3, 4), (1, 8))  # the strictest of each sparsity first


DENSE = 0.001  # a smaller share of zeros is none


@dataclass(frozen=True)
class Inspected:
    """One layer, or another matrix of a block, as it is stored: (O, I), or (O, C, k…) of a convolution. Of one that
    is no layer to prune, `why`."""

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
    report = Report.read(directory) if (Path(directory) / REPORT).is_file() else None
    said = {layer.name: layer for layer in report.layers} if report else {}
    model = open_model(directory, device="cpu", packed=True)
    if report and "blocks" in report.model and model.checkpoint is None:  # packed, it shows others
        model.blocks = [str(name) for name in report.model["blocks"]]
    found = []
    for _, block in model.walk():
        for layer in _stored(block.module, block.name):
            about = said.get(layer.name)
            error, notes = (about.error, about.notes) if about else (None, ())
            zeros, pattern = int(layer.zero_OI.sum()), _pattern(layer.zero_OI, layer.shape[1])
            notes += ("packed, and expanded when it is loaded",) if layer.expanded else ()
            found.append(Inspected(layer.name, layer.shape, zeros, pattern, layer.nbytes, error, notes))
        tensors = block.tensors()
        for item in left_out(block.module, block.name):
            pattern = "dense" if item.zeros < item.weights * DENSE else "unstructured"
            nbytes = tensors[item.name].nbytes
            found.append(Inspected(item.name, item.shape, item.zeros, pattern, nbytes, None, (), item.why))
    return found


@dataclass(frozen=True)
class _Layer:
    """A layer of a block: its shape, as its module has it; where zeros are stored or left out; bytes; is it of a
    convolution that is packed on disk alone?"""

    name: str
    shape: tuple[int, ...]
    zero_OI: Tensor
    nbytes: int
    expanded: bool = False


def _stored(block: nn.Module, prefix: str) -> Iterator[_Layer]:
    """The block's layers."""
    for slot in find_layers(block, prefix):
        weight_OI = slot.read()
        kernel = slot.tensor.shape[2:] if slot.lens.packed == "kernel" else ()
        shape = (slot.shape[0], slot.channels, *kernel) if kernel else slot.shape
        if (stored := getattr(slot.module, "packed_as", None)) is None:
            yield _Layer(slot.name, shape, weight_OI == 0, weight_OI.numel() * weight_OI.element_size())
        else:
            zero_OI = ~mask_of(stored.mask, slot.shape[1]).chunk(_parts(slot))[slot.part or 0]
            nbytes = stored.pack(slot.name, slot.tensor).nbytes // _parts(slot)
            yield _Layer(slot.name, shape, zero_OI, nbytes, expanded=True)
    for path, module in block.named_modules():
        if isinstance(module, SparseLinear):
            packed, name = module.packed(), within(prefix, path)
            about = {"groups": module.groups} if isinstance(module, SparseConv) and module.groups > 1 else {}
            kernel = tuple(module.kernel_size) if isinstance(module, SparseConv) else ()
            names = layer_names(name, about)
            shape = (packed.rows // len(names), packed.columns // math.prod(kernel), *kernel)
            zeros = (~mask_of(packed.mask, packed.columns)).chunk(len(names))
            for layer, zero_OI in zip(names, zeros, strict=True):
                yield _Layer(layer, shape, zero_OI, packed.nbytes // len(names))


def _parts(slot: Slot) -> int:
    return slot.lens.shape(slot.tensor)[0]


def _pattern(zero_OI: Tensor, channels: int) -> str:
    """The N:M pattern that the zeros keep along inputs that stand side by side, `unstructured`, or `dense`."""
    zeros, total = int(zero_OI.sum()), zero_OI.numel()
    if zeros < total * DENSE:
        return "dense"
    for n, m in _GROUPS:
        if channels % m == 0 and abs(zeros / total - (m - n) / m) < 0.01:  # a kept weight may be zero
            if (zero_OI.reshape(-1, m).sum(1) >= m - n).all():
                return f"{n}:{m}"
    return "unstructured"
