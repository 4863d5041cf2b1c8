"""What can train, and what training makes of it: its nouns, and the registry of healing methods.

Third parties register their own: `@trains("mine")` in a file of theirs, then `--train path/to/mine.py:mine`.
"""

from __future__ import annotations

import importlib
import inspect
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..errors import InputError, NumericalError
from ..foreign import call
from ..layers import find_layers
from ..lenses import Lens, Stored
from ..model.network import Model
from ..pattern import pack, unpack
from ..registry import Method, checked, lookup
from .kinds import head_of, kinds_of, weight_of

DENSE = 0.001  # fewer zeros than this do not make a tensor a pruned one


@dataclass(frozen=True)
class Part:
    """One tensor of the network, which may train.

    name:   of the parameter, such as `model.layers.0.self_attn.q_proj.weight`
    kinds:  of linear, norm, bias, head, embedding, other; a head that is tied is an embedding too
    value:  what it is now, in the model's dtype
    mask:   True where a weight is kept; None where nothing was pruned. Of the shape of `value`
    lens:   how a layer's weight is read as matrices; None of what is no layer, and of a matrix (O, I)
    new:    a bias that was added to be trained
    places: the modules that hold it, with its name in each; none for a tensor that no module holds
    """

    name: str
    kinds: frozenset[str]
    value: Tensor
    mask: Tensor | None = None
    lens: Lens | None = None
    new: bool = False
    places: tuple[tuple[nn.Module, str], ...] = ()


class Change(nn.Module):
    """A tensor as a function of what it was and of float32 parameters that train: `forward(base) -> tensor`.

    A subclass has these parameters and `make`. What that returns equals `base` before the first step, and has `base`'s
    dtype and shape. Where the class says `apart = True` the parameters are saved beside the model, in an adapter, and
    not merged into it.

    While `keep` is set the tensor is made once a step and not once a micro-batch; whoever sets it calls `forget` after
    each step. The graph that makes it is not held in memory: the backward pass makes it again.

    Args:
        mask: True where a weight is kept, of the tensor's shape; it is `self.mask`.
    """

    apart = False
    keep = False
    moved = False  # is the mask another one than at first, so that what was pruned since is not zero in `base`?

    def __init__(self, mask: Tensor | None = None) -> None:
        super().__init__()
        self._made: tuple[bool, Tensor] | None = None
        self._shape: torch.Size | None = None  # of a mask that is held as bits
        self.register_buffer("_mask", mask, persistent=False)

    @property
    def mask(self) -> Tensor | None:
        """True where a weight is kept; None where nothing was pruned."""
        held: Tensor | None = self._buffers["_mask"]
        if held is None or self._shape is None:
            return held
        return unpack(held, (self._shape[:-1].numel(), self._shape[-1])).view(self._shape)

    def pack_mask(self) -> None:
        """Hold the mask as bits and unpack them each time: an eighth of the memory."""
        mask = self.mask
        if mask is not None and self._shape is None:
            self._shape = mask.shape
            self._buffers["_mask"] = pack(mask)

    def hold(self, mask: Tensor) -> Tensor:
        """Hold another mask from now on: zeros come to stand where it is False. Returns where it is new, True or False
        of every weight. Raises InputError for a change that is kept apart, which holds no zeros."""
        if self.apart:
            raise InputError("a change that is kept apart from the model holds no mask: train another way.")
        before, packed = self.mask, self._shape is not None
        self._shape, self.moved = None, True
        self._buffers["_mask"] = mask
        if packed:
            self.pack_mask()
        self.forget()
        return ~mask if before is None else before.to(mask.device) != mask

    def made(self, base: Tensor) -> Tensor:
        """`make`, its zeros where the mask says so."""
        made, mask = self.make(base), self.mask
        return made * mask if self.moved and mask is not None else made

    def make(self, base: Tensor) -> Tensor:
        """The tensor, made of what it was and of the parameters."""
        raise NotImplementedError

    def forget(self) -> None:
        """The parameters have changed."""
        self._made = None

    def forward(self, base: Tensor) -> Tensor:
        result: Tensor = _Once.apply(self, base, *self.parameters())  # type: ignore[no-untyped-call]
        return result


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, change: Change, base: Tensor, *parameters: Tensor) -> Tensor:
        ctx.change = change
        ctx.save_for_backward(base)
        if change._made is not None and change._made[0] == change.training:
            return change._made[1].detach()
        with torch.autocast(base.device.type, enabled=False):  # backward and merging know none
            made = change.made(base.detach())
        if change.keep:
            change._made = (change.training, made)
        return made.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (base,) = ctx.saved_tensors
        change: Change = ctx.change
        with torch.enable_grad(), torch.autocast(base.device.type, enabled=False):
            made = change.made(base.detach())
            pulled = torch.autograd.grad(made, list(change.parameters()), grads[0])
        return None, None, *pulled


class Master(Change):
    """The tensor itself, kept in float32, so that small steps are not lost to rounding: W = round(master * M)."""

    def __init__(self, part: Part):
        super().__init__(part.mask)
        self.master = nn.Parameter(part.value.detach().float().clone())

    def make(self, base: Tensor) -> Tensor:
        mask = self.mask
        return (self.master if mask is None else self.master * mask).to(base.dtype)


class Factors(Change):
    """What is made of a product B A that has the shape of the matrices in a tensor, with B in `left` and A in `right`,
    both zero at first. A mixture's experts (E, O, I) have a pair each, as have the groups of a convolution. Of a weight
    that is stored as (I, O) the roles are swapped (`transposed`)."""

    def __init__(self, part: Part, rank: int, mask: Tensor | None = None):
        super().__init__(mask)
        # What lies in memory as matrices is multiplied there.
        self.lens = None if isinstance(part.lens, Stored) else part.lens
        self.transposed = isinstance(part.lens, Stored) and part.lens.transposed
        self.whole = part.value.shape
        *parts, rows, columns = self.whole if self.lens is None else self.lens.shape(part.value)
        rank = min(rank, rows, columns)
        self.left = nn.Parameter(torch.zeros(*parts, rows, rank, device=part.value.device))
        self.right = nn.Parameter(torch.zeros(*parts, rank, columns, device=part.value.device))

    def product(self) -> Tensor:
        """B A, of the tensor's shape."""
        made = self.left @ self.right
        return made if self.lens is None else self.lens.tensor(made, self.whole)


class LowRank(Factors):
    """W + c B A with A (r, I) drawn uniformly from +-1/sqrt(I) and B (O, r) zero; c = alpha / r."""

    def __init__(self, part: Part, rank: int, alpha: float | None):
        super().__init__(part, rank, part.mask)
        drawn, inputs = (self.left, self.left.shape[-2]) if self.transposed else (self.right, self.right.shape[-1])
        drawn.data.uniform_(-(inputs**-0.5), inputs**-0.5)
        rank = self.left.shape[-1]
        self.scale = (2 * rank if alpha is None else alpha) / rank

    def delta(self) -> Tensor:
        return self.scale * self.product()

    def masked(self) -> Tensor:
        """The change where weights are kept."""
        delta, mask = self.delta(), self.mask
        return delta if mask is None else delta * mask

    def make(self, base: Tensor) -> Tensor:
        return (base.float() + self.delta()).to(base.dtype)


# ---------------------------------------------------------------------------------------------------------
# The registry

groups: dict[str, Method] = {}


def trains(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make a function a healing method: a decorator.

    The function is called with every tensor of the network, a `Part`, and returns what training makes of it, a
    `Change`, or None where the method leaves it alone. Its keyword arguments are the method's options, with their types
    and defaults; one of them is `rate`, the learning rate.

    Args:
        name: what users call it.
    """

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        first = next(iter(inspect.signature(function).parameters))
        if typing.get_type_hints(function).get(first) is not Part:
            raise TypeError(f"the first argument of healing method '{name}' must be annotated as Part")
        method = Method(name, frozenset(), function, per_layer=False)
        if "rate" not in method.options:
            raise TypeError(f"healing method '{name}' has no option `rate`, its learning rate")
        groups[name] = method
        return function

    return add


@dataclass(frozen=True)
class Group:
    """A healing method ready to use, with its options."""

    name: str
    change: Callable[[Part], Change | None]
    rate: float


def make_group(name: str, options: Mapping[str, Any] | None = None) -> Group:
    """Raises InputError for an unknown name, an unknown option or a wrong value."""
    importlib.import_module(f"{__package__.partition('.')[0]}.heal")  # where the built-in ones register themselves
    method = lookup("healing method", groups, name)
    chosen = checked("healing method", method, options or {})
    rate = chosen.get("rate", method.options["rate"].default)
    if not 0 < rate < 1:
        raise InputError(f"{method.name}.rate={rate:g}: a learning rate lies between 0 and 1, such as 1e-4.")

    def change(part: Part) -> Change | None:
        where = f"healing method '{name}' at '{part.name}'"
        made: Change | None = call(method, where, (Change, type(None)), part, chosen)
        return made

    return Group(method.name, change, rate)


# ---------------------------------------------------------------------------------------------------------
# Parts of a network


def parts_of(
    model: Model, masks: Mapping[str, Tensor], new: Iterable[str] = (), only: Collection[str] | None = None
) -> list[Part]:
    """All parameters of a network whose weights are loaded, or `only` those of these names. `masks` are by layer,
    (O, I); `new` names biases that were added."""
    network, added = model.network, set(new)
    tensors = {name: tensor for name, tensor in network.named_parameters() if only is None or name in only}
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in network.modules():
        for key, parameter in module.named_parameters(recurse=False):
            places.setdefault(id(parameter), []).append((module, key))
    found: dict[int, tuple[Tensor | None, Lens | None]] = {}
    within = {model.block_of(name) for name in tensors}
    for block in (name for name in model.blocks if name in within):
        for slot in find_layers(model.module(block), block):
            parameter = getattr(slot.module, slot.parameter)
            mask, whole = masks.get(slot.name), found.get(id(parameter), (None, None))[0]
            if mask is not None:
                whole = torch.ones(parameter.shape, dtype=torch.bool) if whole is None else whole
                slot.write(mask, whole)
            found[id(parameter)] = (whole, slot.lens)
    head, embedding = head_of(model), weight_of(network, "get_input_embeddings")
    parts = []
    for name, parameter in tensors.items():
        mask, lens = found.get(id(parameter), (None, None))
        kinds = {"linear"} if id(parameter) in found else set(kinds_of(name, tensors))
        if parameter is head:
            kinds = {"head"} if mask is None else {"head", "linear"}
        if any(isinstance(module, nn.Embedding) for module, _ in places[id(parameter)]) or parameter is embedding:
            kinds = (kinds - {"other"}) | {"embedding"}
        mask = None if mask is None else mask.to(parameter.device)
        here = tuple(places[id(parameter)])
        parts.append(Part(name, frozenset(kinds), parameter.data, mask, lens, name in added, here))
    return parts


@dataclass(frozen=True)
class Chosen:
    """A part, the change that trains it, and the group that the change comes from."""

    part: Part
    change: Change
    group: Group


def choose(parts: Iterable[Part], wanted: Sequence[Group]) -> list[Chosen]:
    """What trains: for each part the change of the first group that wants it. Raises InputError for a group that
    finds nothing to train."""
    out = list(pick(parts, wanted))
    check_idle(out, wanted)
    return out


def pick(parts: Iterable[Part], wanted: Sequence[Group]) -> Iterator[Chosen]:
    """For each part the change of the first group that wants it."""
    for part in parts:
        for group in wanted:
            change = group.change(part)
            if change is not None:
                yield Chosen(part, change, group)
                break


def check_idle(chosen: Iterable[Chosen], wanted: Iterable[Group]) -> None:
    """Raises InputError for a group that finds nothing to train."""
    for name in sorted({group.name for group in wanted} - {item.group.name for item in chosen}):
        raise InputError(
            f"healing method '{name}' finds nothing to train: the model has no such tensors, or another method that"
            " comes before it trains them all."
        )


def trained(chosen: Iterable[Chosen]) -> dict[str, Tensor]:
    """What trains, {part.parameter of its change: its values}, to read and to write."""
    return {
        f"{item.part.name}.{key}": parameter.data
        for item in chosen
        for key, parameter in item.change.named_parameters()
    }


def attach(chosen: Iterable[Chosen]) -> None:
    """Let the modules use the changed tensors."""
    for item in chosen:
        for module, key in item.part.places:
            getattr(module, key).requires_grad_(False)
            parametrize.register_parametrization(module, key, item.change)


def detach(chosen: Iterable[Chosen], *, merge: bool = True) -> dict[str, Tensor]:
    """Take the changes out of the modules again and, with `merge`, write what they make into the parameters;
    {parameter: its value}. Raises NumericalError for a value that is not finite."""
    values = {}
    for item in chosen:
        change = item.change.eval()
        change.forget()
        first, key = item.part.places[0]
        original = first.parametrizations[key].original  # type: ignore[index, union-attr]
        if merge and not change.apart:
            with torch.no_grad():
                value = change(original)
            if not torch.isfinite(value).all():
                raise NumericalError(f"'{item.part.name}' got NaN or infinite values while it was healed.")
            values[item.part.name] = value
        for module, name in item.part.places:
            parametrize.remove_parametrizations(module, name, leave_parametrized=False)
            module._parameters[name] = original  # tied again
        if item.part.name in values:
            original.data.copy_(values[item.part.name])
    return values
