"""How parameters are read that no lens knows: it is learned from the products that the network makes with them.

`learn` runs the network once without any memory, on torch's meta device, and notes along which side of each parameter
the inputs run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .compat import COMPOSED, composed, storage_of, uncached
from .layers import NO_PRODUCT, OWN_DTYPE, SHARED, UNSEEN, apart, assumed, routes
from .lenses import Experts, Lens, Linear, Multiplied, Stored, fitting
from .lenses.product import learned
from .products import products
from .trees import map_tensors

_CASTS = {Tensor.to, Tensor.type, Tensor.float, Tensor.double, Tensor.half, Tensor.bfloat16, Tensor.type_as}


def learn(network: Any, blocks: Sequence[str], base: nn.Module, given: Mapping[str, Any]) -> None:
    """Find out how parameters of the blocks are read of which no lens knows it, from a forward pass on the meta device,
    which computes nothing. Of blocks with the same modules and shapes only the first one runs. What the pass does not
    reach stays unknown; `assumed` says what becomes of it.

    Args:
        base: the module to run: it holds the network, or most of it.
        given: its arguments.
    """
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
    with contextlib.suppress(Exception), torch.no_grad(), uncached(), _first_of_a_kind(modules, kinds), look:
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
            lens = assumed(module, key, NO_PRODUCT if complete else UNSEEN)
        learned.setdefault(module, {})[key] = lens
    for index, found in enumerate(unknown):
        for (module, key), (like, _) in zip(found, unknown[kinds.index(kinds[index])], strict=True):
            if like in learned:
                learned.setdefault(module, {}).setdefault(key, learned[like][key])


def _unknown(block: nn.Module) -> list[tuple[nn.Module, str]]:
    """The parameters of a block of which only the product can tell how they are read."""
    return [
        (child, key)
        for path, child in block.named_modules()
        for key, parameter in child.named_parameters(recurse=False)
        if parameter.ndim > 1 and not (apart(child, key) or fitting(child, key) or routes(block, path, 0, {}))
    ]


def _kind(block: nn.Module) -> tuple[Any, ...]:
    """The same for blocks with the same modules and shapes."""
    modules = tuple((path, type(child)) for path, child in block.named_modules())
    return type(block), modules, tuple((name, tuple(p.shape)) for name, p in block.named_parameters())


@contextlib.contextmanager
def replaced(
    modules: Sequence[nn.Module], by: Callable[[int, Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """Replace the forward passes of modules by `by(number, original)`, in the instances, so that the class and its
    attributes stay."""
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
    """Let each block return what the first of its kind returned, which is right where only shapes count."""
    gave: dict[Any, Any] = {}

    def replacement(number: int, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if kinds[number] not in gave:
                gave[kinds[number]] = original(*args, **kwargs)
            return gave[kinds[number]]

        return forward

    return replaced(blocks, replacement)


def _learn_shared(network: Any, blocks: Sequence[str]) -> None:
    """Note the parameters that several blocks share: to prune one for one block would change the others."""
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
                learned.setdefault(module, {})[key] = SHARED


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
        if function in COMPOSED:
            return composed(self, function, args, kwargs)
        if function in _CASTS and self._known(args[0]):
            place = self.places[storage_of(args[0])]
            out = function(*args, **kwargs)
            self.cast.setdefault(place, []).append(out)
            self.places[storage_of(out)] = place
            return out
        for found in products(function, args, kwargs, self._known):
            weight = found.weight_OI
            place = self.places[storage_of(weight)]
            self.seen.setdefault(place, set()).add(_read(weight, *place, found.batched))
        return answered(function, args, kwargs)


def _read(weight_OI: Tensor, module: nn.Module, key: str, batched: bool) -> Lens | None:
    """The lens under which a parameter shows this matrix; None if none does."""
    parameter, (rows, columns) = getattr(module, key), weight_OI.shape
    if weight_OI.stride() == (columns, 1):
        transposed = False
    elif weight_OI.stride() == (1, rows):
        transposed, rows, columns = True, columns, rows
    else:
        return None
    size = rows * columns
    if not parameter.is_contiguous() or weight_OI.storage_offset() % size or parameter.numel() % size:
        return None
    kind: type[Stored] = Experts if parameter.ndim == 3 and not batched else Multiplied
    if isinstance(module, nn.Linear) and key == "weight" and not transposed and parameter.shape == (rows, columns):
        kind = Linear
    return kind(rows, columns, transposed)


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


def answered(function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """A call of torch; where it asks a tensor on the meta device for a number, one that lets the pass go on."""
    answer = _ANSWERS.get(function)
    if answer is not None and len(args) == 1 and isinstance(args[0], Tensor) and args[0].is_meta:
        return answer(*args, **kwargs)
    if function is Tensor.__getitem__:
        args = (args[0], _without_numbers(args[1]))
    return function(*args, **kwargs)
