"""What takes the place of a network's blocks while the rest of it runs: it keeps what they are called with, and hands
on what it gets, or what the real ones gave."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .errors import ModelError, PrunellaError, first_line
from .learn import replaced
from .model.cut import Argument, Interface
from .model.network import Model
from .samples import Batch
from .trees import first, map_tensors, map_tree, rebuilt
from .trees import items as items_of
from .watch import Stop


class StandIns:
    """What takes the place of the blocks' forward passes: it keeps the arguments and hands the input on.

    The instance's `forward` is replaced, so that what the model reads from a block's attributes (its attention type,
    say) stays. What blocks put out that give another shape than they take is learned from the first of their kind.

    states: what the last blocks of the first stacks put out in reality; the stack after those is the one recorded
    real:   blocks of that stack that are run, their weights being loaded for that where `load` says so
    mark:   copies of the hidden state and NaN in place of all other outputs, to see where they go
    raw:    arguments, keyword arguments, the name of the hidden state and its shape, of each block of the stack
    met:    the hidden states that the real ones got
    gave:   what they put out
    reached: what came out at the end, or entered the output layer
    """

    def __init__(
        self,
        model: Model,
        interface: Interface,
        states: Sequence[Any] = (),
        *,
        real: Collection[int] = (),
        load: bool = False,
        mark: bool = False,
    ):
        self.model = model
        self.interface = interface
        self.states = states
        self.stack = len(states)
        self.real = real
        self.load = load
        self.mark = mark
        self.raw: list[tuple[tuple[Any, ...], dict[str, Any], str | None, torch.Size]] = []
        self.marks: list[dict[int, Tensor]] = []
        self.met: dict[int, Tensor] = {}
        self.gave: dict[int, Any] = {}
        self.entering: Tensor
        self.reached: Any = None
        self._next = 0  # the block that is to be called
        self._end: int | None = None
        self._last: Tensor | None = None

    def pass_through(self, batch: Batch, *, on: bool = False, gradient: bool = False) -> None:
        """Run the network until the last block of the stack was called, or `on` to its output layer; `gradient`: what
        is kept can be differentiated in the states. Raises ModelError if its blocks are no chain."""
        network, span = self.model.network, self.model.spans[self.stack]
        head = getattr(network, "get_output_embeddings", lambda: None)() if on else None

        def stop(module: nn.Module, args: Any) -> None:
            self.reached = args
            raise Stop

        watched = head.register_forward_pre_hook(stop) if isinstance(head, nn.Module) else contextlib.nullcontext()
        self._end = None if on else span.stop
        try:
            with torch.set_grad_enabled(gradient), self.installed(), contextlib.suppress(Stop), watched:
                self.reached = self.model.run(batch)
        except (PrunellaError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            if on and self._next == span.stop and "meta" in str(error):
                return  # what comes after the blocks need not have its weights
            if isinstance(error, NotImplementedError):
                raise
            raise not_one_by_one(network, first_line(error)) from error
        if self._next < span.stop:
            raise not_one_by_one(network, f"it has {len(self.model.blocks)} blocks but called {self._next}")

    def _forward(self, index: int, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        network = self.model.network
        stack = self.model.stack_of(index)
        by_name = None
        if args:
            hidden, args = args[0], args[1:]
        else:
            by_name = self._name_of_hidden(kwargs)
            hidden = kwargs.pop(by_name, None)
        if not isinstance(hidden, Tensor):
            raise not_one_by_one(network, f"its block {index} is called without a hidden state")
        if index != self._next:
            raise not_one_by_one(network, f"it calls block {index} in place of block {self._next}")
        self._next += 1
        if index == self.model.spans[stack].start:
            if stack == self.stack:
                self.entering = hidden
        elif self._last is None or not _one(hidden, self._last):
            raise not_one_by_one(network, f"it changes the hidden state between blocks {index - 1} and {index}")

        def run() -> Any:
            own = hidden.clone() if index in self.interface.overwrites else hidden
            return original(*(() if by_name else (own,)), *args, **kwargs, **({by_name: own} if by_name else {}))

        if stack == self.stack:
            self.raw.append((args, kwargs, by_name, hidden.shape))
        if index in self.real:
            self.met[index] = hidden.clone()
            with self.model.block(index) if self.load else contextlib.nullcontext():
                out = run()
            self.gave[index] = out if self.model.undivided else first(out)
        elif self.model.undivided:
            out = self.states[stack] if stack < self.stack else None
        else:
            out = self._stand_in(index, stack, hidden, run, args, kwargs)
        if self._next == self._end:
            raise Stop
        if not self.model.undivided:
            self._last = first(out)
        return out

    def _stand_in(
        self, index: int, stack: int, hidden: Tensor, run: Callable[[], Any], args: Sequence[Any], kwargs: Any
    ) -> Any:
        """What stands in for a block's output."""
        kind, outputs = self.interface.alike[index], self.interface.outputs
        family = stack, type(self.model.module(self.model.blocks[index]))
        like = outputs.get((family, None), outputs.get((kind, None), outputs.get((kind, hidden.shape))))
        always = (family, None) in outputs or (kind, None) in outputs
        if like is None:
            plain: list[Any] = []

            def outline(value: Any) -> Any:
                if isinstance(value, Tensor):
                    return value.to("meta")
                if isinstance(value, int | float | str):
                    plain.append(value)  # which may follow from the shape
                    return value
                return None

            with torch.no_grad(), self.model.block(index) as block:
                like = map_tree(run(), outline)
                kept = _alike(first(like), hidden) and next(block.parameters(), None) is not None
            always = kept and not plain
            outputs[family if always and _has_more(like) else kind, None if always else hidden.shape] = like
        if stack < self.stack and index == self.model.spans[stack].stop - 1:
            out: Tensor = self.states[stack]
        elif always or _alike(first(like), hidden):
            out = hidden.clone() if self.mark else hidden  # other memory: a block that is passed by is noticed
        else:
            out = self._filled(first(like), index, hidden.device)
        marks: dict[int, Tensor] = {}
        if stack == self.stack:
            self.marks.append(marks)
        if isinstance(like, Tensor):
            return out
        items: list[Any] = [
            None if isinstance(item, Tensor) else map_tensors(item, lambda _: None) for _, item in items_of(like)
        ]
        if self.mark and stack == self.stack:
            found = {n: item for n, (_, item) in enumerate(items_of(like)) if n and isinstance(item, Tensor)}
            marks |= {n: _mark(t, hidden.device) for n, t in found.items()}
        for number, one in {0: out, **marks}.items():
            items[number] = one
        for path, number in self.interface.takes.get(stack, {}).items():
            items[number] = argument(args, kwargs, path)
        return rebuilt(like, items)

    def _filled(self, like: Tensor, index: int, device: torch.device) -> Tensor:
        """A hidden state of another shape: any numbers, but numbers where a real block takes them in."""
        if not self.real:
            return torch.zeros(like.shape, dtype=like.dtype, device=device)
        return torch.randn(like.shape, generator=torch.Generator().manual_seed(index)).to(device, like.dtype)

    def _name_of_hidden(self, kwargs: Mapping[str, Any]) -> str:
        """The name by which a block that is called with names only gets its hidden state."""
        found = [name for name, value in kwargs.items() if value is self._last and value is not None]
        tensors = [name for name, value in kwargs.items() if isinstance(value, Tensor)]
        return next(iter([*found, *({"hidden_states"} & kwargs.keys()), *tensors]), "hidden_states")

    def installed(self) -> contextlib.AbstractContextManager[None]:
        """The stand-ins in their places."""

        def replacement(index: int, original: Callable[..., Any]) -> Callable[..., Any]:
            return lambda *args, **kwargs: self._forward(index, original, *args, **kwargs)

        return replaced([self.model.module(name) for name in self.model.blocks], replacement)


def _has_more(like: Any) -> bool:
    """Does a block put out more than the hidden state? Those of one class do so alike, whatever they were given."""
    return not isinstance(like, Tensor) and any(isinstance(item, Tensor) for _, item in items_of(like)[1:])


def _mark(like: Tensor, device: torch.device) -> Tensor:
    return torch.full(like.shape, torch.nan if like.is_floating_point() else 0, dtype=like.dtype, device=device)


def _alike(one: Tensor, other: Tensor) -> bool:
    return (one.shape, one.dtype) == (other.shape, other.dtype)


def _one(one: Tensor, other: Tensor) -> bool:
    """Are these one tensor, maybe by two names?"""
    return one is other or (
        (one.data_ptr(), one.shape, one.stride(), one.dtype)
        == (other.data_ptr(), other.shape, other.stride(), other.dtype)
    )


def not_one_by_one(network: nn.Module, reason: str) -> ModelError:
    """The error for a network whose blocks do not run alone as they run in it."""
    return ModelError(f"the blocks of {type(network).__name__} cannot be run one by one: {reason}.")


def argument(args: Sequence[Any], kwargs: Mapping[str, Any], path: Argument) -> Any:
    """The argument at this place, or of this name; None where there is none."""
    if isinstance(path, str):
        return kwargs.get(path)
    return args[path] if path < len(args) else None
