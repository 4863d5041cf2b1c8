"""GPTQ: round from left to right, prune on the way, and let the remaining weights make up for both."""

from typing import Annotated, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveInt

from ..columns import column_pass
from ..errors import InputError
from ..linalg import inverse_factor
from ..registry import register
from ..sparse.format import SPAN
from ..types import Layer


@register("gptq", needs={"gram"})
def gptq(
    layer: Layer,
    *,
    bits: Literal[8, 4, 3] = 4,
    group: Annotated[int, Field(ge=0, multiple_of=SPAN)] = SPAN,
    damping: NonNegativeFloat = 0.01,
    tile: PositiveInt = 128,
) -> Layer:
    """Quantize, and prune on the way, in one pass over the columns, updating the rest.

    The column pass of `sparsegpt`, in which a kept weight is rounded to its grid, so that the errors of pruning and of
    rounding are made up for together:

        e_i = (w_ij - q_ij) / U_jj            q_ij = s_ig round(w_ij / s_ig) if kept, else 0
        W_i,j: <- W_i,j: - e_i U_j,j:

    The grid is the packed format's: integers between -(2^(bits - 1) - 1) and 2^(bits - 1) - 1 times a bfloat16 scale
    s_ig for each group g of inputs. It is fitted when the pass reaches the group, to weights that carry the updates
    before it. `prunella pack` takes the values as they are, without a second rounding.

    A mask that an earlier step chose is kept. Weights that the step left as they were are taken from the dense
    model, pruned ones too, so that the pass makes up for the pruning; where the step updated them to that end
    (`sparsegpt`, `alps`, `update`), the pass starts from its result. Without a mask, `sparsegpt`'s is chosen on the
    way.

    Args:
        bits: 8, 4 or 3; 3 are stored as 4.
        group: inputs that share a scale, a multiple of 128; 0: all of a row.
        damping: as in `sparsegpt`.
        tile: as in `sparsegpt`.

    Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", 2023, and
    Frantar and Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", 2023. Their
    grids have a zero point; these are symmetric, as a pruned weight has to be zero and the kernels need none.
    """
    if group % layer.pattern.columns and group < layer.weight_OI.shape[1]:
        raise InputError(
            f"step 'gptq' cannot round groups of {group} inputs under pattern {layer.pattern}: set gptq.group=0."
        )
    factor = inverse_factor(layer.stats, damping)
    start_OI = layer.weight_OI
    if layer.mask_OI is not None:
        as_it_was = (start_OI == layer.dense_OI.masked_fill(~layer.mask_OI, 0)).all()
        start_OI = torch.where(as_it_was, layer.dense_OI, start_OI)
    weight_OI, mask_OI, grid = column_pass(
        start_OI, factor, layer.mask_OI, layer.sparsity, layer.pattern, tile=tile, bits=bits, group=group
    )
    return layer.pruned(weight_OI, mask_OI, *factor.notes(damping), grid=grid)
