"""Hidden states on their way through the blocks: the loop, and all that is watched in it.

    for each block: its layers -> statistics -> steps -> pruned weights -> outputs, the next block's inputs

How a block is called is not hard-coded but recorded, see calls.py.
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from .batches import Batches
from .calls import Calls, Key
from .compat import version_of
from .errors import InputError, NumericalError
from .examine import examine
from .hidden import Hidden, Shelf
from .layers import Slot, unpruned, within
from .lenses import Chunks
from .machine import at_a_time, cache_directory, keep_random
from .model.checkpoint import Source
from .model.network import Model
from .model.walk import LoadedBlock, Weights
from .outcome import BlockResult
from .phases import phase
from .registry import Step
from .samples import Samples, size_of, tokens_of
from .solver import Settled, Solver, tell
from .standins import not_one_by_one
from .statistics.registry import taking
from .types import Block, Stats
from .waits import Again, demand, together
from .watch import SAMPLE, Gather, Stop, Watch, check_seen, stats_of

TOKENS = 2048  # that go through a block at a time on a CPU, in `block` order


class Stream(Batches):
    """Hidden states on their way through the blocks of a model.

    >>> stream = Stream(model, windows)                                        # doctest: +SKIP
    >>> for index, block in model.walk():                                      # doctest: +SKIP
    ...     result = stream.prune(block, slots[index], steps)

    `order` says from which inputs statistics are made:

    block: one pass through the dense block shows the inputs of all its layers, and a second one, through the pruned
           block, makes the next block's inputs. The reference codes of SparseGPT and Wanda do this
    layer: all samples go through the block together. Each layer is pruned when its inputs arrive, and the pass goes on
           with the pruned weight: a layer sees what the pruned layers before it put out, in half the passes. The widest
           activation of all samples must fit in memory

    Args:
        alone: each sample is a batch of its own; else `block` order takes several short ones together.
        beside: the dense model's hidden states are kept too, in `dense`.
        rounding: bits and group of the grid to which pruned layers are rounded that no step has quantized; layers after
            them see what that does.
        keep_zeros: zeros that the weights come with stay zero, and count towards the sparsity (`hold_zeros`).
        checkpoint: where the weights outside of the blocks come from, if not from the model's own.
        start, masks: the weights that the steps begin with and their masks, if the model is pruned already; the blocks
            of the walk have the dense weights then, as always.
    """

    def __init__(
        self,
        model: Model,
        samples: Samples | Tensor,
        *,
        order: Literal["layer", "block"] = "block",
        alone: bool = False,
        beside: bool = False,
        rounding: tuple[int, int] | None = None,
        keep_zeros: bool = False,
        checkpoint: Source | None = None,
        start: Weights | None = None,
        masks: Mapping[str, Tensor] | None = None,
    ):
        self.model = model
        self.start = start
        self.masks = masks or {}
        self.rounding = rounding
        self.keep_zeros = keep_zeros
        self.checkpoint = checkpoint
        self.samples = samples = Samples.of(samples, model.task.argument)
        self.order: Literal["layer", "block"] = order
        if order == "layer" and len(samples.groups) > 1:
            raise InputError(
                "the samples are of several shapes, which do not go through a layer together: use --order block."
            )
        with torch.no_grad(), model.outside(head=False, checkpoint=checkpoint):
            if model.interface is None:
                with self.short():
                    model.interface = examine(model, samples)
            alone = alone or (model.interface.stateful and order == "block")  # what travels cannot be cut into samples
            most = 1 if alone else at_a_time(TOKENS, model.device)
            self.batches = tuple(
                batch
                for group in samples.groups
                for batch in Samples((group,)).batches(
                    len(samples) if order == "layer" else max(1, most // tokens_of(group))
                )
            )
            self._folder = model.scratch or cache_directory() / "hidden"
            self.calls = Calls(model, model.interface, self._shelf, len(samples))
            self.first, index = size_of(self.batches[0]), 0  # samples in the first batch, before any was halved
            while index < len(self.batches):
                index += self.fits(index, partial(self._enter, index, beside))
        self.calls.batches = self.hidden.calls

    def _enter(self, index: int, beside: bool) -> None:
        """Let a batch enter the first block."""
        batch = self.batches[index]
        state, calls = self.calls.enter(batch)
        if not index:
            size = max(call.shape.numel() for call in calls) // size_of(batch) * state.element_size()
            shelf = partial(Shelf, size * len(self.samples), self.model.device, self._folder)
            self.hidden = Hidden(len(self.batches), self.model.device, shelf())
            # What the dense model has in place of these.
            self.dense = Hidden(len(self.batches), self.model.device, shelf()) if beside else None
        for hidden in self._streams:
            hidden[index], hidden.calls[index] = state, list(calls)

    def _shelf(self, nbytes: int) -> Callable[[Any], Any]:
        return Shelf(nbytes, self.model.device, self._folder).put

    def advance(self, block: LoadedBlock, hidden: Hidden | None = None) -> None:
        """Run a block on all samples: its outputs become the hidden states (or those in `hidden`)."""
        hidden = self.hidden if hidden is None else hidden
        batch = 0
        with torch.no_grad():
            while batch < len(hidden):
                batch += self.fits(batch, partial(self.forward, block, hidden, batch))
        self.pass_on(block.index, hidden)

    def skip(self, block: LoadedBlock, source: Weights) -> None:
        """Run a block that is pruned already on all samples, by the weights that the source has for it; the dense
        model's hidden states, if they go beside, by its own."""
        with block.use(source):
            self.advance(block)
        if self.dense is not None:
            self.advance(block, self.dense)

    def pass_on(self, index: int, hidden: Hidden) -> None:
        """Where block `index`, which all samples have passed, was the last of its stack, let them enter the next."""
        stack = self.model.stack_of(index)
        if index != self.model.spans[stack].stop - 1 or stack == len(self.model.spans) - 1:
            return
        hidden.leave()
        with torch.no_grad(), self.model.outside(head=False, checkpoint=self.checkpoint):
            for b, batch in enumerate(self.batches):
                hidden[b], calls = self.calls.enter(batch, hidden.states(b))
                hidden.calls[b] += calls

    def forward(self, block: LoadedBlock, hidden: Hidden, batch: int) -> None:
        """Run a block on one batch of the hidden states, which move on."""
        hidden.move(batch, *self.run(block, hidden, batch))

    @phase("forward")
    def run(self, block: LoadedBlock, hidden: Hidden, batch: int) -> tuple[Any, dict[Key, Any]]:
        """What a block puts out for one batch of the hidden states, and what travels on beside it."""
        state = hidden[batch]
        version = version_of(state)
        out, beside = hidden.calls[batch][block.index].run(block.module, state, hidden.beside[batch])
        if version_of(state) != version:
            raise not_one_by_one(self.model.network, f"block {block.index} overwrites what it is given")
        return out, beside

    def outputs(self, batch: int, **options: Any) -> Any:
        """What the model puts out for one batch, once the hidden states have passed the last block."""
        states = [*self.hidden.states(batch), self.hidden[batch]]
        return self.calls.outputs(self.batches[batch], states, **options)

    def fork(self, shelf: Shelf) -> Stream:
        """Another stream whose hidden states, the same as now, go on by themselves and wait on that shelf."""
        other = copy.copy(self)
        other.hidden = self.hidden.copy(shelf)
        return other

    def prune(
        self,
        block: LoadedBlock,
        slots: Sequence[Slot],
        steps: Sequence[Step],
        *,
        min_tokens: int = 32,
        last: bool = False,
        known: dict[str, Stats] | None = None,
    ) -> BlockResult:
        """Apply `steps` to a block, and move the hidden states on with what they made of it, unless it is the `last`.
        The block itself stays as it is: who wants the new weights finds them in the result. `known`: statistics of its
        layers that were made elsewhere, each of which goes when it was used.

        Layers that fewer than `min_tokens` tokens reached (experts that the router seldom picks) are pruned by
        magnitude, and say so. Raises NumericalError, naming the layer, for NaN or infinity in weights, inputs or
        results.
        """
        # Before the device is asked nothing has moved on, unless statistics are used up or the dense model runs beside.
        again = known is None and self.dense is None
        restore = keep_random(self.model.device)
        try:
            with self.short(self.order == "layer"), together(again):
                return self._prune(block, slots, steps, min_tokens, last, known)
        except Again:
            restore()
        with self.short(self.order == "layer"), together():
            return self._prune(block, slots, steps, min_tokens, last, known)

    def _prune(
        self,
        block: LoadedBlock,
        slots: Sequence[Slot],
        steps: Sequence[Step],
        min_tokens: int,
        last: bool,
        known: dict[str, Stats] | None,
    ) -> BlockResult:
        started = time.perf_counter()
        active = {slot.name: slot for slot in slots if slot.sparsity > 0}
        for slot in active.values():
            demand(torch.isfinite(slot.read()).all(), partial(_not_finite, slot))
        own = block.tensors()
        begin = {} if self.start is None else block.read(self.start)
        keys = {slot.key for slot in active.values()}
        others: dict[str, Tensor] = {}
        solver = Solver(
            block,
            steps,
            begin=begin,
            masks=self.masks,
            min_tokens=min_tokens,
            rounding=self.rounding,
            keep_zeros=self.keep_zeros,
        )
        with block.use({slot.key: own[slot.key].clone() for slot in active.values()}):
            if self.order == "layer":
                layers, moved = self._prune_on_arrival(block, active, solver)
            else:
                layers, others = self._prune_after_dense_pass(block, active, solver, known)
            with phase("solve"):
                told = tell(slots, layers)  # the one look at the device: nothing has moved on yet
            if self.order == "layer":
                self.hidden.move(0, *moved)
                self.pass_on(block.index, self.hidden)
            elif not last:
                with block.use({**{k: v for k, v in begin.items() if k not in keys}, **others}):
                    self.advance(block)
            if self.dense is not None:
                self.pass_on(block.index, self.dense)
            changed = {**others, **{slot.key: slot.tensor for slot in slots if slot.name in layers}}
        results = tuple(told[slot.name][0] for slot in slots)
        masks = {name: bits for name, (_, bits, _) in told.items() if bits is not None}
        grids = {name: grid for name, (_, _, grid) in told.items() if grid is not None}
        seconds = time.perf_counter() - started
        return BlockResult(block.index, block.name, results, masks, grids, changed, seconds)

    def _dense_inputs(
        self, block: LoadedBlock, active: Mapping[str, Slot], batch: int, needs: frozenset[str]
    ) -> tuple[dict[str, Chunks], Callable[[], None]]:
        """What the layers of the block, still dense, get from the dense model's hidden states, and what moves these on;
        of layers that share an input, the first. Experts are left out: other tokens may be routed to them."""
        inputs: dict[str, Chunks] = {}
        dense = self.dense
        if dense is None:
            return inputs, lambda: None

        def see(layer_name: str, rows: Chunks, same: bool) -> None:
            if not same and not active[layer_name].routed:
                inputs[layer_name] = rows

        watch = Watch(active, see) if taking("dense_TI", needs) else contextlib.nullcontext()
        with torch.no_grad(), watch:
            state, beside = self.run(block, dense, batch)
        return inputs, lambda: dense.move(batch, state, beside)

    def _prune_on_arrival(
        self,
        block: LoadedBlock,
        active: Mapping[str, Slot],
        solver: Solver,
    ) -> tuple[dict[str, Settled], tuple[Any, dict[Key, Any]]]:
        """What became of its layers; what the block puts out, and what travels on beside it."""
        needs = solver.needs
        done: dict[str, Settled] = {}
        stats = Stats()

        def see(layer_name: str, rows: Chunks, same: bool) -> None:
            nonlocal stats
            if layer_name in done:
                return
            if not same:
                with phase("statistics"):
                    stats = stats_of(rows, needs, SAMPLE, dense.pop(layer_name, None))
            with phase("solve"):
                done[layer_name] = solver.alone(active[layer_name], stats)

        dense, move = self._dense_inputs(block, active, 0, needs)
        move()
        with torch.no_grad(), Watch(active, see):
            moved = self.run(block, self.hidden, 0)
        check_seen(block.name, done, active)
        for layer_name, slot in active.items():  # experts that no token reached
            if layer_name not in done:
                with phase("solve"):
                    done[layer_name] = solver.alone(slot, Stats(), reached=False)
        return done, moved

    def _prune_after_dense_pass(
        self,
        block: LoadedBlock,
        active: Mapping[str, Slot],
        solver: Solver,
        known: dict[str, Stats] | None,
    ) -> tuple[dict[str, Settled], dict[str, Tensor]]:
        needs = solver.needs
        gather = Gather(needs)
        stats, leader = (gather.stats, gather.leader) if known is None else (known, {name: name for name in known})
        order: list[str] = []

        def see(layer_name: str, rows: Chunks, same: bool) -> None:
            gather.see(layer_name, rows, same)
            if first and layer_name not in order:
                order.append(layer_name)
            # Nothing after the last layer is of interest, nor is its product, unless outputs are wanted.
            if not first and whole and not keep_outputs and layer_name == order[-1]:
                raise Stop

        keep_outputs = "targets" in needs
        # The dense block's outputs are those on the pruned model's inputs where it does not run beside.
        same = self.dense is None or not taking("dense_TI", needs)
        outputs: list[Tensor] = []
        whole = False
        counted: dict[int, Counter[str]] = {}  # of samples an attempt at which ran out of memory: `Gather.known`

        def gathered() -> None:
            gather.seen, gather.dense = Counter(), {}
            gather.dense, move = self._dense_inputs(block, active, batch, needs)
            with contextlib.suppress(Stop), Watch(active, see):
                out, _ = self.run(block, self.hidden, batch)
                if keep_outputs and same:
                    outputs.append(out)
            move()

        batch = sample = 0
        samples = 0 if known is not None else len(self.samples) if needs else self.first
        with torch.no_grad():
            while sample < samples:
                size = size_of(self.batches[batch])
                first = sample < self.first
                gather.sample = max(1, SAMPLE * size // self.first) if first else 0
                gather.known = counted.get(sample, Counter())
                if self.fits(batch, gathered):
                    whole = len(order) == len(active) and not any(slot.routed for slot in active.values())
                    batch, sample = batch + 1, sample + size
                else:
                    counted.update(dict.fromkeys(range(sample, sample + size), gather.seen | Counter(gather.known)))
        check_seen(block.name, leader, active)
        if all(step.per_layer for step in solver.steps):  # one layer at a time: its new weight and statistics can go
            done: dict[str, Settled] = {}
            waiting = [leader.get(layer_name, layer_name) for layer_name in active]
            for (layer_name, slot), source in zip(active.items(), tuple(waiting), strict=True):
                waiting.remove(source)
                found = stats.get(source, Stats()) if source in waiting else stats.pop(source, Stats())
                with torch.no_grad(), phase("solve"):
                    done[layer_name] = solver.alone(slot, found)
            return done, {}
        layers = tuple(solver.layer(slot, stats.get(leader.get(n, n), Stats())) for n, slot in active.items())
        weights = {id(getattr(slot.module, slot.parameter)) for slot in active.values()}
        own = {within(block.name, key): p.data for key, p in block.module.named_parameters() if id(p) not in weights}
        kept = {within(block.name, key) for key, _ in block.module.named_buffers()}
        beside: Any = self.dense
        whole_block = Block(
            block.index,
            block.name,
            layers,
            run=self.runner(block, active) if known is None else None,
            windows=len(self.samples) if known is None else 0,
            pieces=self.pieces if known is None else None,
            targets=(lambda n: self.window(n, outputs if same else beside)) if keep_outputs else None,
            dense=(lambda n: self.window(n, beside)) if "dense" in needs else None,
            others={key: solver.begin.get(key, value) for key, value in own.items()},
            buffers={key: value for key, value in solver.begin.items() if key in kept},
            fixed=unpruned(block.module, block.name, {slot.key for slot in active.values()}),
        )
        with torch.no_grad(), phase("solve"):
            result = solver.apply(whole_block)
            changed = {key: value for key, value in result.others.items() if value is not whole_block.others[key]}
            return {la.name: solver.settle(la, active[la.name]) for la in result.layers}, changed


def _not_finite(slot: Slot) -> NumericalError:
    return NumericalError(f"layer '{slot.name}' has NaN or infinite weights before pruning.")
