"""The sequential loops of SparseGPT and DSnoT in Triton, for GPUs, where each step in torch is a launch of its own.

    tile_pass   the column pass over one tile: rows are independent, and stay in registers
    swap         DSnoT's swaps: rows are independent, a lane to a row

Importing this module fails where Triton is missing. With TRITON_INTERPRET=1 in the environment it works on CPU
tensors. Suffixes as in types.py, and B columns of a tile, R rows of a program.
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from .pattern import best
from .types import Pattern

TILE_ROWS, TILE_WARPS = 4, 1
SWAP_ROWS, SWAP_WARPS = 32, 1


@triton.jit
def _tile(
    w, w_stride, upper, upper_stride, mask, mask_stride, errors, scale, rows, columns,
    KEEP: tl.constexpr, SPAN: tl.constexpr, LIMIT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row_R = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column_B = tl.arange(0, COLUMNS)
    inside_R, inside_B = row_R < rows, column_B < columns
    here_RB = inside_R[:, None] & inside_B
    place_RB = row_R[:, None] * w_stride + column_B
    w_RB = tl.load(w + place_RB, mask=here_RB, other=0)
    diagonal_B = tl.load(upper + column_B * (upper_stride + 1), mask=inside_B, other=1)
    if SPAN:
        kept_RB = tl.zeros((ROWS, COLUMNS), tl.int32)
    if LIMIT:
        scale_R = tl.load(scale + row_R, mask=inside_R, other=0)
    for j in range(columns):
        if SPAN:
            if j % SPAN == 0:
                # A weight's rank in its group; of equal scores the lower index ranks lower, as pattern.keep has it.
                score_RB = tl.div_rn(w_RB, diagonal_B + tl.zeros((ROWS, COLUMNS), tl.float32))
                score_RB = score_RB * score_RB
                rank_RB = tl.zeros((ROWS, COLUMNS), tl.int32)
                for k in range(SPAN):
                    other_R1 = tl.sum(tl.where(column_B == j + k, score_RB, 0.0), 1)[:, None]
                    lower_RB = (other_R1 < score_RB) | ((other_R1 == score_RB) & (j + k < column_B))
                    rank_RB += lower_RB.to(tl.int32)
                group_B = (column_B >= j) & (column_B < j + SPAN)
                kept_RB = tl.where(group_B, (rank_RB >= SPAN - KEEP).to(tl.int32), kept_RB)
            kept_R = tl.sum(tl.where(column_B == j, kept_RB, 0), 1) != 0
        else:
            kept_R = tl.load(mask + row_R * mask_stride + j, mask=inside_R, other=0) != 0
        w_R = tl.sum(tl.where(column_B == j, w_RB, 0.0), 1)
        q_R = w_R
        if LIMIT:
            q_R = tl.div_rn(w_R, tl.maximum(scale_R, 1.2e-38))
            q_R = tl.minimum(tl.maximum(q_R, -LIMIT), LIMIT)
            q_R = ((q_R + 12582912.0) - 12582912.0) * scale_R  # 1.5 × 2^23: rounds to even, as torch does
        q_R = tl.where(kept_R, q_R, 0.0)
        u_B = tl.load(upper + j * upper_stride + column_B, mask=(column_B > j) & inside_B, other=0)
        e_R = tl.div_rn(w_R - q_R, tl.load(upper + j * (upper_stride + 1)) + tl.zeros((ROWS,), tl.float32))
        tl.store(errors + j * rows + row_R, e_R, mask=inside_R)
        w_RB = tl.where(column_B == j, q_R[:, None], w_RB - e_R[:, None] * u_B)
    tl.store(w + place_RB, w_RB, mask=here_RB)
    if SPAN:
        tl.store(mask + row_R[:, None] * mask_stride + column_B, kept_RB.to(tl.int8), mask=here_RB)


def tile_pass(
    w_OB: Tensor, upper_BB: Tensor, mask_OB: Tensor, pattern: Pattern | None, scale_O: Tensor | None, bits: int | None
) -> Tensor:
    """`columns.plain_tile`: pass over one tile in place, without what follows from it for later columns."""
    rows, columns = w_OB.shape
    errors_BO = w_OB.new_empty((columns, rows))
    with _on(w_OB):
        _tile[(triton.cdiv(rows, TILE_ROWS),)](
            *(w_OB, w_OB.stride(0), upper_BB, upper_BB.stride(0), mask_OB.view(torch.int8), mask_OB.stride(0)),
            *(errors_BO, scale_O, rows, columns),
            KEEP=0 if pattern is None else pattern.first,
            SPAN=0 if pattern is None else pattern.second,
            LIMIT=0 if scale_O is None or bits is None else (1 << bits - 1) - 1,
            ROWS=TILE_ROWS,
            COLUMNS=triton.next_power_of_2(columns),
            num_warps=TILE_WARPS,
        )
    return errors_BO


@triton.jit
def _swap(
    after, d, group, grow, can_grow, prune, can_prune, e, rows, columns, cycles, length, threshold,
    SAME_SIGN: tl.constexpr, SPAN: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row_R = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    active_R = row_R < rows
    e_R = tl.load(e + row_R, mask=active_R, other=0)
    first_R = (e_R > 0).to(tl.int32) - (e_R < 0).to(tl.int32)
    used_up_R = tl.zeros((ROWS,), tl.int32)  # candidates of the rows while e > 0, and while e < 0
    used_down_R = tl.zeros((ROWS,), tl.int32)
    line_R = row_R * columns
    for _ in range(cycles):
        down_R = e_R < 0
        next_R = tl.where(down_R, used_down_R, used_up_R)
        place_R = (row_R + tl.where(down_R, rows, 0)) * length + tl.minimum(next_R, length - 1)
        active_R = active_R & (next_R < length)
        active_R = active_R & (tl.load(can_grow + place_R, mask=active_R, other=0) != 0)
        grown_R = tl.load(grow + place_R, mask=active_R, other=0)
        fits_R = active_R
        if SPAN:  # the least kept weight of the group; if none is left, the candidate is passed over
            start_R = grown_R // SPAN * SPAN
            least_R = tl.full((ROWS,), float("inf"), tl.float32)
            pruned_R = start_R
            for k in tl.static_range(SPAN):
                score_R = tl.load(group + line_R + start_R + k, mask=active_R, other=float("inf"))
                pruned_R = tl.where(score_R < least_R, start_R + k, pruned_R)
                least_R = tl.minimum(score_R, least_R)
            fits_R = least_R < float("inf")
        else:
            active_R = active_R & (tl.load(can_prune + place_R, mask=active_R, other=0) != 0)
            pruned_R = tl.load(prune + place_R, mask=active_R, other=0)
        new_R = e_R + tl.load(d + line_R + pruned_R, mask=active_R, other=0)
        new_R -= tl.load(d + line_R + grown_R, mask=active_R, other=0)
        better_R = tl.abs(new_R) < tl.abs(e_R)
        if SAME_SIGN:
            better_R = better_R & ((new_R > 0).to(tl.int32) - (new_R < 0).to(tl.int32) == first_R)
        active_R = active_R & (tl.abs(e_R) > threshold) & (better_R | (fits_R == 0))
        used_up_R += (active_R & (down_R == 0)).to(tl.int32)
        used_down_R += (active_R & down_R).to(tl.int32)
        go_R = active_R & fits_R
        tl.store(after + line_R + grown_R, 1, mask=go_R)
        tl.store(after + line_R + pruned_R, 0, mask=go_R)
        if SPAN:
            tl.store(group + line_R + pruned_R, float("inf"), mask=go_R)
        e_R = tl.where(go_R, new_R, e_R)


def swap(
    mask_OI: Tensor,
    d_OI: Tensor,
    g_OI: Tensor,
    wanda_OI: Tensor,
    e_O: Tensor,
    cycles: int,
    threshold: float,
    same_sign: bool,
    span: int,
) -> Tensor:
    """DSnoT's swaps, row by row, as `steps.dsnot.plain_swap` makes them."""
    rows, columns = mask_OI.shape
    after_OI = mask_OI.clone(memory_format=torch.contiguous_format)
    grow_2OK, can_grow_2OK = _both(
        best(g_OI, ~mask_OI & (d_OI > 0), cycles), best(-g_OI, ~mask_OI & (d_OI < 0), cycles)
    )
    prune_2OK, can_prune_2OK, group_OI = grow_2OK, can_grow_2OK, wanda_OI  # not looked at
    if span:
        group_OI = wanda_OI.masked_fill(~mask_OI, torch.inf).contiguous()
    else:
        prune_2OK, can_prune_2OK = _both(
            best(-wanda_OI, mask_OI & (d_OI < 0), cycles), best(-wanda_OI, mask_OI & (d_OI > 0), cycles)
        )
    with _on(mask_OI):
        _swap[(triton.cdiv(rows, SWAP_ROWS),)](
            *(after_OI.view(torch.int8), d_OI.contiguous(), group_OI),
            *(grow_2OK, can_grow_2OK, prune_2OK, can_prune_2OK),
            *(e_O.contiguous(), rows, columns, cycles, grow_2OK.shape[2], threshold),
            SAME_SIGN=same_sign,
            SPAN=span,
            ROWS=SWAP_ROWS,
            num_warps=SWAP_WARPS,
        )
    return after_OI


def _both(up: tuple[Tensor, Tensor], down: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Candidates for e > 0 and for e < 0 as one tensor, and whether each is one."""
    return torch.stack((up[0], down[0])), torch.stack((up[1], down[1])).view(torch.int8)


def _on(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Kernels start on the current device: make it the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
