"""The matrices of a block: which of its parameters are layers to prune, through which lens each is read as (O, I), and
which are left out and why.

A parameter is a layer if a product multiplies by it. What torch's linear layer and transformers' own experts do is
known; of any other parameter of two or more dimensions (experts kept as one matrix, gates without a module, heads side
by side) the product itself tells, see learn.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

from torch import Tensor, nn

from .compat import CONVOLUTIONS
from .errors import ModelError
from .lenses import Experts, Lens, Linear, fitting, holds_experts, learned, worn_by
from .types import Pattern


@dataclass(frozen=True)
class Slot:
    """Where a layer's weight lives in the network, and what is wanted of it.

    module, parameter: the module that holds it, and its name there
    lens:     how that is read as matrices
    part:     which of them; None where it is one matrix
    sparsity: the share of its weights that is to go
    pattern:  where its zeros may stand
    """

    name: str
    module: nn.Module
    parameter: str
    lens: Lens
    part: int | None = None
    sparsity: float = 0.0
    pattern: Pattern = field(default_factory=Pattern)

    @property
    def tensor(self) -> Tensor:
        """The whole parameter."""
        tensor: Tensor = getattr(self.module, self.parameter).data
        return tensor

    def read(self, tensor: Tensor | None = None) -> Tensor:
        """The weight (O, I), or what another tensor of the parameter's shape has in its place. It shares memory where
        that can be: only `write` changes it."""
        return self.lens.matrices(self.tensor if tensor is None else tensor)[self.part or 0]

    def write(self, weight_OI: Tensor, tensor: Tensor | None = None) -> None:
        """Put a weight into the network, or into another tensor of the parameter's shape."""
        self.lens.write(self.tensor if tensor is None else tensor, self.part or 0, weight_OI)

    def bias(self) -> Tensor | None:
        return self.lens.bias(self.module, self.parameter, self.part or 0)

    @property
    def routed(self) -> bool:
        """Does what it holds decide which rows meet it?"""
        return self.lens.routed and self.part is not None

    @property
    def key(self) -> str:
        """The name of the network's parameter that holds the weight."""
        if self.part is not None:
            return self.name.rpartition(".")[0]
        return f"{self.name}.weight" if self.parameter == "weight" else self.name

    @property
    def shape(self) -> tuple[int, int]:
        return self.lens.shape(self.tensor)[1:]


@dataclass(frozen=True)
class LeftOut:
    """A parameter of two or more dimensions that is no layer to prune, why, and how many of its weights are zero (where
    they were counted: `survey` does not look at them)."""

    name: str
    shape: tuple[int, ...]
    why: str
    zeros: int = 0

    @property
    def weights(self) -> int:
        return math.prod(self.shape)


# Why a parameter is left out.
ROUTER = "router"
CONVOLUTION = "convolution"
EMBEDDING = "embedding"
BIAS = "bias"
ONE_OUTPUT = "a single input or output"
SHARED = "shared by several blocks"
NO_PRODUCT = "no factor of a product"
OWN_DTYPE = "computed in a dtype of its own"
UNSEEN = "unknown: it was not seen how the model multiplies by it"


def find_layers(module: nn.Module, prefix: str) -> list[Slot]:
    """The prunable weights of a block: linear layers (subclasses and GPT-2's transposed Conv1D too), each expert of a
    mixture, and whatever else is multiplied by (`learn`). What is left out, `survey` tells."""
    return survey(module, prefix)[0]


def within(block: str, path: str) -> str:
    """The name in the network of what has this one in a block; a block without a name is the network itself."""
    return ".".join(filter(None, (block, path)))


def survey(module: nn.Module, prefix: str) -> tuple[list[Slot], list[LeftOut]]:
    """All parameters of a block that have two or more dimensions: those that are layers, and the others."""
    slots: list[Slot] = []
    left: list[LeftOut] = []
    mixtures = _mixtures(module)
    for path, child in module.named_modules():
        name = within(prefix, path)
        for key, parameter in child.named_parameters(recurse=False):
            if parameter.ndim < 2:
                continue
            full = within(name, key)
            lens = _lens(module, path, key, mixtures)
            if isinstance(lens, str):
                left.append(LeftOut(full, tuple(parameter.shape), lens))
            elif lens.numbered(parameter):
                slots += [Slot(f"{full}.{e}", child, key, lens, e) for e in range(lens.shape(parameter)[0])]
            else:
                slots.append(Slot(name if key == "weight" else full, child, key, lens))
    return slots, left


def left_out(module: nn.Module, prefix: str) -> list[LeftOut]:
    """What is left out of a block whose weights are loaded, its zeros counted."""
    values = dict(module.named_parameters())
    return [
        replace(item, zeros=item.weights - int(values[item.name.removeprefix(f"{prefix}.")].count_nonzero()))
        for item in survey(module, prefix)[1]
    ]


def unpruned(module: nn.Module, prefix: str, pruned: Collection[str]) -> frozenset[str]:
    """The parameters of a block that belong to its routers, or to layers that are not `pruned` (names of parameters):
    what is left as it is goes with its bias."""
    slots, left = survey(module, prefix)
    kept = {slot.key for slot in slots} - set(pruned)
    routers = {item.name.rpartition(".")[0] for item in left if item.why == ROUTER}
    names = set()
    for path, child in module.named_modules():
        name = within(prefix, path)
        router = name in routers or routes(module, path, 0, {})
        for key, _ in child.named_parameters(recurse=False):
            full = within(name, key)
            owner = within(name, "weight") if key == "bias" else full.removesuffix("_bias")
            if router or owner in kept:
                names.add(full)
    return frozenset(names)


def check_found(masked: Iterable[str], slots: Iterable[Slot]) -> None:
    """Raises ModelError, naming the layer, for a mask of which no layer is found."""
    if strange := set(masked) - {slot.name for slot in slots}:
        raise ModelError(
            f"'{min(strange)}' was pruned, and is no layer that is known here: if it was pruned through a lens of its"
            " own, only what takes a recipe (prune, heal) can be told: --set lenses=FILE.py:NAME."
        )


def matches(name: str, glob: str) -> bool:
    """Does a layer's name match a user's pattern? `*` and `?` as in a shell; any run of whole parts of the name is
    enough (`down_proj`, `self_attn`, `model.layers.1`)."""
    return fnmatchcase(f".{name}.", f"*.{glob}.*")


# ---------------------------------------------------------------------------------------------------------
# What a parameter is

_ROUTER = re.compile(r"router|top_?k", re.IGNORECASE)  # in the name of a class
_GATE = re.compile(r"(gate|gating|router)$", re.IGNORECASE)  # at the end of a module's or a class's name


def _lens(block: nn.Module, path: str, key: str, mixtures: Mapping[str, set[int]]) -> Lens | str:
    """How a parameter is read, or why it is left out."""
    module = block.get_submodule(path)
    worn, found = worn_by(module, key), learned.get(module, {}).get(key)
    if worn is None and (why := apart(module, key)):
        return why
    if found == SHARED:
        return SHARED
    lens = worn or fitting(module, key) or found or assumed(module, key, UNSEEN)
    parameter = getattr(module, key)
    shape = parameter.shape if isinstance(lens, str) else lens.shape(parameter)[1:]
    if not holds_experts(module) and routes(block, path, shape[0], mixtures):
        return ROUTER
    return ONE_OUTPUT if isinstance(lens, Lens) and min(shape) == 1 else lens


def apart(module: nn.Module, key: str) -> str | None:
    """Why a parameter is left out whatever it is multiplied by."""
    if isinstance(module, CONVOLUTIONS):
        return CONVOLUTION
    if isinstance(module, nn.Embedding):
        return EMBEDDING
    return BIAS if key.endswith("bias") else None


def assumed(module: nn.Module, key: str, otherwise: str) -> Lens | str:
    """What is taken for granted where no product was seen, until the stream sees it: that a linear layer of any kind,
    and any expert, is stored as (O, I)."""
    parameter = getattr(module, key)
    if key == "weight" and parameter.ndim == 2 and isinstance(module, nn.Linear):
        return Linear(*parameter.shape)
    if parameter.ndim == 3 and holds_experts(module):
        return Experts(*parameter.shape[1:])
    return otherwise


def _mixtures(block: nn.Module) -> dict[str, set[int]]:
    """The modules of a block that hold the experts of a mixture, and how many of them there are."""
    found: dict[str, set[int]] = {}
    for path, child in block.named_modules():
        if isinstance(child, nn.ModuleList) and path.rpartition(".")[2] == "experts":
            found.setdefault(path.rpartition(".")[0], set()).add(len(child))
        elif holds_experts(child):
            counts = {p.shape[0] for p in child.parameters(recurse=False) if p.ndim == 3}
            counts |= {n for key in ("num_experts", "moe_num_experts") if isinstance(n := getattr(child, key, 0), int)}
            if counts - {0}:
                found.setdefault(path.rpartition(".")[0], set()).update(counts - {0})
    return found


def routes(block: nn.Module, path: str, outputs: int, mixtures: Mapping[str, set[int]]) -> bool:
    """Does a layer choose the experts that a token goes to? It lies in a module called a router (`router`,
    `…TopKRouter`), or beside the experts: named `gate`, or with an output for each."""
    names = path.split(".")
    above = [".".join(names[:n]) for n in range(1, len(names) + 1)]
    for place in above:
        name = place.rpartition(".")[2]
        if name.endswith("router") or _ROUTER.search(type(block.get_submodule(place)).__name__):
            return True
    owner, _, name = path.rpartition(".")
    if owner in mixtures:
        return name == "gate" or outputs in mixtures[owner]
    above_owner = owner.rpartition(".")[0]
    gate = _GATE.search(owner) or _GATE.search(type(block.get_submodule(owner)).__name__)
    return bool(gate) and above_owner in mixtures and outputs in mixtures[above_owner]
