"""A healing method of a third party: each row of a pruned weight has a factor that trains."""

import torch
from torch import Tensor, nn

from prunella.heal import Change, Part, trains


class Gains(Change):
    """gain_O * weight_OI: what is zero stays zero."""

    def __init__(self, part: Part):
        super().__init__(part.mask)
        self.gain_O = nn.Parameter(torch.ones(len(part.value), device=part.value.device))

    def make(self, base: Tensor) -> Tensor:
        return (base.float() * self.gain_O[:, None]).to(base.dtype)


@trains("toy")
def toy(part: Part, *, rate: float = 1e-3) -> Change | None:
    """A factor for each row of the pruned weights."""
    return Gains(part) if part.mask is not None and part.value.ndim == 2 else None
