"""SparseSwaps: exchange a kept weight for a pruned one while that lowers the exact loss."""

from typing import Literal

import torch
from pydantic import PositiveInt
from torch import Tensor

from ..machine import at_a_time
from ..registry import register
from ..types import Layer
from ..waits import seldom
from .wanda import wanda

CHUNK = 1 << 24  # numbers held at once on a CPU, about
LOOK = 32  # swaps between two looks at a device, where rows that are done stay that long and change no more


@register("swap", needs={"gram"})
def swap(
    layer: Layer,
    *,
    swaps: PositiveInt = 100,
    candidates: PositiveInt | None = 16,
    restore: Literal["dense", "fit"] = "dense",
) -> Layer:
    """Swap the best pair of each row, again and again, until no pair helps.

    A row w with dense values d loses f = r^T G r, with r = d - w and G = E[x x^T]. With c = G r, pruning the
    kept weight u and restoring the pruned weight p to the value v changes f by exactly

        a_u + b_p - 2 w_u v G_up        a_u = 2 w_u c_u + w_u^2 G_uu        b_p = v^2 G_pp - 2 v c_p

    Each row takes its best pair while that is negative, updates c <- c + w_u G_u - v G_p, and goes on. Under
    an N:M pattern both come from one group. The number of zeros in a row, or in a group, stays.

    Args:
        swaps: at most so many a row.
        candidates: pairs are made of a row's so many kept weights with the lowest a and pruned weights with
            the lowest b, which finds nearly all there is to gain; None: all pairs, which costs O(inputs^2) for
            each row and swap. N:M always has all.
        restore: v is the dense value; or `fit`, the best value for the others as they are, (c_p + w_u G_up) /
            G_pp, for weights that an earlier step fitted.

    Works on the mask that an earlier step chose, and on its weights; on Wanda's if there is none. A mask of RxC
    blocks stays as it is.

    SparseSwaps, 2025 (arXiv 2512.10922), which has `restore="dense"` and all pairs.
    """
    if layer.mask_OI is None:
        layer = wanda(layer)
    assert layer.mask_OI is not None
    if layer.pattern.kind == "block":
        return layer.pruned(layer.weight_OI, layer.mask_OI, "swap leaves blocks of weights as they are")
    gram_II = layer.stats.hessian_II
    columns = layer.weight_OI.shape[1]
    span = layer.pattern.second if layer.pattern.kind == "nm" else 0
    width = min(candidates or columns, columns)
    rows = max(1, at_a_time(CHUNK, gram_II.device) // max(4 * columns, columns * span if span else width**2))
    done = []
    for start in range(0, len(layer.weight_OI), rows):
        part = slice(start, start + rows)
        weight, mask, dense = layer.weight_OI[part].float(), layer.mask_OI[part], layer.dense_OI[part].float()
        done.append(swap_rows(weight, mask, dense, gram_II, swaps, width, span, restore == "fit"))
    return layer.pruned(torch.cat([w for w, _ in done]), torch.cat([m for _, m in done]))


def swap_rows(
    weight_OI: Tensor, mask_OI: Tensor, dense_OI: Tensor, gram_II: Tensor, swaps: int, width: int, span: int, fit: bool
) -> tuple[Tensor, Tensor]:
    """Weights and mask after at most `swaps` swaps in each row: see `swap`."""
    weight_OI, mask_OI = weight_OI * mask_OI, mask_OI.clone()
    diagonal_I = gram_II.diagonal()
    blocks_GMM = _blocks(gram_II, span) if span else None
    r_OI = dense_OI - weight_OI
    c_OI = r_OI @ gram_II
    # Rounding must not pass for a gain: changes smaller than this share of the loss are none.
    least_O = -1e-6 * (r_OI * c_OI).sum(1).abs()
    todo_O = torch.arange(len(weight_OI), device=weight_OI.device)
    for n in range(swaps):
        w, c, m, d = weight_OI[todo_O], c_OI[todo_O], mask_OI[todo_O], dense_OI[todo_O]
        a = (2 * w * c + w.square() * diagonal_I).masked_fill(~m, torch.inf)
        if blocks_GMM is not None:
            change_O, u_O, p_O = _best_in_groups(w, c, m, d, a, blocks_GMM, fit)
        else:
            b = -c.square() / diagonal_I.clamp_min(1e-30) if fit else d.square() * diagonal_I - 2 * d * c
            b = b.masked_fill(m, torch.inf)
            change_O, u_O, p_O = _best_of_row(w, c, d, a, b, gram_II, width, fit)
        good_O = change_O < least_O[todo_O]
        if seldom(good_O, n, LOOK):
            todo_O, u_O, p_O = todo_O[good_O], u_O[good_O], p_O[good_O]
            if not len(todo_O):
                break
            good_O = torch.ones_like(todo_O, dtype=torch.bool)
        out_O = weight_OI[todo_O, u_O]
        back_O = dense_OI[todo_O, p_O]
        if fit:
            back_O = (c_OI[todo_O, p_O] + out_O * gram_II[u_O, p_O]) / diagonal_I[p_O].clamp_min(1e-30)
        for at_O, value_O, kept in ((u_O, torch.zeros_like(out_O), False), (p_O, back_O, True)):
            weight_OI[todo_O, at_O] = torch.where(good_O, value_O, weight_OI[todo_O, at_O])
            mask_OI[todo_O, at_O] = torch.where(good_O, kept, mask_OI[todo_O, at_O])
        out_O, back_O = out_O.masked_fill(~good_O, 0), back_O.masked_fill(~good_O, 0)
        c_OI[todo_O] += out_O[:, None] * gram_II[u_O] - back_O[:, None] * gram_II[p_O]
    return weight_OI, mask_OI


def _best_of_row(
    w: Tensor, c: Tensor, d: Tensor, a: Tensor, b: Tensor, gram_II: Tensor, width: int, fit: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """For each row its best pair among `width` candidates: the change of the loss, u and p."""
    a_OU, u_OU = a.topk(width, dim=1, largest=False)
    b_OP, p_OP = b.topk(width, dim=1, largest=False)
    w_OU = w.gather(1, u_OU)
    # One gather from the flat matrix: rows u, columns p.
    gram_OUP = gram_II.flatten()[u_OU[:, :, None] * len(gram_II) + p_OP[:, None, :]]
    cross_OUP = gram_OUP.mul_(w_OU[:, :, None])
    if fit:
        c_OP = c.gather(1, p_OP)
        change_OUP = cross_OUP.add_(c_OP[:, None, :]).square_()
        change_OUP.div_(gram_II.diagonal()[p_OP].clamp_min(1e-30)[:, None, :]).neg_()
        change_OUP.masked_fill_(b_OP[:, None, :].isinf(), torch.inf).add_(a_OU[:, :, None])
    else:
        change_OUP = cross_OUP.mul_(-2 * d.gather(1, p_OP)[:, None, :])
        change_OUP.add_(a_OU[:, :, None]).add_(b_OP[:, None, :])
    change_O, at_O = change_OUP.flatten(1).min(1)
    u_O = u_OU.gather(1, (at_O // width)[:, None])[:, 0]
    p_O = p_OP.gather(1, (at_O % width)[:, None])[:, 0]
    return change_O, u_O, p_O


def _best_in_groups(
    w: Tensor, c: Tensor, m: Tensor, d: Tensor, a: Tensor, blocks_GMM: Tensor, fit: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """For each row the best pair inside one group: the change of the loss, u and p."""
    groups, span, _ = blocks_GMM.shape
    shape = (-1, groups, span)
    w_OGU, c_OGP, d_OGP, kept_OGP = w.view(shape), c.view(shape), d.view(shape), m.view(shape)
    diagonal_GP = blocks_GMM.diagonal(dim1=1, dim2=2)
    cross_OGUP = w_OGU[..., None] * blocks_GMM
    if fit:
        change = -(cross_OGUP + c_OGP[..., None, :]).square() / diagonal_GP.clamp_min(1e-30)[:, None, :]
    else:
        b_OGP = d_OGP.square() * diagonal_GP - 2 * d_OGP * c_OGP
        change = b_OGP[..., None, :] - 2 * cross_OGUP * d_OGP[..., None, :]
    change = change.masked_fill(kept_OGP[..., None, :], torch.inf) + a.view(shape)[..., None]
    change_O, at_O = change.flatten(1).min(1)
    group_O, u_O, p_O = at_O // span**2, at_O // span % span, at_O % span
    return change_O, group_O * span + u_O, group_O * span + p_O


def _blocks(gram_II: Tensor, span: int) -> Tensor:
    """The (span, span) blocks on the diagonal, one for each group of columns."""
    groups = len(gram_II) // span
    at = torch.arange(groups, device=gram_II.device)
    return gram_II.view(groups, span, groups, span)[at, :, at, :]
