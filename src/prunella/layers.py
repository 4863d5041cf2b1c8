"""The matrices of a block: which of its parameters are layers to prune, how each is read as (O, I), and which are left
out and why.

A parameter is a layer if a product multiplies by it. What nn.Linear and transformers' own experts do is known; of any
other parameter of two or more dimensions (experts kept as one matrix, gates without a module, heads side by side) the
product itself tells: `learn` runs the network once without any memory, on torch's meta device, and notes along which
side of each the inputs run. The same reading of products, `products`, shows the stream what flows into each layer.
"""

from __future__ import annotations

import contextlib
import math
import re
import string
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import partial
from itertools import product
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from .compat import CONVOLUTIONS, GROUPED_PRODUCT, storage_of
from .trees import map_tensors
from .types import Pattern


@dataclass(frozen=True)
class Lens:
    """How a parameter is read as matrices: one behind the other in memory, each stored as (rows, columns).

    transposed: stored as (I, O): GPT-2's Conv1D, some experts
    alone:      each is multiplied by on its own, not all of them in one batched product
    """

    rows: int
    columns: int
    transposed: bool = False
    alone: bool = True


@dataclass(frozen=True)
class Slot:
    """Where a layer's weight lives in the network, and what is wanted of it.

    transposed: stored as (I, O)
    expert:     which of a parameter's matrices (a mixture's experts, heads side by side); None where it is one matrix
    stored:     rows and columns of each of those; None: the parameter's last two dimensions
    alone:      it is multiplied by on its own, not with all the parameter's matrices in one batched product
    sparsity:   the share of its weights that is to go
    pattern:    where its zeros may stand
    """

    name: str
    module: nn.Module
    parameter: str
    transposed: bool
    expert: int | None = None
    stored: tuple[int, int] | None = None
    alone: bool = True
    sparsity: float = 0.0
    pattern: Pattern = field(default_factory=Pattern)

    def matrices(self, like: Tensor) -> Tensor:
        """A tensor of the parameter's shape as its matrices, as they are stored: (parts, rows, columns)."""
        rows, columns = self.stored or like.shape[-2:]
        return like.view(-1, rows, columns)

    def part(self, like: Tensor) -> Tensor:
        """This layer's matrix (O, I) within a tensor of the parameter's shape, sharing its memory."""
        matrix = self.matrices(like)[self.expert or 0]
        return matrix.T if self.transposed else matrix

    def view(self) -> Tensor:
        """The weight as (O, I), sharing memory with the network's parameter."""
        return self.part(getattr(self.module, self.parameter).data)

    def bias(self) -> Tensor | None:
        name = "bias" if self.parameter == "weight" and self.expert is None else f"{self.parameter}_bias"
        bias = getattr(self.module, name, None)
        return bias if bias is None or self.expert is None else bias[self.expert]

    @property
    def key(self) -> str:
        """The name of the network's parameter that holds the weight."""
        if self.expert is not None:
            return self.name.rpartition(".")[0]
        return f"{self.name}.weight" if self.parameter == "weight" else self.name

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.stored or tuple(getattr(self.module, self.parameter).shape)[-2:]
        return (columns, rows) if self.transposed else (rows, columns)


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
                continue
            stored = (lens.rows, lens.columns)
            parts = parameter.numel() // (lens.rows * lens.columns)
            if parts == 1 and parameter.ndim == 2:
                slots.append(Slot(name if key == "weight" else full, child, key, lens.transposed, None, stored))
            else:
                slots += [Slot(f"{full}.{e}", child, key, lens.transposed, e, stored, lens.alone) for e in range(parts)]
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
        routes = name in routers or _routes(module, path, 0, {})
        for key, _ in child.named_parameters(recurse=False):
            full = within(name, key)
            owner = within(name, "weight") if key == "bias" else full.removesuffix("_bias")
            if routes or owner in kept:
                names.add(full)
    return frozenset(names)


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
    parameter = getattr(module, key)
    if why := _apart(module, key):
        return why
    learned = _learned.get(module, {}).get(key)
    if learned == SHARED:
        return SHARED
    lens = _declared(module, key) or learned
    if lens is None:
        lens = _assumed(module, key, UNSEEN)
    outputs = parameter.shape[0] if isinstance(lens, str) else lens.columns if lens.transposed else lens.rows
    if not _holds_experts(module) and _routes(block, path, outputs, mixtures):
        return ROUTER
    if isinstance(lens, Lens) and min(lens.rows, lens.columns) == 1:
        return ONE_OUTPUT
    return lens


def _apart(module: nn.Module, key: str) -> str | None:
    """Why a parameter is left out whatever it is multiplied by."""
    if isinstance(module, CONVOLUTIONS):
        return CONVOLUTION
    if isinstance(module, nn.Embedding):
        return EMBEDDING
    return BIAS if key.endswith("bias") else None


def _declared(module: nn.Module, key: str) -> Lens | None:
    """What needs no look at the product: torch's linear layer, GPT-2's, and experts of which transformers says how they
    are stored."""
    parameter = getattr(module, key)
    linear = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
    transposed = type(module).__name__ == "Conv1D"
    if key == "weight" and parameter.ndim == 2 and (linear or transposed):
        rows, columns = parameter.shape
        return Lens(rows, columns, transposed)
    said = getattr(module, "is_transposed", None)
    if parameter.ndim == 3 and isinstance(said, bool) and _holds_experts(module):
        _, rows, columns = parameter.shape
        return Lens(rows, columns, said)
    return None


def _assumed(module: nn.Module, key: str, otherwise: str) -> Lens | str:
    """What is taken for granted where no product was seen, until the stream sees it: that a linear layer of any kind,
    and any expert, is stored as (O, I)."""
    parameter = getattr(module, key)
    if key == "weight" and parameter.ndim == 2 and isinstance(module, nn.Linear):
        return Lens(*parameter.shape)
    if parameter.ndim == 3 and _holds_experts(module):
        return Lens(*parameter.shape[1:])
    return otherwise


def _holds_experts(module: nn.Module) -> bool:
    return "expert" in type(module).__name__.lower()


def _mixtures(block: nn.Module) -> dict[str, set[int]]:
    """The modules of a block that hold the experts of a mixture, and how many of them there are."""
    found: dict[str, set[int]] = {}
    for path, child in block.named_modules():
        if isinstance(child, nn.ModuleList) and path.rpartition(".")[2] == "experts":
            found.setdefault(path.rpartition(".")[0], set()).add(len(child))
        elif _holds_experts(child):
            counts = {p.shape[0] for p in child.parameters(recurse=False) if p.ndim == 3}
            counts |= {n for key in ("num_experts", "moe_num_experts") if isinstance(n := getattr(child, key, 0), int)}
            if counts - {0}:
                found.setdefault(path.rpartition(".")[0], set()).update(counts - {0})
    return found


def _routes(block: nn.Module, path: str, outputs: int, mixtures: Mapping[str, set[int]]) -> bool:
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


# ---------------------------------------------------------------------------------------------------------
# Products

_MATMUL, _LINEAR = "matmul", "linear"
# How a function multiplies, where its operands stand and what they are called.
_PRODUCTS: dict[Any, tuple[str, int, tuple[str, str]]] = {
    functional.linear: (_LINEAR, 0, ("input", "weight")),
    torch.matmul: (_MATMUL, 0, ("input", "other")),
    Tensor.matmul: (_MATMUL, 0, ("self", "other")),
    Tensor.__matmul__: (_MATMUL, 0, ("self", "other")),
    torch.mm: (_MATMUL, 0, ("input", "mat2")),
    Tensor.mm: (_MATMUL, 0, ("self", "mat2")),
    torch.bmm: (_MATMUL, 0, ("input", "mat2")),
    Tensor.bmm: (_MATMUL, 0, ("self", "mat2")),
    torch.addmm: (_MATMUL, 1, ("mat1", "mat2")),
    Tensor.addmm: (_MATMUL, 1, ("mat1", "mat2")),
    torch.baddbmm: (_MATMUL, 1, ("batch1", "batch2")),
    Tensor.baddbmm: (_MATMUL, 1, ("batch1", "batch2")),
}
_GROUPED = {f for f in (GROUPED_PRODUCT, getattr(functional, "grouped_mm", None)) if f is not None}
_CASTS = {Tensor.to, Tensor.type, Tensor.float, Tensor.double, Tensor.half, Tensor.bfloat16, Tensor.type_as}


@dataclass(frozen=True)
class Product:
    """One matrix (O, I) of a product, and the inputs that it meets.

    source: the tensor that they come from, and `batched` whether other matrices take part in the product
    """

    source: Tensor
    batched: bool
    weight_OI: Tensor
    x: Callable[[], Tensor]  # (T, I)


def products(
    function: Any, args: Sequence[Any], kwargs: Mapping[str, Any], known: Callable[[Tensor], bool]
) -> Iterator[Product]:
    """The matrices that a call multiplies by, of those operands that are `known`."""
    if function is torch.einsum:
        yield from _einsum(args, known)
    elif function in _GROUPED:
        yield from _grouped(args, kwargs, known)
    elif function in _PRODUCTS:
        kind, at, names = _PRODUCTS[function]
        operands = [args[at + i] if at + i < len(args) else kwargs.get(names[i]) for i in (0, 1)]
        left, right = operands
        if not isinstance(left, Tensor) or not isinstance(right, Tensor) or left.ndim < 2 or right.ndim < 2:
            return
        if known(right):  # x W
            yield from _matrices(left, left, right if kind == _LINEAR else right.mT)
        elif known(left):  # W x, weight times columns of inputs (Mamba's dt_proj)
            yield from _matrices(right, right if kind == _LINEAR else right.mT, left)


def _matrices(source: Tensor, x: Tensor, weight: Tensor) -> Iterator[Product]:
    """Of a weight (…, O, I) that meets inputs (…, T, I), with what stands before broadcast."""
    width = weight.shape[-1]
    if weight.ndim == 2:
        yield Product(source, False, weight, lambda: x.reshape(-1, width))
        return
    before: tuple[int, ...] = torch.broadcast_shapes(x.shape[:-2], weight.shape[:-2])  # type: ignore[no-untyped-call]
    whole = x.expand(*before, *x.shape[-2:])
    weight = weight.view(*[1] * (len(before) - weight.ndim + 2), *weight.shape)
    sizes = weight.shape[:-2]

    def inputs(place: tuple[int, ...]) -> Tensor:
        where = tuple(slice(None) if n == 1 else i for i, n in zip(place, sizes, strict=True))
        return whole[where].reshape(-1, width)

    for place in product(*(range(n) for n in sizes)):
        yield Product(source, math.prod(sizes) > 1, weight[place], partial(inputs, place))


def _grouped(args: Sequence[Any], kwargs: Mapping[str, Any], known: Callable[[Tensor], bool]) -> Iterator[Product]:
    """x (T, I) in groups that end at `offs`, each with its own matrix (I, O)."""
    names = (("input", "mat_a", "self"), ("mat2", "mat_b"), ("offs",))
    x, weight, ends = (
        args[i] if i < len(args) else next((kwargs[name] for name in names[i] if name in kwargs), None)
        for i in range(3)
    )
    if x is None or weight is None or ends is None or weight.ndim != 3 or x.ndim != 2 or not known(weight):
        return
    start = 0
    for e, end in enumerate(ends.tolist()):
        yield Product(x, True, weight[e].mT, partial(x.__getitem__, slice(start, end)))
        start = end


def _einsum(args: Sequence[Any], known: Callable[[Tensor], bool]) -> Iterator[Product]:
    """Of two operands, read by their letters."""
    equation, operands = args[0], args[1:] if len(args) != 2 else args[1]
    if not isinstance(equation, str) or "->" not in equation or len(operands) != 2:
        return
    left, out = equation.replace(" ", "").split("->")
    unused = [letter for letter in string.ascii_letters if letter not in equation]
    letters = []
    for term, operand in zip(left.split(","), operands, strict=True):
        rest = operand.ndim - len(term.replace("...", "")) if "..." in term else 0
        letters.append(term.replace("...", "".join(unused[:rest][::-1])))
    longest = max((t.ndim - len(term.replace("...", "")) for t, term in zip(operands, left.split(","), strict=True)))
    out = out.replace("...", "".join(unused[: max(0, longest)][::-1]))
    for w, x in ((1, 0), (0, 1)):
        if not known(operands[w]):
            continue
        both = [c for c in letters[w] if c in letters[x]]
        batch, inputs = [c for c in both if c in out], [c for c in both if c not in out]
        outputs = [c for c in letters[w] if c not in both]
        tokens = [c for c in letters[x] if c not in both]
        if not inputs or not outputs or any(c not in out for c in (*outputs, *tokens)):
            return
        size = dict(zip(letters[w], operands[w].shape, strict=True))
        weight = operands[w].permute([letters[w].index(c) for c in (*batch, *outputs, *inputs)])
        shape = [size[c] for c in batch]
        width = math.prod(size[c] for c in inputs)
        with contextlib.suppress(RuntimeError):  # a weight whose dimensions do not fold is no matrix in memory
            weight = weight.view(*shape, -1, width)
            order = [letters[x].index(c) for c in (*batch, *tokens, *inputs)]
            yield from _matrices(operands[x], operands[x].permute(order).reshape(*shape, -1, width), weight)
        return


# ---------------------------------------------------------------------------------------------------------
# What the products tell

_learned: WeakKeyDictionary[nn.Module, dict[str, Lens | str]] = WeakKeyDictionary()


def learn(network: Any, blocks: Sequence[str], base: nn.Module, given: Mapping[str, Any]) -> None:
    """Find out how those parameters of the blocks are read that nothing else tells about: from a forward pass of the
    whole network on the meta device, which computes nothing: of `base`, a module that has it or most of it in it, with
    these arguments. Where that cannot be, what it did not reach stays unknown, and `_assumed` says what becomes of it.
    Of blocks with the same modules and shapes the first one runs."""
    _learn_shared(network, blocks)
    modules = [network.get_submodule(name) for name in blocks]
    unknown = [_unknown(block) for block in modules]
    if not any(unknown):
        return
    names = {id(parameter): name for name, parameter in base.named_parameters()}
    named = (*base.named_parameters(), *base.named_buffers())
    values = {name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for name, tensor in named}
    kinds = [_kind(block) for block in modules]
    places = {
        storage_of(values[names[id(getattr(module, key))]]): (module, key)
        for index, found in enumerate(unknown)
        if kinds.index(kinds[index]) == index
        for module, key in found
        if id(getattr(module, key)) in names
    }
    look = _Look(places)
    complete = False
    # A forward pass that needs numbers ends where it needs them.
    with contextlib.suppress(Exception), torch.no_grad(), _first_of_a_kind(modules, kinds), look:
        torch.func.functional_call(base, values, kwargs=map_tensors(given, lambda tensor: tensor.to("meta")))
        complete = True
    for module, key in places.values():
        seen = look.seen.get((module, key), set())
        if seen and (module, key) in look.cast:
            lens: Lens | str = OWN_DTYPE
        elif len(seen) == 1 and None not in seen:
            lens = next(lens for lens in seen if lens is not None)
        elif seen:
            lens = UNSEEN
        else:
            lens = _assumed(module, key, NO_PRODUCT if complete else UNSEEN)
        _learned.setdefault(module, {})[key] = lens
    for index, found in enumerate(unknown):
        for (module, key), (like, _) in zip(found, unknown[kinds.index(kinds[index])], strict=True):
            if like in _learned:
                _learned.setdefault(module, {}).setdefault(key, _learned[like][key])


def _unknown(block: nn.Module) -> list[tuple[nn.Module, str]]:
    """The parameters of a block of which only the product can tell how they are read."""
    return [
        (child, key)
        for path, child in block.named_modules()
        for key, parameter in child.named_parameters(recurse=False)
        if parameter.ndim > 1 and not (_apart(child, key) or _declared(child, key) or _routes(block, path, 0, {}))
    ]


def _kind(block: nn.Module) -> tuple[Any, ...]:
    """What blocks that are alike have in common."""
    modules = tuple((path, type(child)) for path, child in block.named_modules())
    return type(block), modules, tuple((name, tuple(p.shape)) for name, p in block.named_parameters())


@contextlib.contextmanager
def replaced(
    modules: Sequence[nn.Module], by: Callable[[int, Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """The modules' forward passes replaced by `by(number, original)`: the instances', so that what is read from their
    attributes stays."""
    before = [vars(module).get("forward") for module in modules]
    try:
        for number, module in enumerate(modules):
            module.forward = by(number, module.forward)  # type: ignore[method-assign]
        yield
    finally:
        for module, old in zip(modules, before, strict=True):
            if old is None:
                del module.forward
            else:
                module.forward = old  # type: ignore[method-assign]


def _first_of_a_kind(blocks: Sequence[nn.Module], kinds: Sequence[Any]) -> contextlib.AbstractContextManager[None]:
    """Blocks give what the first of their kind gave, which is right where only shapes count."""
    gave: dict[Any, Any] = {}

    def replacement(number: int, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if kinds[number] not in gave:
                gave[kinds[number]] = original(*args, **kwargs)
            return gave[kinds[number]]

        return forward

    return replaced(blocks, replacement)


def _learn_shared(network: Any, blocks: Sequence[str]) -> None:
    """Note the parameters that several blocks have in common. Pruning one for one block would change the others."""
    tied: Mapping[str, str] = getattr(network, "all_tied_weights_keys", {})
    owners: dict[Any, list[tuple[str, nn.Module, str]]] = {}
    for block in blocks:
        for path, child in network.get_submodule(block).named_modules():
            for key, parameter in child.named_parameters(recurse=False):
                full = ".".join(part for part in (block, path, key) if part)
                source = tied.get(full, full)  # on the meta device each name has a parameter of its own
                owners.setdefault(source if source in tied.values() else id(parameter), []).append((block, child, key))
    for several in owners.values():
        if len({block for block, _, _ in several}) > 1:
            for _, module, key in several:
                _learned.setdefault(module, {})[key] = SHARED


class _Look(TorchFunctionMode):
    """Notes how parameters on the meta device are multiplied by.

    Where the pass asks for a number that is not there, it gets one that lets it go on: of all experts the first is
    chosen, by one token.
    """

    def __init__(self, places: Mapping[int, tuple[nn.Module, str]]):
        super().__init__()
        self.places = dict(places)
        self.seen: dict[tuple[nn.Module, str], set[Lens | None]] = {}
        self.cast: dict[tuple[nn.Module, str], list[Tensor]] = {}  # kept: no other tensor gets the address of one

    def _known(self, tensor: Tensor) -> bool:
        return storage_of(tensor) in self.places

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in _CASTS and self._known(args[0]):
            place = self.places[storage_of(args[0])]
            out = function(*args, **kwargs)
            self.cast.setdefault(place, []).append(out)
            self.places[storage_of(out)] = place
            return out
        for found in products(function, args, kwargs, self._known):
            weight = found.weight_OI
            place = self.places[storage_of(weight)]
            self.seen.setdefault(place, set()).add(_read(weight, getattr(*place), not found.batched))
        answer = _ANSWERS.get(function)
        if answer is not None and args and isinstance(args[0], Tensor) and args[0].is_meta and len(args) == 1:
            return answer(*args, **kwargs)
        if function is Tensor.__getitem__:
            args = (args[0], _without_numbers(args[1]))
        return function(*args, **kwargs)


def _read(weight_OI: Tensor, parameter: Tensor, alone: bool) -> Lens | None:
    """The lens under which a parameter shows this matrix; None if none does."""
    rows, columns = weight_OI.shape
    if weight_OI.stride() == (columns, 1):
        lens = Lens(rows, columns, False, alone)
    elif weight_OI.stride() == (1, rows):
        lens = Lens(columns, rows, True, alone)
    else:
        return None
    size = rows * columns
    whole = parameter.is_contiguous() and weight_OI.storage_offset() % size == 0 and parameter.numel() % size == 0
    return lens if whole else None


def _first(mask: Tensor, as_tuple: bool = False) -> Any:
    """Where a mask is True, if that is one place."""
    if as_tuple:
        return tuple(mask.new_zeros(1, dtype=torch.long) for _ in range(mask.ndim))
    return mask.new_zeros((1, mask.ndim), dtype=torch.long)


def _without_numbers(index: Any) -> Any:
    """An index with 0 in the place of numbers that are not there."""
    if isinstance(index, tuple):
        return tuple(_without_numbers(item) for item in index)
    return 0 if isinstance(index, Tensor) and index.is_meta and index.ndim == 0 else index


_ANSWERS: dict[Any, Callable[..., Any]] = {
    Tensor.nonzero: _first,
    torch.nonzero: _first,
    torch.where: lambda mask: _first(mask, as_tuple=True),
    Tensor.__bool__: lambda _: False,
    Tensor.__int__: lambda _: 0,
    Tensor.__index__: lambda _: 0,
    Tensor.__float__: lambda _: 0.0,
    Tensor.item: lambda _: 0,
}
