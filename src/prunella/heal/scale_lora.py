"""ScaleLoRA: a low-rank factor on every kept weight."""

from typing import Literal

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from ..train.parts import Change, Part, trains


class ScaleLora(Change):
    """W * (B A), with B A = 1 at the start."""

    def __init__(self, part: Part, rank: int, start: str):
        super().__init__()
        *experts, rows, columns = part.value.shape
        rank = min(rank, rows, columns)
        device = part.value.device
        left = torch.full((*experts, rows, rank), rank**-0.5, device=device)
        right = torch.full((*experts, rank, columns), rank**-0.5, device=device)
        if start == "broken":
            left.zero_()[..., :1] = 1
            right.uniform_(-(columns**-0.5), columns**-0.5)[..., :1, :] = 1
        self.left, self.right = nn.Parameter(left), nn.Parameter(right)

    def make(self, base: Tensor) -> Tensor:
        return (base.float() * (self.left @ self.right)).to(base.dtype)


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
