"""ScaleLoRA: a low-rank factor on every kept weight."""

from typing import Literal

from pydantic import PositiveInt
from torch import Tensor

from ..train.parts import Change, Factors, Part, trains


class ScaleLora(Factors):
    """W * (B A), with B A = 1 at the start."""

    def __init__(self, part: Part, rank: int, start: str):
        super().__init__(part, rank)
        left, right = self.left.data, self.right.data
        if start == "broken":
            left[..., :1] = 1
            right.uniform_(-(right.shape[-1] ** -0.5), right.shape[-1] ** -0.5)[..., :1, :] = 1
        else:
            left.fill_(left.shape[-1] ** -0.5)
            right.fill_(left.shape[-1] ** -0.5)

    def make(self, base: Tensor) -> Tensor:
        return (base.float() * self.product()).to(base.dtype)


@trains("scale-lora")
def scale_lora(
    part: Part, *, rank: PositiveInt = 16, start: Literal["broken", "constant"] = "broken", rate: float = 1e-2
) -> Change | None:
    """Train W * (B A) of the pruned layers: a zero stays zero whatever the factor.

    Args:
        rank: r, columns of B and rows of A.
        start: `constant`: all entries 1/sqrt(r), as in the paper; every rank then gets the same gradient, and B A
            stays of rank 1 whatever r is. `broken`: the first rank makes the ones, the others start like LoRA, B
            zero and A drawn uniformly from +-1/sqrt(I).
        rate: learning rate.

    Zimmer et al., "PERP: Rethinking the Prune-Retrain Paradigm in the Era of LLMs", 2023.
    """
    return ScaleLora(part, rank, start) if part.mask is not None else None
