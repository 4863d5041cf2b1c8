"""The blocks of any network, found by identity.

The network is run once on its task's example. Modules form a chain where the tensor that enters one **is** the one that
its predecessor put out, and nothing else that is made inside a block is used outside it: a mask or a table from before
the chain may reach all blocks, an output that each block hands to the next travels beside the hidden state (calls.py),
but where the head or a later block looks at what an earlier one made, the chain ends. A module is expanded into its
children where these form a chain from its input to its output. The chain that holds most is the network's stack; what
lies outside is stem and head. Chains before and after it, as those of an encoder and its decoder, are further stacks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..compat import uncached, version_of
from ..errors import ModelError, first_line
from ..learn import answered, replaced
from ..samples import Batch
from ..trees import first, tensors

if TYPE_CHECKING:
    from .task import Task

Argument = int | str  # of a block: where it stands after the hidden state, or its name
Stacks = tuple[tuple[str, ...], ...]

WHOLE: Stacks = (("",),)  # the network is one block: itself
FURTHER = 0.05  # of them: what a stack beside the largest holds at least


@dataclass(frozen=True)
class Interface:
    """What blocks take and give, the same for all calls.

    outputs:    {(block, shape of its hidden state): what it puts out, on the meta device}; None for a shape that stays
                the same. Of blocks that are alike, the first one's; in place of the block, its stack and class where it
                puts out more than the hidden state
    takes:      of each stack, arguments that are an output of the block before, {argument: number of the output}
    batch:      the dimension of the hidden state that samples are stacked along
    stateful:   does anything but the hidden state travel from block to block?
    alike:      of each block, the first one that is like it
    overwrites: blocks that work in place, maybe on their input
    """

    outputs: dict[tuple[int | tuple[int, type], torch.Size | None], Any]
    takes: Mapping[int, dict[Argument, int]]
    batch: int
    stateful: bool
    alike: tuple[int, ...]
    overwrites: frozenset[int]


def alike(network: nn.Module, blocks: Sequence[str]) -> tuple[int, ...]:
    """Of each block the first one that is the same but for the numbers in its weights."""
    modules = [network.get_submodule(name) for name in blocks]
    kinds = [(type(m), repr(m), tuple((n, tuple(p.shape)) for n, p in m.named_parameters())) for m in modules]
    return tuple(kinds.index(kind) for kind in kinds)


def overwrites(network: nn.Module, blocks: Sequence[str]) -> frozenset[int]:
    """The blocks with a module that says that it works in place."""
    modules = [network.get_submodule(name).modules() for name in blocks]
    return frozenset(i for i, inner in enumerate(modules) if any(getattr(m, "inplace", False) is True for m in inner))


def inside(name: str, block: str) -> bool:
    """Does a parameter, or a module, belong to a block?"""
    return not block or name.startswith(block + ".")


def find_stacks(network: nn.Module, task: Task) -> Stacks:
    """Names of the network's blocks in the order in which they run, a tuple a stack. Those of a language model are its
    list of decoder blocks. `WHOLE` where a network is no chain, or cannot be run without its weights to see, or its
    task has no example. Raises ModelError where a language model has no blocks, or where the example does not run."""
    if (known := task.stacks(network)) is not None:
        return known
    if (batch := _example(network, task)) is None:
        return WHOLE
    empty = any(parameter.is_meta for parameter in network.parameters())
    try:
        try:
            return _chosen(network, _traced(network, task, batch), task.in_blocks)
        except Exception:
            if not empty:
                raise
            return _chosen(network, _traced(network, task, batch, zeros=True), task.in_blocks)  # it asks for numbers
    except Exception as error:
        if empty:
            return WHOLE
        raise ModelError(
            f"{type(network).__name__} does not run on the example of its task, '{task.name}': {first_line(error)}"
        ) from error


# ---------------------------------------------------------------------------------------------------------
# What is seen


@dataclass(eq=False)
class _Seen:
    """One call of a module: what entered, what else it was given, what it put out; calls `number` + 1 to `end` - 1 are
    made in it."""

    name: str
    module: nn.Module
    number: int
    entering: Tensor | None
    others: list[Tensor]
    end: int = 0
    out: Tensor | None = None
    outs: list[Tensor] = field(default_factory=list)
    idle: bool = False  # it hands on what entered, as it is

    @property
    def bit(self) -> int:
        return 1 << self.number


class _Trace(TorchFunctionMode):
    """Notes each call of a module, and each use of a tensor outside the calls in which it was made.

    leaks: (tensor, the calls that it was made in and used outside of, the calls that it was used in), calls as bits
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[_Seen] = []
        self.leaks: list[tuple[Tensor, int, int]] = []
        self._here = 0
        self._made: dict[int, tuple[int, Tensor]] = {}  # with the tensor, so that no id is used twice

    def use(self, tensor: Tensor) -> None:
        made, _ = self._made.get(id(tensor), (0, tensor))
        if left := made & ~self._here:
            self.leaks.append((tensor, left, self._here))

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = tensors((args, kwargs or {}))
        versions = [version_of(tensor) for tensor in given]
        result = answered(function, args, kwargs or {})
        made = tensors(result)
        changed = [t for t, old in zip(given, versions, strict=True) if version_of(t) != old]
        if made or changed or function in _READS:
            for tensor in given:
                self.use(tensor)
        for tensor in [*changed, *(t for t in made if id(t) not in self._made and not any(t is g for g in given))]:
            self._made[id(tensor)] = self._here, tensor
        return result

    def watched(self, name: str, module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            given = tensors((args, kwargs))
            entering = args[0] if args and isinstance(args[0], Tensor) else None if args else next(iter(given), None)
            seen = _Seen(name, module, len(self.calls), entering, [t for t in given if t is not entering])
            self.calls.append(seen)
            before, self._here = self._here, self._here | seen.bit
            version = None if entering is None else version_of(entering)
            try:
                result = forward(*args, **kwargs)
            finally:
                self._here = before
            seen.end, seen.outs, seen.out = len(self.calls), tensors(result), first(result)
            seen.idle = seen.out is entering and entering is not None and version_of(entering) == version
            return result

        return call


_READS = {Tensor.item, Tensor.tolist, Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__, torch.equal}


class _Run(nn.Module):
    """A network's run by its task as a module, so that it can be run with other tensors for its weights."""

    def __init__(self, network: nn.Module, task: Task):
        super().__init__()
        self.network = network
        self.task = task

    def forward(self, batch: Batch) -> Any:
        return self.task.run(self.network, batch)


def whole_run(network: Any, task: Task) -> tuple[nn.Module, dict[str, Any]]:
    """A module that runs the network, without the head of a language model, and its arguments."""
    if task.language:
        return network.base_model, {"input_ids": torch.zeros((2, 16), dtype=torch.long), "use_cache": False}
    return _Run(network, task), {"batch": _example(network, task) or {}}


def _example(network: nn.Module, task: Task) -> Batch | None:
    try:
        return task.example(network)
    except NotImplementedError:  # a task need not have one
        return None


def _traced(network: nn.Module, task: Task, batch: Batch, *, zeros: bool = False) -> _Trace:
    """The network's calls on a batch: with its weights where all are in memory, else on the meta device, or with zeros
    that take no memory."""
    named = dict(network.named_modules())
    trace = _Trace()

    def watched(number: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        return trace.watched([*named][number], [*named.values()][number], forward)

    places = {parameter.device for parameter in network.parameters()}
    with torch.no_grad(), uncached(), replaced([*named.values()], watched), trace:
        if torch.device("meta") in places:
            out = _without_weights(network, task, batch, zeros=zeros)
        else:
            out = task.run(network, {key: tensor.to(next(iter(places), "cpu")) for key, tensor in batch.items()})
    for tensor in tensors(out):
        trace.use(tensor)
    return trace


def _without_weights(network: nn.Module, task: Task, batch: Batch, *, zeros: bool = False) -> Any:
    """What the network makes of a batch on the meta device, where nothing is computed but shapes; or with `zeros` that
    take no memory, where it asks for numbers on its way."""
    run, where = _Run(network, task), torch.device("cpu" if zeros else "meta")
    named_tensors = (*run.named_parameters(), *run.named_buffers())
    values = {name: torch.zeros((), dtype=t.dtype, device=where).expand(t.shape) for name, t in named_tensors}
    if zeros:  # what is made when a network is built may be there: positions, say
        values |= {name: tensor for name, tensor in run.named_buffers() if not tensor.is_meta}
    return torch.func.functional_call(run, values, ({key: tensor.to(where) for key, tensor in batch.items()},))


def refused(network: nn.Module, task: Task, batch: Batch) -> str | None:
    """Why the network does not take a batch of these shapes, as it says itself; None where it does. One that asks for
    numbers on its way refuses every batch."""
    try:
        with torch.no_grad(), uncached():
            _without_weights(network, task, batch)
    except Exception as error:
        return first_line(error)
    return None


# ---------------------------------------------------------------------------------------------------------
# What is made of it


def _chosen(network: nn.Module, trace: _Trace, least: float) -> Stacks:
    """The chain that holds most beside its largest block, and chains before and after it; none if all of them hold less
    than this share."""
    tied = _tied(network)
    twice = {key for key, count in Counter(id(seen.module) for seen in trace.calls).items() if count > 1}
    found = [
        _trimmed(piece)
        for outer in trace.calls
        for run in _runs(_within(outer, trace), twice)
        for chain in (run, _finer(run, trace, twice))
        for piece in _pieces(chain, trace, tied)
    ]
    found = [chain for chain in found if sum(_weights(seen.module) > 0 for seen in chain) > 1]
    found.sort(key=_worth, reverse=True)
    total = _weights(network)
    stacks: list[list[_Seen]] = []
    for chain in found:
        apart = all(chain[-1].end <= o[0].number or o[-1].end <= chain[0].number for o in stacks)
        if apart and (not stacks or sum(_weights(seen.module) for seen in chain) >= FURTHER * total):
            stacks.append(chain)
    if sum(_weights(seen.module) for chain in stacks for seen in chain) < least * total or not stacks:
        return WHOLE
    stacks.sort(key=lambda chain: chain[0].number)
    return tuple(tuple(seen.name for seen in chain) for chain in stacks)


def _weights(module: nn.Module) -> int:
    """How many weights are in a module's matrices, embeddings left out, and what is said to be tied to them."""
    rows = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    said: Mapping[str, str] = getattr(module, "all_tied_weights_keys", {})
    named = dict(module.named_parameters())  # where they are not loaded, tied ones are two
    kept = (p for name, p in named.items() if id(named.get(said.get(name, name), p)) not in rows)
    return sum(p.numel() for p in kept if p.ndim > 1 and id(p) not in rows)


def _worth(chain: Sequence[_Seen]) -> tuple[int, int]:
    weights = [_weights(seen.module) for seen in chain]
    return sum(weights) - max(weights), sum(map(bool, weights))


def _tied(network: nn.Module) -> dict[int, set[str]]:
    """The names of parameters that have several, by the parameter."""
    said: Mapping[str, str] = getattr(network, "all_tied_weights_keys", {})
    names: dict[Any, set[str]] = {}
    parameters = dict(network.named_parameters(remove_duplicate=False))
    for name, parameter in parameters.items():
        names.setdefault(id(parameters.get(said.get(name, name), parameter)), set()).add(name)
    return {key: several for key, several in names.items() if len(several) > 1}


def _within(outer: _Seen, trace: _Trace) -> Iterator[_Seen]:
    """The calls that a call makes itself."""
    number = outer.number + 1
    while number < outer.end:
        yield trace.calls[number]
        number = trace.calls[number].end


def _runs(calls: Iterator[_Seen], twice: set[int]) -> Iterator[list[_Seen]]:
    """Calls each of which is entered by what the one before put out. A module that is called twice is in none."""
    run: list[_Seen] = []
    for seen in calls:
        if id(seen.module) in twice:
            if seen.idle:
                continue  # dropout, say
            yield run
            run = []
        elif run and seen.entering is not None and seen.entering is run[-1].out:
            run.append(seen)
        else:
            yield run
            run = [seen]
    yield run


def _refined(run: list[_Seen], trace: _Trace, twice: set[int]) -> list[_Seen]:
    """A chain with its calls as the chains of those that they make, unless more than one thing passes between these."""
    chain = _finer(run, trace, twice)
    return run if _leak(chain, trace) else chain


def _finer(run: list[_Seen], trace: _Trace, twice: set[int]) -> list[_Seen]:
    """A chain with each call as the chain of those that it makes. Where more than the hidden state travels along it,
    it stays as it is: a call and one in another hand that on by other names."""
    travels = any(one is other for a, b in pairwise(run) for one in a.outs if one is not a.out for other in b.others)
    return run if travels else [one for seen in run for one in _expanded(seen, trace, twice)]


def _expanded(seen: _Seen, trace: _Trace, twice: set[int]) -> list[_Seen]:
    """A call as the chain of those that it makes, if these are one from its input to its output; else itself."""
    runs = [run for run in _runs(_within(seen, trace), twice) if run]
    if len(runs) != 1 or runs[0][0].entering is not seen.entering or runs[0][-1].out is not seen.out:
        return [seen]
    chain = _refined(runs[0], trace, twice)
    return [seen] if _leak(chain, trace) else chain


def _leak(chain: Sequence[_Seen], trace: _Trace) -> tuple[int, bool] | None:
    """The first block of a chain of which more is used outside than what the next one takes: its place, and whether
    that is its output."""
    last = len(chain) - 1
    places = {seen.number: place for place, seen in enumerate(chain)}
    whole = sum(seen.bit for seen in chain)
    worst: list[tuple[int, bool]] = []
    for tensor, left, used in trace.leaks:
        if not left & whole:
            continue
        made = next(places[n] for n in places if left >> n & 1)
        at = next((places[n] for n in places if used >> n & 1), None)
        if tensor is chain[last].out or (at is not None and chain[at].entering is tensor):
            continue
        travels = at is not None and any(tensor is t for t in chain[at - 1].outs)
        if travels and at is not None and any(tensor is t for t in chain[at].others):
            continue
        worst.append((made, tensor is chain[made].out))
    return min(worst, default=None)


def _pieces(chain: list[_Seen], trace: _Trace, tied: Mapping[int, set[str]]) -> Iterator[list[_Seen]]:
    """A chain in pieces of which nothing leaks, and in which no weight is used elsewhere too."""
    shared = [place for place, seen in enumerate(chain) if _lends(seen, tied)]
    found = (shared[0], False) if shared else _leak(chain, trace)
    if found is None:
        if chain:
            yield chain
        return
    place, is_output = found
    yield from _pieces(chain[: place + is_output], trace, tied)
    yield from _pieces(chain[place + 1 :], trace, tied)


def _lends(seen: _Seen, tied: Mapping[int, set[str]]) -> bool:
    """Has a block a weight that belongs to something else as well?"""
    return any(
        any(inside(name, seen.name) for name in names) and not all(inside(name, seen.name) for name in names)
        for names in tied.values()
    )


def _trimmed(chain: list[_Seen]) -> list[_Seen]:
    """A chain without what has no matrices at its ends."""
    full = [place for place, seen in enumerate(chain) if _weights(seen.module)]
    return chain[full[0] : full[-1] + 1] if full else []
