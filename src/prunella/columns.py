"""The column pass over a weight, which SparseGPT and GPTQ share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .grid import Grid, fit, limit, nearest
from .linalg import InverseFactor
from .native import call, library
from .pattern import keep
from .types import Pattern


def column_pass(
    weight_OI: Tensor,
    factor: InverseFactor,
    mask_OI: Tensor | None,
    sparsity: float,
    pattern: Pattern,
    *,
    tile: int = 128,
    bits: int | None = None,
    group: int = 0,
) -> tuple[Tensor, Tensor, Grid | None]:
    """Prune and round a weight column by column, the later columns making up for the errors of the earlier ones.

    With U^T U = H^-1 (U upper triangular), for the columns j from left to right

        e_i = (w_ij - q_ij) / U_jj            q_ij: w_ij, rounded if `bits`, where kept; else 0
        W_i,j: <- W_i,j: - e_i U_j,j:

    and the sum of all e^2 is what the layer loses, tr(dW H dW^T).

    Args:
        weight_OI: where to start; not changed.
        factor: U, and the inputs that are always zero, whose weights are set to zero.
        mask_OI: what to keep. None chooses when the pass reaches a tile (under N:M, a group), from weights that
            carry the updates before it: the lowest w_ij^2 / U_jj^2 go.
        sparsity, pattern: of the mask to choose.
        tile: columns in a tile, rounded up to whole groups of the pattern.
        bits, group: round to a grid, whose scales are fitted when the pass reaches a group of inputs.
    Returns:
        The weight in float32, its mask and its grid.
    """
    rows, width = weight_OI.shape
    group = group if 0 < group < width else width
    tile = min(-(-tile // pattern.columns) * pattern.columns, width)
    upper_II = factor.upper_II
    diagonal_I = upper_II.diagonal()
    weight_OI = torch.empty_like(weight_OI, dtype=torch.float32, memory_format=torch.contiguous_format).copy_(weight_OI)
    weight_OI.masked_fill_(factor.dead_I, 0)
    chosen_OI = torch.empty(rows, width, dtype=torch.bool, device=weight_OI.device)
    in_pass = pattern if mask_OI is None and pattern.kind == "nm" else None
    scales: list[Tensor] = []

    def mask(start: int, stop: int) -> Tensor:
        if mask_OI is not None:
            return mask_OI[:, start:stop]
        return keep((weight_OI[:, start:stop] / diagonal_I[start:stop]).square(), sparsity, pattern)

    start = 0
    while start < width:
        stop = min(start + tile, width)
        scale_O = None
        if bits is not None:
            end = min(start - start % group + group, width)
            stop = min(stop, end)
            if start % group == 0:  # of a group that is longer than a tile, the mask as it looks from here
                scales.append(fit(weight_OI[:, start:end] * mask(start, end), bits, 0).scale_OG)
            scale_O = scales[-1][:, 0].float()
        chosen_OB, upper_BB = chosen_OI[:, start:stop], upper_II[start:stop, start:stop]
        if in_pass is None:
            chosen_OB.copy_(mask(start, stop))
        errors_BO = tile_pass(weight_OI[:, start:stop], upper_BB, chosen_OB, in_pass, scale_O, bits)
        weight_OI[:, stop:].addmm_(errors_BO.T, upper_II[start:stop, stop:], alpha=-1)
        start = stop
    if bits is None:
        return weight_OI, chosen_OI, None
    # An integer has no negative zero.
    return weight_OI.add_(0), chosen_OI, Grid(bits, group % width, torch.cat(scales, 1))


def tile_pass(
    w_OB: Tensor, upper_BB: Tensor, mask_OB: Tensor, pattern: Pattern | None, scale_O: Tensor | None, bits: int | None
) -> Tensor:
    """Pass over one tile in place, without what follows from it for later columns; returns the errors e (B, O).

    Args:
        w_OB: part of a contiguous float32 weight; becomes q.
        upper_BB: the tile's square of U.
        mask_OB: bool, part of a contiguous mask; given, or written where there is a pattern.
        pattern: N:M, to choose when the pass reaches a group; None: the mask is given.
        scale_O: each row's grid, float32, for `bits` bits; None: values stay as they are.
    """
    return tiles.get(w_OB.device.type, plain_tile)(w_OB, upper_BB, mask_OB, pattern, scale_O, bits)


def plain_tile(
    w_OB: Tensor, upper_BB: Tensor, mask_OB: Tensor, pattern: Pattern | None, scale_O: Tensor | None, bits: int | None
) -> Tensor:
    """`tile_pass` in torch, on any device."""
    # Columns as rows: the pass works on one column at a time, which should be contiguous.
    w_BO, mask_BO = w_OB.T.contiguous(), mask_OB.T.contiguous()
    diagonal_B = upper_BB.diagonal()
    errors_BO = torch.empty_like(w_BO)
    span = 0 if pattern is None else pattern.columns
    for j in range(len(w_BO)):
        if pattern is not None and j % span == 0:
            score_OM = (w_BO[j : j + span] / diagonal_B[j : j + span, None]).square().T
            mask_BO[j : j + span] = keep(score_OM.contiguous(), 0.0, pattern).T
        q_O = w_BO[j] if scale_O is None or bits is None else nearest(w_BO[j], scale_O, bits) * scale_O
        q_O = q_O * mask_BO[j]
        torch.sub(w_BO[j], q_O, out=errors_BO[j]).div_(diagonal_B[j])
        w_BO[j] = q_O
        w_BO[j + 1 :].addr_(upper_BB[j, j + 1 :], errors_BO[j], alpha=-1)
    w_OB.copy_(w_BO.T)
    mask_OB.copy_(mask_BO.T)
    return errors_BO


def _compiled_tile(
    w_OB: Tensor, upper_BB: Tensor, mask_OB: Tensor, pattern: Pattern | None, scale_O: Tensor | None, bits: int | None
) -> Tensor:
    kernels = library()
    if kernels is None:
        return plain_tile(w_OB, upper_BB, mask_OB, pattern, scale_O, bits)
    rows, columns = w_OB.shape
    errors_BO = w_OB.new_empty(columns, rows)
    n, m = (0, 0) if pattern is None else (pattern.first, pattern.second)
    call(
        kernels.prunella_sweep,
        *(w_OB, w_OB.stride(0), upper_BB, upper_BB.stride(0), mask_OB, mask_OB.stride(0), errors_BO, rows, columns),
        *(n, m, scale_O, 0 if bits is None else limit(bits)),
    )
    return errors_BO


def _gpu_tile(*arguments: Any) -> Tensor:
    try:
        from . import columns_gpu
    except ImportError:  # no Triton
        return plain_tile(*arguments)
    return columns_gpu.tile_pass(*arguments)


# By type of device; `plain_tile` serves all others.
tiles: dict[str, Callable[..., Tensor]] = {"cpu": _compiled_tile, "cuda": _gpu_tile}
