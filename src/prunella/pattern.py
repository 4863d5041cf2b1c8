"""The only top-k: from scores to a mask with exactly the right number of zeros."""

import contextlib
import functools
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from .errors import NumericalError
from .types import Layer, Pattern
from .waits import demand, either, fetch, number, together

ROWS = 64  # so few are sorted on an accelerator, to select from them
_watching: list[Tensor] | None = None  # what `ranked` collects


@contextlib.contextmanager
def ranked() -> Iterator[list[Tensor]]:
    """Collect the scores (O, I) that `keep` is given inside; of a block pattern one score for each block."""
    global _watching
    before, _watching = _watching, []
    try:
        yield _watching
    finally:
        _watching = before


def keep(score_OI: Tensor, sparsity: float | Tensor, pattern: Pattern = Pattern(), group: str = "layer") -> Tensor:
    """The mask (bool, True = kept) that prunes the lowest scores.

    Args:
        score_OI: importance of each weight; larger is kept. A block scores the sum over its weights.
        sparsity: share to prune in each group; an `N:M` pattern fixes its own and ignores this one. Where only a device
            knows it, a tensor there.
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
    if _watching is not None:
        _watching.append(score_OI)
    groups = score_OI if group == "row" else score_OI.reshape(1, -1)
    size = groups.shape[1]
    if isinstance(sparsity, Tensor):
        count: int | Tensor = (size * sparsity).round().clamp(max=size - 1)
    else:
        count = min(round(size * sparsity), size - 1)
    return ~_lowest(groups, count).view(rows, columns)


def cut(layers: Callable[[Callable[[str, Tensor], None]], None], count: int) -> dict[str, int]:
    """How many of each layer's scores are among the `count` lowest of all layers together; equal ones count as lower in
    the layer that comes first.

    Args:
        layers: shows all layers to a visitor, one after the other: name, and scores in float32 (of any shape). It is
            asked twice, so that no more than one layer's scores need to be in memory.
        count: at most as many as there are.

    Scores are sorted by the bits of their numbers, the first sixteen and then the others (a radix selection): the cut
    is exact, and counts of blocks or machines add up. Raises NumericalError for NaN, naming the layer.

    >>> cut(lambda see: [see("a", torch.tensor([3.0, 1.0])), see("b", torch.tensor([2.0, 1.0]))], 2)
    {'a': 1, 'b': 1}
    """
    high: list[Tensor] = []  # how many scores have each of the high bits
    low: list[Tensor] = []  # and, of those at the edge, each of the low bits
    under: dict[str, Tensor] = {}
    level: dict[str, tuple[Tensor, Tensor]] = {}  # of the scores at the edge: low bits, and how many have them

    def first(name: str, score: Tensor) -> None:
        demand(~score.isnan().any(), lambda: NumericalError(f"the scores of layer '{name}' hold NaN."))
        under[name] = torch.zeros((), dtype=torch.int64, device=score.device)
        found_K = _counted(_bits_of(score) >> 16)
        high[:] = [high[0] + found_K if high else found_K]

    def second(name: str, score: Tensor) -> None:
        bits = _bits_of(score)
        at = bits >> 16
        under[name] = (at < edge).sum()
        level[name] = values, counts = _levels(bits & 0xFFFF, at == edge)
        low[:] = [low[0] if low else torch.zeros(1 << 16, dtype=torch.int64, device=score.device)]
        low[0].index_add_(0, values, counts)

    with together():
        layers(first)
        if count <= 0 or not high:
            return dict.fromkeys(under, 0)
        edge = _edge(high[0], count)[0]
        layers(second)
    missing = count - torch.stack(list(under.values())).sum()
    last, lower = _edge(low[0], missing)
    ties = missing - lower
    for name, (values, counts) in level.items():
        equal = torch.minimum((counts * (values == last)).sum(), ties)
        ties = ties - equal
        under[name] = under[name] + (counts * (values < last)).sum() + equal
    return {name: int(found) for name, found in zip(under, fetch(list(under.values())), strict=True)}


def _edge(count_K: Tensor, rank: int | Tensor) -> tuple[Tensor, Tensor]:
    """The last bits below which fewer than `rank` scores are, and how many are."""
    below_K = count_K.cumsum(0) - count_K
    edge = torch.searchsorted(below_K, torch.as_tensor(rank, device=count_K.device)) - 1
    return edge, below_K.gather(0, edge[None])[0]


def _counted(bits: Tensor, among: Tensor | None = None) -> Tensor:
    """How often each of 2^16 numbers is there, or is there `among` them."""
    if bits.device.type == "cpu":
        return torch.bincount(bits if among is None else bits[among], minlength=1 << 16)
    found_K = torch.zeros(1 << 16, dtype=torch.int32, device=bits.device)  # bincount and unique would wait
    return found_K.scatter_add_(
        0, bits, torch.ones_like(bits, dtype=torch.int32) if among is None else among.int()
    ).long()


def _levels(bits: Tensor, among: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers below 2^16 that are there `among` these, and how often; of a device all of them."""
    if bits.device.type == "cpu":
        values, counts = torch.unique(bits[among], return_counts=True)
        return values, counts
    return _numbers(bits.device), _counted(bits, among)


@functools.cache
def _numbers(device: torch.device) -> Tensor:
    return torch.arange(1 << 16, device=device)


def _bits_of(score: Tensor) -> Tensor:
    """Numbers from 0 to 2^32 - 1 in the order of the scores."""
    bits = (score.detach().float().flatten() + 0.0).view(torch.int32)  # + 0.0: there is one zero
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() + (1 << 31)


def hold_zeros(layer: Layer) -> Layer:
    """The layer with a mask that prunes all weights that came in as zeros, and no more weights than before.

    Where the step kept some of them, others that it pruned stay instead, the largest first, with their dense values.
    Under a pattern as many as it leaves room for: of an N:M group that came with more zeros all stay zero, and in a
    block of weights that is kept so do its single zeros. Without a mask the layer is as it was.
    """
    if layer.mask_OI is None:
        return layer
    zero_OI = layer.dense_OI == 0
    kept = (zero_OI & layer.mask_OI).any()
    if kept.device.type == "cpu" and not kept:
        return layer
    first_OI = zero_OI
    if layer.pattern.kind == "block":  # only blocks that are zero all over can be pruned for their zeros
        r, c = layer.pattern.first, layer.pattern.second
        blocks = zero_OI.view(len(zero_OI) // r, r, -1, c).all(3).all(1)
        first_OI = blocks.repeat_interleave(r, 0).repeat_interleave(c, 1)
    size_OI = layer.dense_OI.float().abs()
    score_OI = size_OI / size_OI.max().clamp_min(1e-30) + 2.0 * layer.mask_OI
    share = 1 - number(layer.mask_OI.count_nonzero()) / layer.mask_OI.numel()
    mask_OI = keep(score_OI.masked_fill(first_OI, -1.0), share, layer.pattern)
    dense_OI = layer.dense_OI if layer.grid is None else layer.grid.round(layer.dense_OI)
    weight_OI = torch.where(layer.mask_OI, layer.weight_OI, dense_OI)
    return layer.pruned(weight_OI, either(kept, mask_OI & ~zero_OI, layer.mask_OI), grid=layer.grid)


def _lowest(score_GK: Tensor, count: int | Tensor) -> Tensor:
    """True at the `count` lowest scores of each row; among equals the lower index counts as lower."""
    if not isinstance(count, Tensor) and count <= 0:
        return torch.zeros_like(score_GK, dtype=torch.bool)
    here = score_GK.device.type == "cpu"
    if isinstance(count, Tensor) or (
        not here and len(score_GK) < ROWS
    ):  # where a row is selected from by a single block of threads
        order_GK = (score_GK + 0.0).sort(dim=1, stable=True).indices  # + 0.0: there is one zero
        lowest_K = torch.arange(score_GK.shape[1], device=score_GK.device) < count
        return torch.zeros_like(score_GK, dtype=torch.bool).scatter_(1, order_GK, lowest_K.expand_as(order_GK))
    if here and score_GK.dtype == torch.float32:  # numpy selects two to three times as fast
        part = np.partition(score_GK.detach().numpy(), count - 1, axis=1)
        threshold_G1 = torch.from_numpy(part[:, count - 1 : count])
    else:
        threshold_G1 = score_GK.kthvalue(count, dim=1, keepdim=True).values
    lowest = score_GK <= threshold_G1
    if here and lowest.count_nonzero() == count * len(lowest):  # no ties; a device would have to be waited for
        return lowest
    below = score_GK < threshold_G1
    level = score_GK == threshold_G1
    missing_G1 = count - below.sum(1, keepdim=True)
    return below | (level & (level.cumsum(1, dtype=torch.int32) <= missing_G1))


def pack(mask_OI: Tensor) -> Tensor:
    """A mask as bits (uint8), on its device, row after row, the first weight in the highest bit of the first byte."""
    if mask_OI.device.type == "cpu":
        return torch.from_numpy(np.packbits(mask_OI.numpy()))
    flat = mask_OI.flatten()
    bytes_B8 = functional.pad(flat.view(torch.uint8), (0, -flat.numel() % 8)).view(-1, 8)
    return (bytes_B8 * _places(flat.device)).sum(1, dtype=torch.uint8)


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
    return (packed[:, None] & _places(packed.device)).ne(0).flatten()


@functools.cache
def _places(device: torch.device) -> Tensor:
    """What each of a byte's eight bits is worth, the highest first."""
    return torch.tensor([128, 64, 32, 16, 8, 4, 2, 1], dtype=torch.uint8, device=device)


def best(score_OI: Tensor, where_OI: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Columns of the `count` highest scores of each row among `where_OI`, the first first among equals, and whether
    each is one of those."""
    sorted_OI = score_OI.masked_fill(~where_OI, -torch.inf).sort(dim=1, descending=True, stable=True)
    return sorted_OI.indices[:, :count], sorted_OI.values[:, :count] > -torch.inf
