"""BESA: learn inside a block which rows can spare more of their weights."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from ..errors import InputError
from ..machine import widest
from ..registry import register
from ..trees import tensors
from ..types import Block, Layer


@register("besa", needs={"norm", "targets"})
def besa(
    block: Block,
    *,
    per: Literal["row", "layer"] = "row",
    epochs: PositiveInt = 1,
    steps: NonNegativeInt | None = None,
    rate: PositiveFloat = 0.1,
    penalty: NonNegativeFloat = 5.0,
    width: PositiveFloat = 0.05,
) -> Block:
    """Learn the sparsity of each row by gradients of the block's output error; weights are not changed.

    Weights of a row are ranked by Wanda's score, k = 0 the lowest of I. A row with rate alpha loses the ranks
    below I alpha; for gradients, rank k is kept with a probability that rises around alpha,

        alpha = sigmoid(theta)         M_k = [k + 1/2 > I alpha]         P_k = sigmoid(((k + 1/2) / I - alpha) / width)

    and passed straight through: the block runs with W * M, its backward pass goes through P. On window n

        L = mean over channels of ||Y - Y_dense||^2 / ||Y_dense||^2  +  penalty ((s' - s) / s)^2

    with s' the block's mean rate and s its target; AdamW moves theta, nothing else. In the end a common shift
    of all theta, and largest remainders, prune exactly the block's budget.

    P is the paper's 1 - sum_d beta_d [k < I p_d], a softmax beta over candidate rates p_d, with a logistic
    density of fixed width around alpha as its beta: one parameter a row in place of a hundred. Any rate is in
    reach, and each row starts at its layer's target; the reference code's softmax of a sigmoid confines rates
    to 0.38 ... 0.62.

    Args:
        per: each output `row` has a rate of its own, or all rows of a `layer` share one.
        epochs: passes over the calibration windows.
        steps: windows used in all, one a step; None: every window in every epoch.
        rate: learning rate on theta, falling linearly to 0.
        penalty: weight of the sparsity penalty.
        width: of the logistic density, as a share of the row.

    Only for unstructured pruning; a mask that an earlier step chose is chosen anew. Sparsity moves inside a
    block, never between blocks.

    Xu et al., "BESA: Pruning Large Language Models with Blockwise Parameter-Efficient Sparsity Allocation", 2024.
    """
    layers = [layer for layer in block.layers if layer.sparsity > 0]
    for layer in layers:
        if layer.pattern.kind != "unstructured":
            raise InputError(
                f"step 'besa' gives every row its own sparsity, which pattern {layer.pattern} does not allow: use"
                " --pattern unstructured, or another step."
            )
    if not layers:
        return block
    if block.run is None or block.targets is None:
        raise InputError("step 'besa' runs whole blocks: use --order block.")
    ranks = [_ranks(layer.weight_OI.float().abs() * layer.stats.norm_I) for layer in layers]
    groups = [len(rank_OI) if per == "row" else 1 for rank_OI in ranks]
    size_G = torch.cat([torch.full((g,), la.weight_OI.numel() / g) for g, la in zip(groups, layers, strict=True)])
    goal_G = torch.cat([torch.full((g,), la.sparsity) for g, la in zip(groups, layers, strict=True)])
    goal = ((goal_G * size_G).sum() / size_G.sum()).item()
    device = ranks[0].device
    size_G, goal_G = size_G.to(device), goal_G.to(device)

    theta_G = torch.logit(goal_G).requires_grad_()
    count = epochs * block.windows if steps is None else steps
    optimizer = torch.optim.AdamW([theta_G], lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, max(1, count))
    for step in range(count):
        alphas = [a[:, None] for a in torch.split(theta_G.detach().sigmoid(), groups)]
        pulls = _pulls(block, layers, ranks, alphas, step % block.windows, width)
        with torch.enable_grad():
            alpha_G = theta_G.sigmoid()
            mean = (alpha_G * size_G).sum() / size_G.sum()
            optimizer.zero_grad()
            ((alpha_G * torch.cat(pulls)).sum() + penalty * ((mean - goal) / goal).square()).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()

    rows = [theta_L.expand(len(r)) for theta_L, r in zip(torch.split(theta_G.detach(), groups), ranks, strict=True)]
    inputs = torch.cat([torch.full((len(r),), r.shape[1]) for r in ranks])
    total = sum(round(la.weight_OI.numel() * la.sparsity) for la in layers)
    counts = torch.split(spend(torch.cat(rows), inputs.to(device), total), [len(r) for r in ranks])
    done = {
        la.name: la.pruned(la.weight_OI, rank_OI >= count_O[:, None])
        for la, rank_OI, count_O in zip(layers, ranks, counts, strict=True)
    }
    return replace(block, layers=tuple(done.get(la.name, la) for la in block.layers))


def _pulls(
    block: Block, layers: Sequence[Layer], ranks: Sequence[Tensor], alphas: Sequence[Tensor], n: int, width: float
) -> list[Tensor]:
    """dRec / dalpha of each layer's rates (O,) or (1,), straight through the masks, on window n."""
    assert block.run is not None
    assert block.targets is not None
    weights = {
        la.name: la.weight_OI * (rank_OI + 0.5 > rank_OI.shape[1] * alpha_O1)
        for la, rank_OI, alpha_O1 in zip(layers, ranks, alphas, strict=True)
    }
    with torch.enable_grad():
        leaves = [w.requires_grad_() for w in weights.values()]
        # A network that is one block puts out a tree.
        several = zip(tensors(block.run(weights, n)), tensors(block.targets(n)), strict=True)
        pairs = [(out, target) for out, target in several if target.is_floating_point() and target.ndim > 1]
        lost = torch.stack([relative_error(out, target) for out, target in pairs]).mean()
        # float16 cannot hold the gradient of a mean over so many outputs: it holds a multiple of it.
        scale = max(target.shape[-1] * target[..., 0].numel() ** 0.5 for _, target in pairs)
        gradients = torch.autograd.grad(lost * scale, leaves, allow_unused=True)
    pulls = []
    for la, rank_OI, alpha_O1, grad_OI in zip(layers, ranks, alphas, gradients, strict=True):
        if grad_OI is None:  # an expert that this window does not reach
            pulls.append(torch.zeros_like(alpha_O1[:, 0]))
            continue
        pull_O = rate_gradient(grad_OI.float() * la.weight_OI.float() / scale, rank_OI, alpha_O1, width)
        pulls.append(pull_O if len(alpha_O1) == len(pull_O) else pull_O.sum(0, keepdim=True))
    return pulls


def relative_error(out: Tensor, target: Tensor) -> Tensor:
    """mean over channels of sum_t (y - target)^2 / sum_t target^2."""
    y_TD, target_TD = out.float().flatten(0, -2), target.float().flatten(0, -2)
    whole_D = target_TD.square().sum(0)
    return ((y_TD - target_TD).square().sum(0) / whole_D.clamp_min(1e-12)).mean()


def keep_probability(rank_OI: Tensor, alpha_O1: Tensor, width: float) -> Tensor:
    """P: how likely each rank is kept at rate alpha."""
    return (((rank_OI + 0.5) / rank_OI.shape[1] - alpha_O1) / width).sigmoid()


def rate_gradient(grad_OI: Tensor, rank_OI: Tensor, alpha_O1: Tensor, width: float) -> Tensor:
    """The gradient in each row's alpha, given that in its mask: dP / dalpha = -P (1 - P) / width."""
    p_OI = keep_probability(rank_OI, alpha_O1, width)
    return (grad_OI * p_OI * (p_OI - 1)).sum(1) / width


def _ranks(score_OI: Tensor) -> Tensor:
    """The place of each weight in its row, 0 the lowest score; among equals the lower index comes first."""
    order_OI = score_OI.argsort(dim=1, stable=True)
    place = torch.arange(score_OI.shape[1], dtype=torch.int32, device=score_OI.device)
    return torch.empty_like(order_OI, dtype=torch.int32).scatter_(1, order_OI, place.expand_as(order_OI))


def spend(theta_O: Tensor, inputs_O: Tensor, total: int) -> Tensor:
    """How many weights each row loses, `total` in all: inputs * sigmoid(theta + shift), the shift common to all
    rows, rounded by largest remainder. No row loses all its weights."""
    wide = widest(theta_O.device)
    theta_O, inputs_O = theta_O.to(wide), inputs_O.to(wide)
    most = (inputs_O - 1).sum().clamp(max=total)

    def want(shift: Tensor) -> Tensor:
        return torch.minimum(inputs_O * (theta_O + shift).sigmoid(), inputs_O - 1)

    low, high = torch.full_like(most, -100.0), torch.full_like(most, 100.0)
    for _ in range(48):  # nothing is asked: after so many halvings low and high are less than 1e-12 apart
        middle = (low + high) / 2
        apart = high - low > 1e-12 * low.abs().clamp(min=1)
        under = want(middle).sum() < most
        low, high = torch.where(apart & under, middle, low), torch.where(apart & ~under, middle, high)
    count_O = want(low).floor()
    remainder_O = (want(high) - count_O).masked_fill(count_O >= inputs_O - 1, -math.inf)
    order_O = remainder_O.argsort(descending=True, stable=True)
    missing_O = torch.arange(len(order_O), device=order_O.device) < most - count_O.sum()
    return (count_O + torch.zeros_like(missing_O).scatter_(0, order_O, missing_O)).long()
