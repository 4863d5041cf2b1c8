"""How a layer's weights are spread, before and after: small enough to keep of every layer."""

from __future__ import annotations

import torch
from torch import Tensor

BINS = 64
SPAN = 4.0  # the bins reach from -SPAN to SPAN times the root mean square of the dense weights
SAMPLE = 1 << 15


def histograms(dense_OI: Tensor, weight_OI: Tensor, mask_OI: Tensor) -> dict[str, float | str]:
    """Counts of a layer's weights, and what the counts are of.

    The bins have one width in units of the dense weights' root mean square, so that the histograms of all layers
    can be added up. Weights beyond the last bin are counted in it; weights that the mask prunes are not counted.
    Large layers are counted on at most SAMPLE weights, evenly spread over the matrix.

    Returns:
        {"rms", "dense", "pruned"}: a number and twice BINS counts, separated by spaces to stand on one line of a
        file.
    """
    stride = -(-dense_OI.numel() // SAMPLE) | 1  # odd: an even one would see the same few columns of every row
    dense, weight, mask = (t.flatten()[::stride] for t in (dense_OI, weight_OI, mask_OI))
    dense, weight = dense.float(), weight.float()[mask]
    rms = dense.square().mean().sqrt().item()
    limit = SPAN * rms or 1.0

    def counts(values: Tensor) -> str:
        found = torch.histc(values.clamp(-limit, limit), BINS, -limit, limit)
        return " ".join(str(int(count)) for count in found.tolist())

    return {"rms": rms, "dense": counts(dense), "pruned": counts(weight)}
