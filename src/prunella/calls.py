"""Calling the blocks of a network as the network does.

How a block is called is not hard-coded. `Calls` runs the network once for each batch of windows with a stand-in for
every block, which keeps the arguments (masks, rotary embeddings, …) and hands its input on unchanged; after that a
block can be run on its own. Beside the hidden state other things may travel from block to block: a second output that
the next block takes, a dictionary that blocks write into. They are kept beside the hidden state, so that a block is a
function of what comes in. Arguments that are the same for two batches are kept once.

Whether all this holds is not assumed: `examine` compares replayed blocks with what they give inside the network's own
forward pass before anything is made of them.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Collection, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from .errors import ModelError, PrunellaError, first_line
from .learn import replaced
from .model.network import Argument, Interface, Model

Key = tuple[str, int]  # of something that travels beside the hidden state

TOLERANCE = 0.02  # of what a block adds to its input: how far its replay may be from the original
CAUSAL = 16  # tokens on which `examine` looks whether a block sees what comes after


@dataclass(frozen=True)
class _Place:
    """Stands among the arguments where something that travels is put in."""

    key: Key


@dataclass(frozen=True)
class _Kept:
    """Stands among the arguments for a tensor that waits somewhere else than where it is used."""

    tensor: Tensor


@dataclass(frozen=True)
class Call:
    """The arguments of one block beside its input.

    by_name: the name that the hidden state is passed by, or None where it is the first argument
    start:   of what travels beside the hidden state, what is there before the first block
    takes:   outputs that travel on
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    by_name: str | None
    start: dict[Key, Any] = field(default_factory=dict)
    takes: Collection[int] = ()

    def arguments(
        self, hidden: Tensor, beside: Mapping[Key, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any], dict[Key, Any]]:
        """Arguments and keyword arguments for the block, and the containers among them, which are copies: a block may
        write into them."""
        held: dict[Key, Any] = {}

        def back(value: Any) -> Any:
            return value.to(hidden.device, non_blocking=True) if isinstance(value, Tensor) else value

        def fill(value: Any) -> Any:
            if isinstance(value, _Kept):
                return back(value.tensor)
            if not isinstance(value, _Place):
                return value
            if value.key not in held:
                now = map_tree(beside[value.key], back) if value.key in beside else self.start[value.key]
                held[value.key] = copy.copy(now) if _is_container(now) else now
            return held[value.key]

        args = tuple(_map(value, fill) for value in self.args)
        kwargs = {name: _map(value, fill) for name, value in self.kwargs.items()}
        if self.by_name is None:
            args = (hidden, *args)
        else:
            kwargs[self.by_name] = hidden
        return args, kwargs, held

    def run(self, block: nn.Module, hidden: Tensor, beside: Mapping[Key, Any]) -> tuple[Tensor, dict[Key, Any]]:
        """The block's output, and what travels on beside it."""
        args, kwargs, held = self.arguments(hidden, beside)
        out = block(*args, **kwargs)
        after = dict(beside)
        for key, value in held.items():
            if key[0] == "container" and (key in beside or not _same_items(value, self.start[key])):
                after[key] = value
        for number in self.takes:
            after["output", number] = out[number]
        return first(out), after


def first(out: Any) -> Tensor:
    """The hidden state among a block's outputs."""
    result: Tensor = out if isinstance(out, Tensor) else out[0]
    return result


def _map(value: Any, leaf: Callable[[Any], Any]) -> Any:
    """A tree of tuples with `leaf` applied to what is no tuple."""
    if not isinstance(value, tuple):
        return leaf(value)
    return _like(value, [_map(item, leaf) for item in value])


def _like(old: Any, items: Sequence[Any]) -> Any:
    """A tuple or a container of the same type with these items, in order; the old one where they are its own."""
    before = _items(old)
    if all(new is item for new, (_, item) in zip(items, before, strict=True)):
        return old
    if isinstance(old, tuple):
        return type(old)(*items) if hasattr(old, "_fields") else tuple(items)
    found = copy.copy(old)
    for (key, _), new in zip(before, items, strict=True):
        found[key] = new
    return found


def map_tree(value: Any, leaf: Callable[[Any], Any]) -> Any:
    """A tree of tuples and containers with `leaf` applied to all else."""
    if not _is_container(value):
        return _map(value, lambda item: map_tree(item, leaf) if _is_container(item) else leaf(item))
    return _like(value, [map_tree(item, leaf) for _, item in _items(value)])


def _is_container(value: Any) -> bool:
    return isinstance(value, MutableMapping | list)


def _items(container: Any) -> list[tuple[Any, Any]]:
    """Keys and values, or places and items of a list or tuple."""
    return list(container.items() if isinstance(container, MutableMapping) else enumerate(container))


def _same_items(one: Any, other: Any) -> bool:
    a, b = _items(one), _items(other)
    return len(a) == len(b) and all(k == j and v is w for (k, v), (j, w) in zip(a, b, strict=True))


class _Shared:
    """Trees of arguments in which tensors that are equal to those of another tree are the same objects."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, int], tuple[Any, Any, Any]] = {}  # with the objects, so that no id is used twice
        self.apart: dict[int, Tensor] = {}  # the tensors that had no equal

    def __call__(self, new: Any, old: Any) -> Any:
        if new is old:
            return old
        key = id(new), id(old)
        if key not in self._known:
            self._known[key] = new, old, self._share(new, old)
        return self._known[key][2]

    def _share(self, new: Any, old: Any) -> Any:
        if isinstance(new, Tensor):
            alike = isinstance(old, Tensor) and (new.shape, new.dtype, new.device) == (old.shape, old.dtype, old.device)
            if alike and torch.equal(new, old):
                return old
            self.apart[id(new)] = new
            return new
        if type(new) is not type(old):
            return new
        if isinstance(new, tuple) or _is_container(new):
            ours, theirs = _items(new), _items(old)
            if [key for key, _ in ours] != [key for key, _ in theirs]:
                return new
            return _like(old, [self(a, b) for (_, a), (_, b) in zip(ours, theirs, strict=True)])
        if isinstance(new, int | float | str | torch.dtype | torch.device) and new == old:
            return old
        return new


class Calls:
    """Recordings of how the model calls its blocks, one for each batch, and what flows in and out.

    The model's parameters outside its blocks must be loaded while `embed`, `record_windows` and `logits` are used.
    `shelf(bytes)` says where arguments that differ from batch to batch wait until they are used, so many bytes for all
    `total` windows.
    """

    def __init__(
        self,
        model: Model,
        interface: Interface,
        shelf: Callable[[int], Callable[[Any], Any]] | None = None,
        total: int = 0,
    ):
        self.model = model
        self.interface = interface
        self.shelf = shelf
        self.total = total
        self._put: Callable[[Any], Any] | None = None
        self.batches: list[list[Call]] = []
        self.windows: list[list[Call]] = []
        self._firsts: dict[tuple[int, ...], list[Call]] = {}

    def embed(self, ids_BL: Tensor) -> Tensor:
        """The hidden state that enters the first block for the next batch, whose calls are recorded."""
        hidden, calls = self._record(ids_BL)
        self.batches.append(calls)
        return hidden

    def record_windows(self, windows_NL: Tensor) -> None:
        """Record how the blocks are called on each window alone."""
        if not self.windows:
            self.windows = [self._record(ids_L[None])[1] for ids_L in windows_NL]

    def _record(self, ids_BL: Tensor) -> tuple[Tensor, list[Call]]:
        stand_ins = _StandIns(self.model, self.interface)
        stand_ins.pass_through(ids_BL)
        hidden, calls = stand_ins.entering, _marked(stand_ins)
        known = self._firsts.setdefault(tuple(ids_BL.shape), calls)
        if known is not calls:
            shared = _Shared()
            calls = [
                Call(
                    shared(call.args, old.args),
                    shared(call.kwargs, old.kwargs),
                    call.by_name,
                    shared(call.start, old.start),
                    call.takes,
                )
                for call, old in zip(calls, known, strict=True)
            ]
            if shared.apart and self.shelf is not None:
                calls = self._put_away(calls, shared.apart, len(ids_BL))
        return hidden, calls

    def _put_away(self, calls: list[Call], apart: Mapping[int, Tensor], windows: int) -> list[Call]:
        """Calls with those of their tensors on the shelf that no other batch has."""
        if self._put is None:
            assert self.shelf is not None
            nbytes = sum(tensor.numel() * tensor.element_size() for tensor in apart.values())
            self._put = self.shelf(nbytes // windows * self.total)

        def away(value: Any) -> Any:
            if id(value) not in apart or (put := self._put(value)) is value:  # type: ignore[misc]
                return value
            return _Kept(put)

        return [
            replace(
                call,
                args=tuple(_map(value, away) for value in call.args),
                kwargs={name: _map(value, away) for name, value in call.kwargs.items()},
            )
            for call in calls
        ]

    def logits(self, ids_BL: Tensor, hidden: Tensor, **options: Any) -> Tensor:
        """What the model makes of the last block's output: its norm, its head and all, (B, L, vocabulary). It can be
        differentiated where the hidden state asks for that. `options` go to the network's forward pass."""
        with (
            torch.set_grad_enabled(hidden.requires_grad),
            _StandIns(self.model, self.interface, hidden=hidden).installed(),
        ):
            result = self.model.network(input_ids=ids_BL.to(self.model.device), use_cache=False, **options)
        logits: Tensor = result.logits
        return logits


class _StandIns:
    """What takes the place of the blocks' forward passes: it keeps the arguments and hands the input on.

    The instance's `forward` is replaced, so that what the model reads from a block's attributes (its attention type,
    say) stays. Blocks in `real` are run, their weights being loaded for that where `load` says so; what they gave is in
    `gave`.
    """

    def __init__(
        self,
        model: Model,
        interface: Interface,
        *,
        real: Collection[int] = (),
        load: bool = False,
        hidden: Tensor | None = None,
        mark: bool = False,
    ):
        self.model = model
        self.interface = interface
        self.real = real
        self.load = load
        self.replaced = hidden
        self.mark = mark  # copies of the hidden state and NaN in place of all other outputs, to see where they go
        self.raw: list[tuple[tuple[Any, ...], dict[str, Any], str | None]] = []
        self.marks: list[dict[int, Tensor]] = []
        self.gave: dict[int, Tensor] = {}
        self.entering: Tensor
        self._last: Tensor | None = None

    def pass_through(self, ids_BL: Tensor) -> None:
        """Run the network without its head. Raises ModelError if its blocks are no chain."""
        network = self.model.network
        try:
            with torch.no_grad(), self.installed():
                network.base_model(input_ids=ids_BL.to(self.model.device), use_cache=False)
        except (PrunellaError, NotImplementedError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise _not_one_by_one(network, first_line(error)) from error
        if len(self.raw) != len(self.model.blocks):
            raise _not_one_by_one(network, f"it has {len(self.model.blocks)} blocks but called {len(self.raw)}")

    def _forward(self, index: int, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        network = self.model.network
        by_name = None
        if args:
            hidden, args = args[0], args[1:]
        else:
            by_name = next((name for name, value in kwargs.items() if value is self._last), "hidden_states")
            hidden = kwargs.pop(by_name, None)
        if not isinstance(hidden, Tensor):
            raise _not_one_by_one(network, f"its block {index} is called without a hidden state")
        if index != len(self.raw):
            raise _not_one_by_one(network, f"it calls block {index} in place of block {len(self.raw)}")
        if self._last is None:
            self.entering = hidden
            if self.replaced is not None:
                hidden = self.replaced
        elif not _one(hidden, self._last):
            raise _not_one_by_one(network, f"it changes the hidden state between blocks {index - 1} and {index}")
        name = self.model.blocks[index]
        kind = type(self.model.module(name))

        def run() -> Any:
            named = {} if by_name is None else {by_name: hidden}
            return original(*(() if by_name else (hidden,)), *args, **kwargs, **named)

        if kind not in self.interface.outputs:
            with self.model.block(index):
                out = run()
            self.interface.outputs[kind] = () if isinstance(out, Tensor) else tuple(isinstance(o, Tensor) for o in out)
        outputs = self.interface.outputs[kind]
        self.raw.append((args, kwargs, by_name))
        if index in self.real:
            with self.model.block(index) if self.load else contextlib.nullcontext():
                out = run()
            self.gave[index] = self._last = first(out)
            return out
        self._last = hidden.clone() if self.mark else hidden  # other memory: a block that is passed by is noticed
        if not outputs:
            self.marks.append({})
            return self._last
        items: list[Any] = [self._last] + [None] * (len(outputs) - 1)
        if self.mark:
            self.marks.append({n: hidden.new_full((1,), torch.nan) for n, tensor in enumerate(outputs) if n and tensor})
            for number, nan in self.marks[-1].items():
                items[number] = nan
        for path, number in self.interface.takes.items():
            items[number] = _argument(args, kwargs, path)
        return tuple(items)

    def installed(self) -> contextlib.AbstractContextManager[None]:
        """The stand-ins in their places."""

        def replacement(index: int, original: Callable[..., Any]) -> Callable[..., Any]:
            return lambda *args, **kwargs: self._forward(index, original, *args, **kwargs)

        return replaced([self.model.module(name) for name in self.model.blocks], replacement)


def _one(one: Tensor, other: Tensor) -> bool:
    """Are these one tensor, maybe by two names?"""
    return one is other or (
        (one.data_ptr(), one.shape, one.stride(), one.dtype)
        == (other.data_ptr(), other.shape, other.stride(), other.dtype)
    )


def _not_one_by_one(network: nn.Module, reason: str) -> ModelError:
    return ModelError(f"the blocks of {type(network).__name__} cannot be run one by one: {reason}.")


def _argument(args: Sequence[Any], kwargs: Mapping[str, Any], path: Argument) -> Any:
    if isinstance(path, str):
        return kwargs.get(path)
    return args[path] if path < len(args) else None


def _marked(stand_ins: _StandIns) -> list[Call]:
    """Calls, with places where the arguments hold what travels from block to block."""
    takes = stand_ins.interface.takes
    numbers: dict[int, int] = {}
    start: dict[Key, Any] = {}
    if stand_ins.raw:
        args, kwargs, *_ = stand_ins.raw[0]
        start = {("output", number): _argument(args, kwargs, path) for path, number in takes.items()}

    def mark(value: Any) -> Any:
        if not _is_container(value):
            return value
        key = "container", numbers.setdefault(id(value), len(numbers))
        start.setdefault(key, value)
        return _Place(key)

    calls = []
    for args, kwargs, by_name in stand_ins.raw:
        marked = [_map(value, mark) for value in args]
        named = {name: _map(value, mark) for name, value in kwargs.items()}
        for path, number in takes.items():
            place = _Place(("output", number))
            if isinstance(path, str):
                named[path] = place
            elif path < len(marked):
                marked[path] = place
        calls.append(Call(tuple(marked), named, by_name, start, tuple(takes.values())))
    return calls


# ---------------------------------------------------------------------------------------------------------
# Does it hold?


def examine(model: Model, windows_NL: Tensor) -> Interface:
    """How the model's blocks are called, found out and tried on two different batches of two windows.

    The first, a middle and the last block are replayed and compared with what they give inside the model's own forward
    pass, in which all other blocks hand on what they get; where more than that state travels, all blocks are. What
    a block puts out for a token must not depend on later tokens. Raises ModelError, naming the architecture, where any
    of this does not hold. The model's parameters outside its blocks must be loaded.
    """
    network = model.network
    two = torch.cat([windows_NL[:2]] * 2)[:2]
    other = windows_NL[-2:] if len(windows_NL) > 3 else two.flip(1)
    marked = _StandIns(model, Interface({}, {}, 0, False), mark=True)
    marked.pass_through(two)
    takes = _taken(network, marked)
    interface = Interface(marked.interface.outputs, takes, _batch_dimension(model, marked, two), bool(takes))
    calls = Calls(model, interface)
    entering = [calls.embed(ids_BL) for ids_BL in (two, other)]
    last = len(model.blocks) - 1
    shared = any(key[0] == "container" and not _items(value) for key, value in calls.batches[0][0].start.items())
    if takes or shared:  # a block alone would miss what those before it leave
        for ids_BL, hidden, batch in zip((two, other), entering, calls.batches, strict=True):
            own = _StandIns(model, interface, real=range(last + 1), load=True)
            own.pass_through(ids_BL)
            beside: dict[Key, Any] = {}
            for index in range(last + 1):
                with model.block(index) as block:
                    hidden, beside = _compared(network, index, own, batch[index], block, hidden, beside)
        return replace(interface, stateful=True)
    for index in sorted({0, last // 2, last}):
        with model.block(index) as block:
            for ids_BL, hidden, batch in zip((two, other), entering, calls.batches, strict=True):
                own = _StandIns(model, interface, real={index})
                own.pass_through(ids_BL)
                _compared(network, index, own, batch[index], block, hidden, {})
            _check_causal(model, interface, index, two[:, :CAUSAL])
    return interface


def _compared(
    network: nn.Module,
    index: int,
    own: _StandIns,
    call: Call,
    block: nn.Module,
    hidden: Tensor,
    beside: Mapping[Key, Any],
) -> tuple[Tensor, dict[Key, Any]]:
    """Replay a block. Raises ModelError where it gives something else than inside the network."""
    before = hidden.clone()
    with torch.no_grad():
        replayed, after = call.run(block, hidden, beside)
    if not torch.equal(before, hidden) and before.isfinite().all():
        raise _not_one_by_one(network, f"block {index} overwrites what it is given")
    gave = own.gave[index]
    same = gave.shape == replayed.shape and gave.dtype == replayed.dtype
    if same and not torch.equal(gave, replayed) and gave.isfinite().all():
        same = _apart(gave, replayed) <= TOLERANCE * _apart(gave, before if before.shape == gave.shape else 0 * gave)
    if not same:
        raise _not_one_by_one(network, f"block {index} gives something else on its own than inside the model")
    return replayed, after


def _apart(one: Tensor, other: Tensor) -> float:
    return float((one.float() - other.float()).norm())


def _check_causal(model: Model, interface: Interface, index: int, ids_BL: Tensor) -> None:
    """Raises ModelError where what a loaded block makes of the first tokens depends on the last one."""
    changed = ids_BL.clone()
    changed[:, -1] = torch.where(ids_BL[:, -1] == ids_BL[:, 0], ids_BL[:, ids_BL.shape[1] // 2], ids_BL[:, 0])
    one, other = (_StandIns(model, interface, real={index}) for _ in range(2))
    one.pass_through(ids_BL)
    other.pass_through(changed)
    inputs = (one.entering != other.entering).nonzero()
    places = [
        (dimension, int(inputs[0, dimension]))
        for dimension, size in enumerate(one.entering.shape)
        if dimension != interface.batch and size > 1 and len(set(inputs[:, dimension].tolist())) == 1
    ]
    if len(places) != 1 or one.gave[index].shape != one.entering.shape:
        return  # the two tokens are one, or where tokens stand cannot be told
    dimension, place = places[0]

    def early(state: Tensor) -> Tensor:
        return state.narrow(dimension, 0, place)

    before, after = early(one.gave[index]), early(other.gave[index])
    share = (before != after).float().mean().item() if before.numel() else 0.0
    # Which tokens meet in an expert changes the rounding of some; attention to what comes later changes nearly all.
    if share > 0.25 and _apart(before, after) > 1e-3 * _apart(before, early(one.entering)):
        raise ModelError(
            f"{type(model.network).__name__} reads a text from both sides: what its block {index} makes of a token"
            " depends on the tokens that follow. Prunella prunes causal language models."
        )


def _taken(network: nn.Module, marked: _StandIns) -> dict[Argument, int]:
    """Which arguments are an output of the block before. Raises ModelError where such an output goes elsewhere."""
    takes: dict[Argument, int] = {}
    for index, (args, kwargs, _) in enumerate(marked.raw[1:], 1):
        marks = {id(mark): number for number, mark in marked.marks[index - 1].items()}
        arguments: list[tuple[Argument, Any]] = [*enumerate(args), *kwargs.items()]
        for path, value in arguments:
            if id(value) in marks:
                takes[path] = marks[id(value)]
            elif isinstance(value, Tensor) and value.is_floating_point() and value.isnan().any():
                raise _not_one_by_one(network, f"argument '{path}' of block {index} is made of an earlier block's")
    return takes


def _batch_dimension(model: Model, marked: _StandIns, two: Tensor) -> int:
    alone = _StandIns(model, marked.interface, mark=True)
    alone.pass_through(two[:1])
    sizes = zip(marked.entering.shape, alone.entering.shape, strict=True)
    apart = [dimension for dimension, (a, b) in enumerate(sizes) if a != b]
    if len(apart) != 1:
        raise _not_one_by_one(model.network, "its hidden state has no dimension of its own for the windows of a batch")
    return apart[0]
