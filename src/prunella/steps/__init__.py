"""Steps: a block goes in, a block comes out. One file a method.

A step is a plain function of a `Layer` (or of a whole `Block`), with its options as keyword arguments;
the defaults stand in its signature and nowhere else:

    @register("mine", needs={"norm"})
    def mine(layer: Layer, *, power: float = 1.0) -> Layer: ...
"""

from ..registry import Step, make, register, steps
from . import (  # noqa: F401  (registers them)
    admm,
    align,
    alps,
    besa,
    dsnot,
    gptq,
    magnitude,
    ria,
    sparsegpt,
    swap,
    update,
    wanda,
)

__all__ = ["Step", "make", "register", "steps"]
