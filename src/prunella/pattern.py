"""The only top-k: from scores to a mask with exactly the right number of zeros."""

import numpy as np
import torch
from torch import Tensor

from .types import Layer, Pattern


def keep(score_OI: Tensor, sparsity: float, pattern: Pattern = Pattern(), group: str = "layer") -> Tensor:
    """The mask (bool, True = kept) that prunes the lowest scores.

    Args:
        score_OI: importance of each weight; larger is kept. A block scores the sum over its weights.
        sparsity: share to prune in each group; an `N:M` pattern fixes its own and ignores this one.
        pattern: where zeros may stand. It must divide the shape (`Pattern.check`).
        group: what competes: the whole `layer`, or each output `row` (of blocks, for a block pattern).

    Exactly round(n * sparsity) of a group's n weights (or blocks) are pruned, and never all of them;
    ties go to the lower index, which is pruned first.

    >>> keep(torch.tensor([[3.0, 1.0, 2.0, 4.0]]), 0.5).tolist()
    [[True, False, False, True]]
    """
    rows, columns = score_OI.shape
    if pattern.kind == "nm":
        groups = score_OI.reshape(-1, pattern.second)
        return ~_lowest(groups, pattern.second - pattern.first).view(rows, columns)
    if pattern.kind == "block":
        r, c = pattern.first, pattern.second
        score = score_OI.view(rows // r, r, columns // c, c).sum((1, 3))
        return keep(score, sparsity, group=group).repeat_interleave(r, 0).repeat_interleave(c, 1)
    groups = score_OI if group == "row" else score_OI.reshape(1, -1)
    count = min(round(groups.shape[1] * sparsity), groups.shape[1] - 1)
    return ~_lowest(groups, count).view(rows, columns)


def hold_zeros(layer: Layer) -> Layer:
    """The layer with a mask that prunes all weights that came in as zeros, and no more weights than before.

    Where the step kept some of them, others that it pruned stay instead, the largest first, with their dense values.
    Under a pattern as many as it leaves room for: of an N:M group that came with more zeros all stay zero, and in a
    block of weights that is kept so do its single zeros. Without a mask the layer is as it was.
    """
    if layer.mask_OI is None:
        return layer
    zero_OI = layer.dense_OI == 0
    if not (zero_OI & layer.mask_OI).any():
        return layer
    first_OI = zero_OI
    if layer.pattern.kind == "block":  # only blocks that are zero all over can be pruned for their zeros
        r, c = layer.pattern.first, layer.pattern.second
        blocks = zero_OI.view(len(zero_OI) // r, r, -1, c).all(3).all(1)
        first_OI = blocks.repeat_interleave(r, 0).repeat_interleave(c, 1)
    size_OI = layer.dense_OI.float().abs()
    score_OI = size_OI / size_OI.max().clamp_min(1e-30) + 2.0 * layer.mask_OI
    share = 1 - layer.mask_OI.count_nonzero().item() / layer.mask_OI.numel()
    mask_OI = keep(score_OI.masked_fill(first_OI, -1.0), share, layer.pattern)
    dense_OI = layer.dense_OI if layer.grid is None else layer.grid.round(layer.dense_OI)
    weight_OI = torch.where(layer.mask_OI, layer.weight_OI, dense_OI)
    return layer.pruned(weight_OI, mask_OI & ~zero_OI, grid=layer.grid)


def _lowest(score_GK: Tensor, count: int) -> Tensor:
    """True at the `count` lowest scores of each row; among equals the lower index counts as lower."""
    if count <= 0:
        return torch.zeros_like(score_GK, dtype=torch.bool)
    if score_GK.device.type == "cpu" and score_GK.dtype == torch.float32:  # numpy selects two to three times as fast
        part = np.partition(score_GK.detach().numpy(), count - 1, axis=1)
        threshold_G1 = torch.from_numpy(part[:, count - 1 : count])
    else:
        threshold_G1 = score_GK.kthvalue(count, dim=1, keepdim=True).values
    lowest = score_GK <= threshold_G1
    if lowest.count_nonzero() == count * len(lowest):  # no ties
        return lowest
    below = score_GK < threshold_G1
    level = score_GK == threshold_G1
    missing_G1 = count - below.sum(1, keepdim=True)
    return below | (level & (level.cumsum(1) <= missing_G1))


def pack(mask_OI: Tensor) -> Tensor:
    """A mask as bits (uint8), row after row, the first weight in the highest bit of the first byte."""
    return torch.from_numpy(np.packbits(mask_OI.cpu().numpy()))


def unpack(bits: Tensor, shape: tuple[int, int]) -> Tensor:
    """The mask (bool, O x I) that `pack` made `bits` from, on their device. Raises ValueError if their number is
    another."""
    count = shape[0] * shape[1]
    if bits.dtype != torch.uint8 or bits.numel() != -(-count // 8):
        raise ValueError(f"{bits.numel()} bytes are no mask of {shape[0]} x {shape[1]} weights")
    if bits.device.type != "cpu":
        return _bits(bits)[:count].view(shape)
    return torch.from_numpy(np.unpackbits(bits.numpy(), count=count).astype(bool)).view(shape)


def _bits(packed: Tensor) -> Tensor:
    """Eight bool for each byte, the highest bit first, as numpy.unpackbits gives them."""
    places_8 = torch.tensor([128, 64, 32, 16, 8, 4, 2, 1], dtype=torch.uint8, device=packed.device)
    return (packed[:, None] & places_8).ne(0).flatten()


def best(score_OI: Tensor, where_OI: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Columns of the `count` highest scores of each row among `where_OI`, the first first among equals, and whether
    each is one of those."""
    sorted_OI = score_OI.masked_fill(~where_OI, -torch.inf).sort(dim=1, descending=True, stable=True)
    return sorted_OI.indices[:, :count], sorted_OI.values[:, :count] > -torch.inf
