"""Where the parts of packed weights lie and how large they are, checked, as the kernels take it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .format import PAD, SPAN, groups, words

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3, torch.uint8: 4}


def weight_arguments(
    dtype: torch.dtype,
    mask: Tensor,
    offsets: Tensor,
    values: Tensor,
    scales: Tensor | None,
    columns: int,
    group: int,
) -> tuple[Any, ...]:
    """What the C functions take for a weight that is multiplied with activations of `dtype`. The sizes are checked
    here, and the kernels never read beyond them whatever the tensors hold: a damaged weight gives a wrong product, not
    a wrong address."""
    rows = offsets.shape[0] - 1
    kind = KINDS.get(values.dtype, -1)
    length = values.shape[0] * 2 if kind == 4 else values.shape[0]
    count = (length - PAD) & -2 if kind == 4 else length - PAD
    if (
        kind < 0
        or mask.shape != (rows, words(columns) * 8)
        or mask.dtype != torch.uint8
        or offsets.dtype != torch.int32
        or count < 0
        or (kind < 3 and (scales is not None or dtype != values.dtype))
        or (kind >= 3 and (scales is None or scales.dtype != torch.bfloat16 or group % SPAN))
        or (scales is not None and scales.shape != (rows, groups(columns, group)))
        or not (mask.is_contiguous() and offsets.is_contiguous() and values.is_contiguous())
        or not (scales is None or scales.is_contiguous())
    ):
        raise ValueError(
            f"the parts of a packed weight do not fit: x {dtype}, mask {tuple(mask.shape)},"
            f" offsets {tuple(offsets.shape)}, values {values.dtype} {tuple(values.shape)}, {columns} columns,"
            f" groups of {group}"
        )
    whole = -(-columns // SPAN) * SPAN
    return (
        kind,
        rows,
        columns,
        mask.data_ptr(),
        offsets.data_ptr(),
        values.data_ptr(),
        count,
        None if scales is None else scales.data_ptr(),
        0 if scales is None else group or whole,
    )


def sparse_arguments(x: Tensor, *parts: Any) -> tuple[Any, ...]:
    """`weight_arguments` of a weight that x is multiplied with."""
    weight = weight_arguments(x.dtype, *parts)
    if x.shape[-1] != weight[2]:
        raise ValueError(f"the parts of a packed weight do not fit: x {tuple(x.shape)}, {weight[2]} columns")
    return weight


def rounded_arguments(x: Tensor, values: Tensor, scales: Tensor, group: int) -> tuple[Any, ...]:
    """What the C functions take for a weight of 8 bits of which nothing is left out; the sizes are checked here."""
    rows, columns = values.shape
    if (
        values.dtype != torch.int8
        or scales.dtype != torch.bfloat16
        or scales.shape != (rows, groups(columns, group))
        or group % SPAN
        or not (values.is_contiguous() and scales.is_contiguous())
        or x.shape[-1] != columns
    ):
        raise ValueError(
            f"the parts of a rounded weight do not fit: x {tuple(x.shape)}, values {values.dtype}"
            f" {tuple(values.shape)}, scales {tuple(scales.shape)}, groups of {group}"
        )
    whole = -(-columns // SPAN) * SPAN
    return 3, rows, columns, None, None, values.data_ptr(), values.numel(), scales.data_ptr(), group or whole


def rows_of_tile(rows: int, columns: int, x: Tensor, size: int) -> int:
    """How many rows of a weight are made dense at a time, in `size` bytes and the dtype of x."""
    return max(1, min(rows, size // (columns * x.element_size())))
