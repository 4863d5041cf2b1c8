"""Lenses: how a parameter of a module is read as matrices (O, I). One file a lens.

A lens says which modules it fits, turns the parameter into matrices and back, and tells what they meet in a call of the
functions that use it:

    @register_lens("mine")
    class Mine(Lens):
        functions = (torch.conv1d,)

        @classmethod
        def of(cls, module, key): ...
        def matrices(self, tensor): ...
        def tensor(self, matrices_POI, shape): ...
        def inputs(self, parameter, function, args, kwargs): ...

Whatever is watched, pruned, written and reported goes through it.
"""

from .lens import Chunks, Inputs, Lens, Stored

from .linear import Linear  # isort: skip  (importing a lens registers it; the first that fits is taken)
from .conv1d import Conv1D  # isort: skip
from .experts import Experts, holds_experts  # isort: skip
from .product import Multiplied, learned  # isort: skip
from .registry import fitting, lenses, register_lens, wear, worn_by

__all__ = [
    "Chunks",
    "Conv1D",
    "Experts",
    "Inputs",
    "Lens",
    "Linear",
    "Multiplied",
    "Stored",
    "fitting",
    "holds_experts",
    "learned",
    "lenses",
    "register_lens",
    "wear",
    "worn_by",
]
