"""Healing: retraining after pruning, the mask held. One file a method.

A method says what training makes of each tensor of the network, or None where it leaves it alone:

    @trains("mine")
    def mine(part: Part, *, rate: float = 1e-4) -> Change | None: ...

Methods combine freely; a tensor that several want belongs to the first of them.
"""

from ..train.parts import Change, Group, Part, groups, make_group, trains
from . import (  # noqa: F401  (importing a method registers it)
    biases,
    embeddings,
    full,
    head,
    lora,
    lora_prune,
    mask_lora,
    norms,
    reconstruct,
    scale_lora,
)

__all__ = ["Change", "Group", "Part", "groups", "make_group", "trains"]
