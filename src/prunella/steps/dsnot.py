"""DSnoT: prune and grow until the expected output error is gone."""

from collections.abc import Callable
from typing import Any

import torch
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor

from ..layers import matches
from ..native import call, library
from ..pattern import best
from ..registry import register
from ..types import Layer
from ..waits import number
from .wanda import wanda


@register("dsnot", needs={"norm", "moments"})
def dsnot(
    layer: Layer,
    *,
    cycles: PositiveInt | None = None,
    threshold: NonNegativeFloat = 5e-5,
    power: NonNegativeFloat = 1.0,
    same_sign: bool | None = None,
    skip: tuple[str, ...] = (),
) -> Layer:
    """Swap pruned weights for kept ones, row by row, to bring the mean output back to the dense one.

    A weight contributes D_ij = W_ij E[x_j] to its row's mean output, so a row has lost

        e_i = sum over pruned j of D_ij

    (plus what an earlier step's update of the kept weights changed). Up to `cycles` times, in each row with
    |e_i| > threshold, one weight g grows and one weight p is pruned, both pulling e_i towards zero:

        e > 0:  g = the pruned weight with the largest  D / Var[x_j]^power,  p = the least of the kept D < 0
        e < 0:  g = the pruned weight with the smallest D / Var[x_j]^power,  p = the least of the kept D > 0
        e <- e + D_p - D_g

    where the least is the lowest Wanda score |W_ij| ||X_j||. Under an N:M pattern p is instead the least
    kept weight, of either sign, in the group of g. No weight moves twice. Grown weights return at their
    dense value.

    A row is done before the first swap that would not bring e closer to zero. The reference code has no such
    check: e jumps back and forth around zero until the cycles are used up, each swap trading a better weight
    for a worse one, which on rows of a few hundred weights undoes more than it mends.

    Args:
        cycles: at most so many swaps a row. None: one for every 100 inputs. The reference code allows 50, which is
            about that in the rows of 4,096 for which it was made, and a fifth of what a row of 576 keeps at 60%.
        threshold: on |e|, a mean over tokens. The reference code uses 0.1 on sums over windows of 2048
            tokens, which is this default.
        power: of the variance; 0 leaves it out.
        same_sign: stop a row before the swap that turns the sign of its e. None: under N:M only, as the
            reference code does.
        skip: layers that keep their mask, by name pattern; the reference code skips the MLPs.

    Starts from the mask that an earlier step chose, or from Wanda's if there is none. A mask of RxC blocks
    stays as it is. Variances are over all tokens, where the reference code averages those within each window.

    Zhang et al., "Dynamic Sparse No Training: Training-Free Fine-tuning for Sparse LLMs", 2023.
    """
    if layer.mask_OI is None:
        layer = wanda(layer)
    assert layer.mask_OI is not None
    if any(matches(layer.name, glob) for glob in skip):
        return layer
    if layer.pattern.kind == "block":
        return layer.pruned(layer.weight_OI, layer.mask_OI, "dsnot leaves blocks of weights as they are")
    mask_OI = layer.mask_OI
    if cycles is None:
        cycles = max(1, mask_OI.shape[1] // 100)
    dense_OI, kept_OI = layer.dense_OI.float(), layer.weight_OI.float()
    mean_I, variance_I = layer.stats.mean_I, layer.stats.variance_I
    d_OI = torch.where(mask_OI, kept_OI, dense_OI) * mean_I
    e_O = (dense_OI - kept_OI * mask_OI) @ mean_I
    # A constant input would divide by zero: it counts as varying a little.
    g_OI = d_OI / variance_I.clamp_min(1e-8 * number(variance_I.mean()) + 1e-30) ** power
    wanda_OI = kept_OI.abs() * layer.stats.norm_I
    span = layer.pattern.second if layer.pattern.kind == "nm" else 0
    if same_sign is None:
        same_sign = span > 0
    swap = swaps.get(mask_OI.device.type, plain_swap)
    after_OI = swap(mask_OI, d_OI, g_OI, wanda_OI, e_O, cycles, threshold, same_sign, span)
    weight_OI = torch.where(mask_OI, layer.weight_OI, layer.dense_OI)
    return layer.pruned(weight_OI, after_OI)


def plain_swap(
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
    """The mask after the swaps, in torch on any device; groups of `span` columns keep their number of zeros, 0:
    whole rows do."""
    rows = len(mask_OI)
    after_OI = mask_OI.clone()
    e_O = e_O.clone()
    first_O = e_O.sign()
    active_O = torch.ones_like(e_O, dtype=torch.bool)
    # The candidates of each row and sign, best first; their D pulls e to zero, their scores are finite.
    grow = [best(g_OI, ~mask_OI & (d_OI > 0), cycles), best(-g_OI, ~mask_OI & (d_OI < 0), cycles)]
    prune = [best(-wanda_OI, mask_OI & (d_OI < 0), cycles), best(-wanda_OI, mask_OI & (d_OI > 0), cycles)]
    group_OI = wanda_OI.masked_fill(~mask_OI, torch.inf)
    used_2O = torch.zeros(2, rows, dtype=torch.long, device=mask_OI.device)
    row_O = torch.arange(rows, device=mask_OI.device)
    for _ in range(cycles):
        side_O = (e_O < 0).long()  # 0: e > 0, 1: e < 0
        next_O = used_2O[side_O, row_O]
        grown_O, can_O = _take(grow, side_O, next_O)
        if span:
            start_O = grown_O // span * span
            group_OM = group_OI.gather(1, start_O[:, None] + torch.arange(span, device=start_O.device))
            least_O, pruned_O = group_OM.min(1)
            pruned_O = start_O + pruned_O
            fits_O = least_O.isfinite()  # else the group is used up: its candidate is passed over
        else:
            pruned_O, fits_O = _take(prune, side_O, next_O)
            can_O, fits_O = can_O & fits_O, torch.ones_like(fits_O)
        new_O = e_O + d_OI[row_O, pruned_O] - d_OI[row_O, grown_O]
        active_O &= can_O & (e_O.abs() > threshold) & (~fits_O | (new_O.abs() < e_O.abs()))
        if same_sign:
            active_O &= ~fits_O | (new_O.sign() == first_O)
        if active_O.device.type == "cpu" and not active_O.any():  # a device is not asked
            break
        used_2O[side_O, row_O] += 1
        go_O = active_O & fits_O
        moves = (after_OI, grown_O, True), (after_OI, pruned_O, False), (group_OI, pruned_O, torch.inf)
        for matrix_OI, column_O, value in moves:
            matrix_OI[row_O, column_O] = matrix_OI[row_O, column_O].masked_fill(go_O, value)
        e_O = torch.where(go_O, new_O, e_O)
    return after_OI


def _take(lists: list[tuple[Tensor, Tensor]], side_O: Tensor, next_O: Tensor) -> tuple[Tensor, Tensor]:
    """The next column from the list of each row's side, and whether there is one."""
    length = lists[0][0].shape[1]
    at_O1 = next_O.clamp_max(length - 1)[:, None]
    columns = [columns.gather(1, at_O1)[:, 0] for columns, _ in lists]
    valid = [valid.gather(1, at_O1)[:, 0] & (next_O < length) for _, valid in lists]
    return torch.where(side_O == 0, columns[0], columns[1]), torch.where(side_O == 0, valid[0], valid[1])


def _compiled_swap(
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
    """`plain_swap` in C, to the bit."""
    arguments = (mask_OI, d_OI, g_OI, wanda_OI, e_O, cycles, threshold, same_sign, span)
    kernels = library()
    if kernels is None:
        return plain_swap(*arguments)
    after_OI = mask_OI.clone(memory_format=torch.contiguous_format)
    tensors = (d_OI.contiguous(), g_OI.contiguous(), wanda_OI.contiguous(), e_O.contiguous())
    call(kernels.prunella_swap, after_OI, *tensors, *mask_OI.shape, cycles, threshold, same_sign, span)
    return after_OI


def _gpu_swap(*arguments: Any) -> Tensor:
    try:
        from .. import columns_gpu
    except ImportError:  # no Triton
        return plain_swap(*arguments)
    return columns_gpu.swap(*arguments)


# By type of device; `plain_swap` serves all others.
swaps: dict[str, Callable[..., Tensor]] = {"cpu": _compiled_swap, "cuda": _gpu_swap}
