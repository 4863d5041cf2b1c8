"""Products with packed weights in Triton, for GPUs, on the format as it is stored (docs/format.md).

    _product   x W^T for a few tokens: the weights are multiplied as they are found
    _expand    some rows of W, dense, for torch to multiply many tokens with
    _rounded   x W^T for a few tokens and a W of 8 bits of which nothing is left out

A program takes a few rows and goes through them a tile at a time. A lane holds one byte of the mask, eight columns:
a scan over the bits of the tile says where the values of each byte begin, and the lane walks through its eight
columns from there, always loading what would come next and dropping it where the bit is 0. Neighbouring lanes so
read neighbouring values. A tile is as large as the program has lanes: with more bytes to a lane Triton gives a lane
bytes in a row, for the sake of the mask, and the values of neighbouring lanes lie far from each other.

The kernels read nothing outside of the buffers, whatever is in these: where a byte's values begin is clamped to
the values that there are, and the eight that may follow lie in the padding at worst.

Importing this module fails where Triton is missing; kernels.py then leaves the work to torch. With TRITON_INTERPRET=1
in the environment the kernels run on CPU tensors, in NumPy, which is how they are tested without a GPU.

Suffixes as in types.py, and R rows of a tile, B bytes of the mask in a tile, 8 columns of a byte.
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arguments import rounded_arguments, rows_of_tile, sparse_arguments
from .format import SPAN, Rounded

FEW = 8  # up to so many tokens go through `_product`: beyond, expanding and a product on tensor cores are cheaper
TILE = 1 << 25  # bytes of dense weights that are expanded at a time: they stay in the second-level cache
ROWS, BYTES, WARPS = 4, 32, 4  # of a tile: a warp to a row


@triton.jit
def _column(values, bits_RB, at_RB, next_RB, bit: tl.constexpr, BITS: tl.constexpr):
    """Column `bit` of each byte in float32, 0 where it is not kept; and `at` and `next` of the column after it."""
    kept_RB = (bits_RB & (1 << bit)) != 0
    if BITS:
        value_RB = ((next_RB & ((1 << BITS) - 1)).to(tl.int32) ^ (1 << BITS - 1)) - (1 << BITS - 1)
        next_RB = next_RB >> (kept_RB.to(tl.uint64) * BITS)
    else:
        value_RB = tl.load(values + at_RB)
        at_RB += kept_RB.to(tl.int32)
    return tl.where(kept_RB, value_RB.to(tl.float32), 0.0), at_RB, next_RB


@triton.jit
def _tile(
    mask, values, scales, row_R1, inside_R, byte_B, at_R, width, count, per_row,
    BYTES_A_SCALE: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """A tile of the weight (R, B, 8) in float32, its scales (R, B), and where the values of the next one begin."""
    here_RB = inside_R[:, None] & (byte_B < width)[None, :]
    bits_RB = tl.load(mask + row_R1 * width + byte_B[None, :], mask=here_RB, other=0).to(tl.int32)
    ones_RB = bits_RB - ((bits_RB >> 1) & 0x55)
    ones_RB = (ones_RB & 0x33) + ((ones_RB >> 2) & 0x33)
    ones_RB = (ones_RB + (ones_RB >> 4)) & 15
    at_RB = at_R[:, None] + tl.cumsum(ones_RB, 1) - ones_RB
    at_RB = tl.minimum(tl.maximum(at_RB, 0), count)
    next_RB = tl.zeros(bits_RB.shape, tl.uint64)
    if BITS:  # the next eight integers, in one word: no more loads
        word_RB = values.to(tl.pointer_type(tl.uint64)) + at_RB // (64 // BITS)
        shift_RB = (at_RB % (64 // BITS) * BITS).to(tl.uint64)
        next_RB = (tl.load(word_RB) >> shift_RB) | ((tl.load(word_RB + 1) << 1) << (63 - shift_RB))
    c0_RB, at_RB, next_RB = _column(values, bits_RB, at_RB, next_RB, 0, BITS)
    c1_RB, at_RB, next_RB = _column(values, bits_RB, at_RB, next_RB, 1, BITS)
    c2_RB, at_RB, next_RB = _column(values, bits_RB, at_RB, next_RB, 2, BITS)
    c3_RB, at_RB, next_RB = _column(values, bits_RB, at_RB, next_RB, 3, BITS)
    c4_RB, at_RB, next_RB = _column(values, bits_RB, at_RB, next_RB, 4, BITS)
    c5_RB, at_RB, next_RB = _column(values, bits_RB, at_RB, next_RB, 5, BITS)
    c6_RB, at_RB, next_RB = _column(values, bits_RB, at_RB, next_RB, 6, BITS)
    c7_RB, at_RB, next_RB = _column(values, bits_RB, at_RB, next_RB, 7, BITS)
    # A join puts its two halves into a new last dimension: what is joined first is the highest bit of the column.
    even = tl.join(tl.join(c0_RB, c4_RB), tl.join(c2_RB, c6_RB))
    odd = tl.join(tl.join(c1_RB, c5_RB), tl.join(c3_RB, c7_RB))
    weight_RB8 = tl.reshape(tl.join(even, odd), (bits_RB.shape[0], bits_RB.shape[1], 8))
    scale_RB = tl.full(bits_RB.shape, 1.0, tl.float32)
    if BYTES_A_SCALE:
        place_RB = row_R1 * per_row + (byte_B // BYTES_A_SCALE)[None, :]
        scale_RB = tl.load(scales + place_RB, mask=here_RB, other=0).to(tl.float32)
    return weight_RB8, scale_RB, at_R + tl.sum(ones_RB, 1)


@triton.jit(do_not_specialize=["count", "per_row", "tokens"])
def _product(
    x, mask, offsets, values, scales, y, rows, columns, width, count, per_row, tokens,
    BYTES_A_SCALE: tl.constexpr, BITS: tl.constexpr, ROWS: tl.constexpr, BYTES: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    row_R = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token_T = tl.arange(0, TOKENS)
    inside_R, inside_T = row_R < rows, token_T < tokens
    at_R = tl.load(offsets + row_R, mask=inside_R, other=0)
    row_R1 = row_R.to(tl.int64)[:, None]
    # Each row loads x for itself, which the nearest cache answers: the lanes that multiply have it at once.
    place_TR18 = token_T[:, None, None, None] * columns + tl.arange(0, 8) + tl.zeros((1, ROWS, 1, 1), tl.int32)
    sum_TRB = tl.zeros((TOKENS, ROWS, BYTES), tl.float32)
    for first in range(0, width, BYTES):
        byte_B = first + tl.arange(0, BYTES)
        weight_RB8, scale_RB, at_R = _tile(
            mask, values, scales, row_R1, inside_R, byte_B, at_R, width, count, per_row, BYTES_A_SCALE, BITS
        )
        column_B8 = byte_B[:, None] * 8 + tl.arange(0, 8)
        here_TRB8 = inside_T[:, None, None, None] & (column_B8 < columns)
        x_TRB8 = tl.load(x + (place_TR18 + (byte_B * 8)[:, None]), mask=here_TRB8, other=0).to(tl.float32)
        part_TRB = tl.sum(x_TRB8 * weight_RB8, 3)
        sum_TRB += part_TRB * scale_RB if BYTES_A_SCALE else part_TRB
    here_TR = inside_T[:, None] & inside_R
    tl.store(y + token_T[:, None] * rows + row_R, tl.sum(sum_TRB, 2).to(y.dtype.element_ty), mask=here_TR)


@triton.jit(do_not_specialize=["count", "per_row", "first_row", "last_row"])
def _expand(
    mask, offsets, values, scales, dense, first_row, last_row, columns, width, count, per_row,
    BYTES_A_SCALE: tl.constexpr, BITS: tl.constexpr, ROWS: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    line_R = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_R = first_row + line_R
    inside_R = row_R < last_row
    at_R = tl.load(offsets + row_R, mask=inside_R, other=0)
    row_R1 = row_R.to(tl.int64)[:, None]
    for first in range(0, width, BYTES):
        byte_B = first + tl.arange(0, BYTES)
        weight_RB8, scale_RB, at_R = _tile(
            mask, values, scales, row_R1, inside_R, byte_B, at_R, width, count, per_row, BYTES_A_SCALE, BITS
        )
        if BYTES_A_SCALE:
            weight_RB8 *= scale_RB[:, :, None]
        weight_RC = tl.reshape(weight_RB8, (ROWS, BYTES * 8)).to(dense.dtype.element_ty)
        column_C = first * 8 + tl.arange(0, BYTES * 8)
        here_RC = inside_R[:, None] & (column_C < columns)
        tl.store(dense + line_R.to(tl.int64)[:, None] * columns + column_C, weight_RC, mask=here_RC)


@triton.jit(do_not_specialize=["rows", "per_row", "tokens"])
def _rounded(
    x, values, scales, y, rows, columns, per_row, tokens,
    GROUP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    row_R = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token_T = tl.arange(0, TOKENS)
    inside_R, inside_T = row_R < rows, token_T < tokens
    row_R1 = row_R.to(tl.int64)[:, None]
    sum_TRC = tl.zeros((TOKENS, ROWS, COLUMNS), tl.float32)
    for first in range(0, columns, COLUMNS):
        column_C = first + tl.arange(0, COLUMNS)
        here_RC = inside_R[:, None] & (column_C < columns)[None, :]
        weight_RC = tl.load(values + row_R1 * columns + column_C[None, :], mask=here_RC, other=0).to(tl.float32)
        scale_R1 = tl.load(scales + row_R1 * per_row + first // GROUP, mask=inside_R[:, None], other=0).to(tl.float32)
        here_TC = inside_T[:, None] & (column_C < columns)[None, :]
        x_TC = tl.load(x + token_T[:, None] * columns + column_C[None, :], mask=here_TC, other=0).to(tl.float32)
        sum_TRC += x_TC[:, None, :] * (weight_RC * scale_R1)[None, :, :]
    here_TR = inside_T[:, None] & inside_R
    tl.store(y + token_T[:, None] * rows + row_R, tl.sum(sum_TRC, 2).to(y.dtype.element_ty), mask=here_TR)


def rounded_linear(x: Tensor, values: Tensor, scales: Tensor, group: int) -> Tensor:
    """`torch.ops.prunella.rounded_linear` for a GPU: x W^T in the dtype of x, sums in float32."""
    _, rows, columns, *_, group = rounded_arguments(x, values, scales, group)
    x_TI = x.contiguous().view(-1, columns)
    tokens = len(x_TI)
    y_TO = x.new_empty((tokens, rows))
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        if 0 < tokens <= FEW:
            _rounded[(triton.cdiv(rows, ROWS),)](
                x_TI, values, scales, y_TO, rows, columns, scales.shape[1], tokens,
                GROUP=group, ROWS=ROWS, COLUMNS=SPAN, TOKENS=triton.next_power_of_2(tokens), num_warps=WARPS,
            )  # fmt: skip
        elif tokens:
            step = rows_of_tile(rows, columns, x, TILE)
            for first in range(0, rows, step):
                here = slice(first, first + step)
                tile = Rounded(values[here], scales[here], group if scales.shape[1] > 1 else 0)
                torch.mm(x_TI, tile.dense(x.dtype).T, out=y_TO[:, here])
    return y_TO.view(*x.shape[:-1], rows)


def sparse_linear(
    x: Tensor, mask: Tensor, offsets: Tensor, values: Tensor, scales: Tensor | None, columns: int, group: int
) -> Tensor:
    """`torch.ops.prunella.sparse_linear` for a GPU: x W^T in the dtype of x, sums in float32."""
    _, rows, _, _, _, _, count, _, group = sparse_arguments(x, mask, offsets, values, scales, columns, group)
    x_TI = x.contiguous().view(-1, columns)
    tokens = len(x_TI)
    y_TO = x.new_empty((tokens, rows))
    if values.data_ptr() % 8:
        values = values.clone()  # integers are read as 64-bit words
    parts = (mask, offsets, values, scales)
    sizes = (columns, mask.shape[1], count, 0 if scales is None else scales.shape[1])
    constants = {
        "BYTES_A_SCALE": 0 if scales is None else group // 8,
        "BITS": {torch.int8: 8, torch.uint8: 4}.get(values.dtype, 0),
        "ROWS": ROWS,
        "BYTES": BYTES,
        "num_warps": WARPS,
    }
    # Kernels start on the current device: make it the tensor's.
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        if 0 < tokens <= FEW:
            whole = triton.next_power_of_2(tokens)
            grid = (triton.cdiv(rows, ROWS),)
            _product[grid](x_TI, *parts, y_TO, rows, *sizes, tokens, TOKENS=whole, **constants)
        elif tokens:
            step = rows_of_tile(rows, columns, x, TILE)
            tile_RI = x.new_empty((step, columns))
            for first in range(0, rows, step):
                last = min(first + step, rows)
                grid = (triton.cdiv(last - first, ROWS),)
                _expand[grid](*parts, tile_RI, first, last, *sizes, **constants)
                torch.mm(x_TI, tile_RI[: last - first].T, out=y_TO[:, first:last])
    return y_TO.view(*x.shape[:-1], rows)
