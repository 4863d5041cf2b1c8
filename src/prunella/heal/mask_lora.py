"""MaskLoRA: a low-rank change that respects the mask while it trains."""

from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from ..train.parts import Change, LowRank, Part, trains


class MaskLora(LowRank):
    """W + M * (c B A)."""

    def make(self, base: Tensor) -> Tensor:
        return (base.float() + self.masked()).to(base.dtype)


@trains("mask-lora")
def mask_lora(
    part: Part, *, rank: PositiveInt = 16, alpha: PositiveFloat | None = None, rate: float = 4e-3
) -> Change | None:
    """Train W + M * (c B A) of the pruned layers; what is merged is exactly what trained.

    Args:
        rank: r, columns of B and rows of A.
        alpha: c = alpha / r; None: c = 2.
        rate: learning rate.

    Zimmer et al., "PERP: Rethinking the Prune-Retrain Paradigm in the Era of LLMs", 2023.
    """
    return MaskLora(part, rank, alpha) if part.mask is not None else None
