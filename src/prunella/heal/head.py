"""The output head."""

from pydantic import PositiveFloat, PositiveInt

from ..train.parts import Change, LowRank, Part, trains
from .mask_lora import MaskLora


@trains("head")
def head(
    part: Part, *, rank: PositiveInt = 16, alpha: PositiveFloat | None = None, rate: float = 8e-3
) -> Change | None:
    """Train a low-rank change of the head, W + c B A, merged densely; of a head that is pruned, as the layers of some
    networks' blocks are, W + M * (c B A).

    Where head and embeddings are one tensor, both get the change, so that they still are one after merging.

    Args:
        rank: r, columns of B and rows of A.
        alpha: c = alpha / r; None: c = 2.
        rate: learning rate.
    """
    if "head" not in part.kinds:
        return None
    return LowRank(part, rank, alpha) if part.mask is None else MaskLora(part, rank, alpha)
