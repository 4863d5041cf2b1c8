"""LoRA that is pruned when it is merged."""

from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from ..train.parts import Change, LowRank, Part, trains


class LoraPrune(LowRank):
    """W + c B A while it trains, W + M * (c B A) when it is evaluated or merged."""

    def make(self, base: Tensor) -> Tensor:
        if self.training:
            return super().make(base)
        return (base.float() + self.masked()).to(base.dtype)


@trains("lora-prune")
def lora_prune(
    part: Part, *, rank: PositiveInt = 16, alpha: PositiveFloat | None = None, rate: float = 5e-3
) -> Change | None:
    """Train W + c B A of the pruned layers, merge W + M * (c B A).

    What trained is not what is merged, which is the method's weakness; held-out text is scored as merged.

    Args:
        rank: r, columns of B and rows of A.
        alpha: c = alpha / r; None: c = 2.
        rate: learning rate.

    Zimmer et al., "PERP: Rethinking the Prune-Retrain Paradigm in the Era of LLMs", 2023.
    """
    return LoraPrune(part, rank, alpha) if part.mask is not None else None
