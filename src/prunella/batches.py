"""Samples in batches, and their hidden states between two blocks: what a stream moves."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from .calls import Call, Calls
from .errors import InputError, say
from .hidden import Hidden
from .layers import Slot, as_parameters
from .machine import forget, ran_out
from .model.checkpoint import Source
from .model.network import Model
from .model.walk import LoadedBlock
from .samples import Batch, Numbers, Samples, on, rows_of, size_of
from .trees import first, map_tensors, stacked
from .watch import run_to


class Batches:
    """The samples of a stream and where they are.

    batches: as they go through a block
    hidden:  their hidden states
    dense:   what the dense model has in place of these, if it runs beside
    calls:   how blocks are called with them
    halved:  the memory of the device ran out, and they are smaller than they were
    """

    model: Model
    checkpoint: Source | None
    samples: Samples
    order: Literal["layer", "block"]
    batches: tuple[Batch, ...]
    hidden: Hidden
    dense: Hidden | None
    calls: Calls
    halved = False

    # --- memory that runs out

    def fits(self, batch: int, work: Callable[[], None]) -> bool:
        """Do this work with a batch, and say that it was done. If the memory of the device runs out, halve that batch
        and all that follow: the work is still to be done then, with each half.

        Raises InputError for what cannot be halved: a single sample, or all of them in `layer` order.
        """
        try:
            work()
            return True
        except RuntimeError as error:
            if not ran_out(error):
                raise
            whole = self.order == "layer" or size_of(self.batches[batch]) == 1
            if whole or any(hidden.beside[batch] for hidden in self._streams):
                raise self.too_large() from error
        forget(self.model.device)  # here, where nothing holds on any more to what was begun
        if not self.halved:
            half = -(-size_of(self.batches[batch]) // 2)
            say(
                f"the memory of {self.model.device} ran out: from here on {half} samples and not more go through a"
                " block at a time"
            )
        self._halve(batch)
        return False

    @contextlib.contextmanager
    def short(self, whole: bool = True) -> Iterator[None]:
        """Where what is done inside takes samples as a whole, say so if memory runs out."""
        try:
            yield
        except RuntimeError as error:
            if whole and ran_out(error):
                raise self.too_large() from error
            raise

    def too_large(self) -> InputError:
        """What to say where memory runs out and nothing can be halved."""
        what = f"the memory of {self.model.device} ran out"
        if self.order == "layer":
            return InputError(
                f"{what}: in order 'layer' all samples go through a block at once. Use --order block, which takes a few"
                " at a time."
            )
        return InputError(
            f"{what} where no fewer samples can go through a block: use shorter ones (--length) or smaller ones, or"
            " another --device."
        )

    @property
    def _streams(self) -> list[Hidden]:
        found = (getattr(self, "hidden", None), getattr(self, "dense", None))
        return [hidden for hidden in found if hidden is not None]

    def _halve(self, start: int) -> None:
        """Halve the batches from this one on. How blocks are called with the halves is recorded anew."""
        self.halved = True
        batches = list(self.batches)
        with torch.no_grad(), self.model.outside(head=False, checkpoint=self.checkpoint):
            for index in range(len(batches) - 1, start - 1, -1):
                halves = list(Samples((batches[index],)).batches(-(-size_of(batches[index]) // 2)))
                batches[index : index + 1] = halves
                for hidden in self._streams:
                    entered = hidden.holds(index)
                    hidden.split(index, [size_of(half) for half in halves], self.calls.interface.batch)
                    for number, half in enumerate(halves if entered else (), index):
                        passed = hidden.states(number)
                        for stack in range(len(passed) + 1):
                            hidden.calls[number] += self.calls.enter(half, passed[:stack])[1]
        self.batches = tuple(batches)

    # --- one sample alone, or a few of one shape

    def window(self, n: Numbers, batches: Sequence[Any] | Hidden | None = None) -> Any:
        """The hidden state of sample n alone, or of several, or what another sequence of batches has for them."""
        states = self.hidden if batches is None else batches
        places = [self._place(number) for number in ((n,) if isinstance(n, int) else n)]
        each = [self._one(states[batch], batch, place) for batch, place in places]
        return each[0] if len(each) == 1 else stacked(each, self.calls.interface.batch)

    def pieces(self, size: int) -> list[Numbers]:
        """All samples, so many at a time of one shape, drawn at random, as far as there are; each alone, in order,
        where one is asked for or where something travels beside their hidden states."""
        if size == 1 or any(self.hidden.beside):
            return list(range(len(self.samples)))
        found: list[Numbers] = []
        drawn = iter(self.samples.shuffled(0, size))
        for _, some in itertools.groupby(drawn, self.samples.group_of):
            numbers = tuple(some)
            found += [numbers[start : start + size] for start in range(0, len(numbers), size)]
        return found

    def outputs_of(self, numbers: Sequence[int], batch: Batch) -> Any:
        """What the model puts out for samples of one shape, once all hidden states have passed the last block; the
        batch holds them in this order."""
        states = [*self._passed(numbers, len(self.hidden.left)), self.window(tuple(numbers))]
        return self.calls.outputs(on(batch, self.model.device), states)

    def _passed(self, numbers: Sequence[int], stacks: int) -> list[Any]:
        """What left the first so many stacks, of these samples."""
        each = []
        for number in numbers:
            batch, place = self._place(number)
            each.append([self._one(state, batch, place) for state in self.hidden.states(batch)[:stacks]])
        return [stacked(some, self.calls.interface.batch) for some in zip(*each, strict=True)]

    def _place(self, n: int) -> tuple[int, int]:
        """The batch that has sample n, and its number there."""
        for batch, samples in enumerate(map(size_of, self.batches)):
            if n < samples:
                return batch, n
            n -= samples
        raise IndexError(n)

    def _one(self, state: Any, batch: int, place: int) -> Any:
        """What a batch's state has for one of its samples."""
        dimension, size = self.calls.interface.batch, size_of(self.batches[batch])
        return map_tensors(state, lambda tensor: rows_of(tensor, dimension, size, place))

    def _record_windows(self, index: int) -> None:
        """See to it that it is known how the stack of block `index` is called on each sample alone."""
        while not self.calls.windows or len(self.calls.windows[0]) <= index:
            with self.model.outside(head=False, checkpoint=self.checkpoint):
                self.calls.record_windows(self.samples, self._left)

    def _left(self, n: int) -> list[Any]:
        """What left the stacks before the one whose calls are to be recorded, of sample n alone."""
        known = len(self.calls.windows[n]) if self.calls.windows else 0
        return self._passed([n], sum(span.stop <= known for span in self.model.spans))

    def _call(self, n: Numbers, index: int) -> Call:
        """How block `index` is called with sample n alone, or with several together."""
        if isinstance(n, int):
            self._record_windows(index)
            return self.calls.windows[n][index]
        calls = self.calls.several.setdefault(n, [])
        while len(calls) <= index:
            together = next(self.samples.pick(n))
            passed = self._passed(n, sum(span.stop <= len(calls) for span in self.model.spans))
            with torch.no_grad(), self.model.outside(head=False, checkpoint=self.checkpoint):
                calls += self.calls.enter(together, passed)[1]
        return calls[index]

    def runner(self, block: LoadedBlock, active: Mapping[str, Slot]) -> Callable[..., Tensor]:
        """`Block.run`: the block on one window, or on several, with other weights in place of its own."""

        def run(weights: Mapping[str, Tensor], n: Numbers, at: str | None = None) -> Tensor:
            own = {key.removeprefix(f"{block.name}."): value for key, value in as_parameters(weights, active).items()}
            # Of this sample alone, if there is anything.
            beside = self.hidden.beside[self._place(n)[0]] if isinstance(n, int) else {}
            call = self._call(n, block.index)
            args, kwargs, _ = call.arguments(self.window(n), beside)
            out = run_to(at, block.module, own, args, kwargs)
            result: Tensor = out if call.whole and at is None else first(out)
            return result

        return run
