"""How a layer's weights are spread, before and after: small enough to keep of every layer."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

BINS = 64
SPAN = 4.0  # the bins reach from -SPAN to SPAN times the root mean square of the dense weights
SAMPLE = 1 << 15


def counted(dense_OI: Tensor, weight_OI: Tensor, mask_OI: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Counts of a layer's weights, and what the counts are of, on their device.

    The bins have one width in units of the dense weights' root mean square, so that the histograms of all layers
    can be added up. Weights beyond the last bin are counted in it; weights that the mask prunes are not counted.
    Large layers are counted on at most SAMPLE weights, evenly spread over the matrix.

    Returns:
        The root mean square of the dense weights, counts (BINS) of them and of the pruned ones.
    """
    stride = -(-dense_OI.numel() // SAMPLE) | 1  # odd: an even one would see the same few columns of every row
    dense, weight, mask = (t.flatten()[::stride] for t in (dense_OI, weight_OI, mask_OI))
    dense, weight = dense.float(), weight.float()
    rms = dense.square().mean().sqrt()
    limit = torch.where(rms == 0, 1.0, SPAN * rms)

    def counts(values: Tensor, among: Tensor) -> Tensor:
        # As torch.histc, which wants its limits as numbers.
        at = (torch.minimum(values.maximum(-limit), limit) + limit) * BINS / (limit + limit)
        found = torch.zeros(BINS, dtype=torch.int32, device=values.device)
        return found.scatter_add_(0, at.long().clamp_(0, BINS - 1), among.int())

    return rms, counts(dense, torch.ones_like(mask)), counts(weight, mask)


def histograms(found: Iterable[Tensor]) -> dict[str, float | str]:
    """What was `counted`, for the report: {"rms", "dense", "pruned"}, a number and twice BINS counts, separated by
    spaces to stand on one line of a file."""
    rms, *counts = found
    dense, pruned = (" ".join(map(str, count.tolist())) for count in counts)
    return {"rms": rms.item(), "dense": dense, "pruned": pruned}
