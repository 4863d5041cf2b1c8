"""Machine code for pruned weights (csrc/generate.c): each kept weight is one instruction.

It is the fastest way to multiply with many positions, half as fast again as by strips (`striped`), and takes the most
memory: some 8.5 bytes of code and 4 of value for a kept weight, in place of 5. So it is made for as many layers as the
memory allows that the caller gives.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .format import Packed, unpack
from .kernels import instructions, library
from .striped import StripedWeight, in_strips

ROWS = 28  # of a block: those whose sums registers hold (CODE_ROWS of csrc/steps.h)
LENGTH = 2200  # kept weights in a block's strip: its code stays in the first cache while positions go through it
NARROWEST, WIDEST = 64, 512  # columns in a strip: their inputs, 128 positions of each, stay in the second cache


@dataclass(frozen=True)
class Ends:
    """What code does beside the product.

    act:      "none", "relu" or "relu6", at the end
    residual: a residual is added before that, whose rows lie as far apart as those of the result
    apart:    the columns of the input are read where they lie, and not copied side by side before: for few rows
    """

    act: str = "none"
    residual: bool = False
    apart: bool = False

    @property
    def number(self) -> int:
        return {"none": 0, "relu": 1, "relu6": 2}[self.act] | self.residual << 2 | self.apart << 3


PLAIN = Ends()


@dataclass(frozen=True)
class Code:
    """Code of a weight (O, I), not yet in its place.

    code:   uint8, its instructions
    values: float32 (K), the kept weights in the order in which the code takes them
    where:  int64 (blocks, strips, 2): where the code of each block of rows and strip of columns begins, and its values
    """

    code: Tensor
    values: Tensor
    where: Tensor
    rows: int
    columns: int
    strip: int
    ends: Ends

    @property
    def nbytes(self) -> int:
        return self.code.nbytes + self.values.nbytes


@dataclass(frozen=True)
class Coded:
    """A weight (O, I) whose code can be run."""

    values: Tensor
    table: Tensor
    rows: int
    columns: int
    strip: int
    ends: Ends
    region: _Region

    def weight(self) -> StripedWeight:
        """As C takes it; it lives as long as this does."""
        strips = -(-self.columns // self.strip)
        return StripedWeight(
            self.rows, self.columns, self.strip, strips, code=self.table.data_ptr(), ends=self.ends.number
        )


class _Region:
    """Memory with code that can be run, given back with the last weight that uses it."""

    def __init__(self, address: int, size: int):
        kernels = library()
        assert kernels is not None
        self.address = address
        weakref.finalize(self, kernels.prunella_unseal, address, size)


def available() -> bool:
    """Can code be made and run here? It takes AVX-512, and a system that lets a process make code."""
    return any(name.startswith("avx512") for name in instructions()) and seal([_probe()]) is not None


def _probe() -> Code:
    code = _generate(torch.ones(1, 1), 1, 1, PLAIN)
    assert code is not None
    return code


def size_of(kept: int, rows: int, columns: int) -> int:
    """About how many bytes the code of a weight and its values take."""
    blocks = -(-rows // ROWS)
    return kept * 11 + min(kept, blocks * columns) * 7 + blocks * (2 + kept // (LENGTH * blocks)) * 700


def generate(
    packed: Packed, places: int = 1, groups: int = 1, scale: Tensor | None = None, ends: Ends = PLAIN
) -> Code | None:
    """The code of a packed weight; None where none can be made.

    Args:
        places, groups: a convolution's, see `striped`
        scale: (O) what each row is multiplied with
    """
    weight_OI = unpack(packed, torch.float32)
    return generate_dense(weight_OI if scale is None else weight_OI * scale.view(-1, 1), places, groups, ends)


def generate_dense(weight_OI: Tensor, places: int = 1, groups: int = 1, ends: Ends = PLAIN) -> Code | None:
    """The same of a weight that is not packed, what is zero in it left out."""
    rows, columns = weight_OI.shape
    kept = int(torch.count_nonzero(weight_OI))
    channels = max(1, columns // places)
    wanted = int(LENGTH * rows * columns / max(1, kept * min(ROWS, rows // groups)))
    together = max(1, min(WIDEST, max(NARROWEST, wanted)) // places)
    together = -(-channels // -(-channels // together))  # strips alike
    weight_OI = in_strips(weight_OI, places, together)
    return _generate(weight_OI.float().contiguous(), rows // groups, together * places, ends)


def _generate(weight_OI: Tensor, group: int, strip: int, ends: Ends) -> Code | None:
    kernels = library()
    if kernels is None:
        return None
    rows, columns = weight_OI.shape
    kept = int(torch.count_nonzero(weight_OI))
    blocks, strips = rows // group * -(-group // ROWS), -(-columns // strip)
    loads = min(kept, blocks * columns)
    size = kept * 7 + kept // 256 * 7 + loads * 7 + blocks * strips * (ROWS * 50 + 200) + blocks * columns * 3
    code, values = torch.empty(size, dtype=torch.uint8), torch.empty(kept)
    where = torch.empty(blocks, strips, 2, dtype=torch.int64)
    used = kernels.prunella_generate(
        *(weight_OI.data_ptr(), rows, columns, group, strip, ends.number),
        *(code.data_ptr(), size, values.data_ptr(), where.data_ptr()),
    )
    return None if used < 0 else Code(code[:used].clone(), values, where, rows, columns, strip, ends)


def seal(codes: Sequence[Code]) -> list[Coded] | None:
    """Put code where it can be run, that of several weights side by side; None where the system does not allow it."""
    kernels = library()
    if kernels is None or not codes:
        return None
    together = torch.cat([code.code for code in codes])
    address = kernels.prunella_seal(together.data_ptr(), together.numel())
    if address is None:
        return None
    region = _Region(address, together.numel())
    sealed, at = [], 0
    for code in codes:
        table = torch.cat([code.where.view(-1, 2), torch.tensor([[code.code.numel(), code.values.numel()]])])
        table[:, 0] += address + at
        table[:, 1] = table[:, 1] * 4 + code.values.data_ptr()
        sealed.append(Coded(code.values, table, code.rows, code.columns, code.strip, code.ends, region))
        at += code.code.numel()
    return sealed
