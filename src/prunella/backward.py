"""Gradients of the whole model's loss, with one block's weights in memory.

    forward:   embeddings -> block 0 -> … -> last block -> norm, head, loss; what enters each block is kept
    backward:  last block -> … -> block 0: run it again with gradients, hand it what arrived from the block behind it

The hidden states that are kept wait where there is room for them: on the device, in main memory, on disk. Each window
goes on its own, so that its gradients can be told from those of the others.

Steps that read gradients are applied here, to each block when its gradients have arrived (`order: back`): what comes
before a block is dense still, and what comes behind it was dense when the gradients were made.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice

import torch
from torch import Tensor

from .crossings import Crossing
from .errors import InputError, ModelError, NumericalError
from .hidden import Hidden
from .layers import Slot, find_layers
from .model.checkpoint import Source
from .model.network import Model
from .model.walk import LoadedBlock
from .outcome import BlockResult
from .progress import Track, no_track
from .registry import Step
from .samples import TARGET, Batch, Samples, on
from .statistics.registry import concatenate, merged, of_gradients, taking, whole
from .stream import Stream
from .trees import tensors
from .types import Stats
from .unlabelled import targeted
from .waits import demand, fetch, together
from .watch import Gather, Watch

FLAT = 1e-5  # losses below this are those of a network that is compared with itself

Loss = Callable[[Tensor, Tensor], Tensor]  # of a window's logits (L, V) and ids (L)


class Back:
    """The gradient of each window's loss on its way from the last block to the first.

    losses: the loss of each window
    """

    def __init__(
        self, stream: Stream, *, loss: Loss | None = None, checkpoint: Source | None = None, track: Track = no_track
    ):
        """Take all windows of a stream, which has not moved yet, through all blocks.

        Args:
            stream: each of its batches is a single window (`alone`).
            loss, checkpoint, track: as for `gradients`.

        Raises:
            InputError, ModelError, NumericalError: as `gradients`.
        """
        model = stream.model
        model.task.check(model, stream.samples)
        if len(stream.batches) != len(stream.samples):
            raise ValueError("gradients are of single windows: make the stream with alone=True")
        if stream.calls.interface.stateful and model.task.language:
            raise _more(model)
        self.model, self.stream, self.loss = model, stream, loss
        self._checkpoint = checkpoint
        self._crossings: list[Crossing] = []  # of each sample, into the stack in which the gradients are
        # Of each sample, the gradients of what left each stack but the last, from all that comes behind.
        self._left: list[list[Tensor]] = [[] for _ in range(len(stream.hidden))]
        self._entering: list[Hidden] = []  # what enters each block that is yet to come
        hidden = stream.hidden
        shelf = hidden.shelf_for(len(model.blocks))
        for _, block in model.walk(checkpoint, track=track, what="forward"):
            self._entering.append(hidden.copy(shelf))
            stream.advance(block)
        with model.outside(checkpoint=checkpoint):
            parts = [self._begin(n) for n in range(len(hidden))]
        every = iter(fetch([part for some in parts for part in some]))
        self.losses = [sum(part.item() for part in islice(every, len(some))) for some in parts]
        for n, total in enumerate(self.losses):
            if not math.isfinite(total):
                raise NumericalError(
                    f"the loss of window {n} is not finite: weights of '{self.model.name}' hold NaN or infinity, or it"
                    " overflows on this text; use --dtype float32 or bfloat16."
                )
        if loss is None and max(self.losses) < FLAT and all(TARGET in batch for batch in stream.batches):
            raise InputError(
                f"the loss of task '{model.task.name}' on these samples has no gradient, since they are compared with"
                " what the dense network itself puts out: give samples with labels, or use a step that reads no"
                " gradients."
            )

    def _begin(self, n: int) -> list[Tensor]:
        """The loss of window n, in parts; its gradient takes the place of the last block's output."""
        hidden = self.stream.hidden
        outputs = [state.detach().requires_grad_() for state in (*hidden.states(n), hidden[n])]
        parts, gradients = list[Tensor](), [torch.zeros_like(output) for output in outputs]
        with torch.enable_grad():
            for part in self._losses(self.stream.batches[n], outputs):
                more = torch.autograd.grad(part, outputs, allow_unused=True, materialize_grads=True)
                gradients = [gradient + found for gradient, found in zip(gradients, more, strict=True)]
                parts.append(part.detach())
        *self._left[n], hidden[n] = gradients
        return parts

    def _losses(self, batch: Batch, outputs: list[Tensor]) -> Iterator[Tensor]:
        """The loss of a window, or parts that add up to it, one at a time in memory."""
        batch, run = on(batch, self.model.device), partial(self.stream.calls.outputs, batch, outputs)
        if self.loss is not None:
            yield self.loss(run().logits[0], batch["input_ids"][0])
        else:
            yield from self.model.task.parts(run, batch)

    def advance(
        self, block: LoadedBlock, slots: Collection[Slot] | None = None, watch: Watch | None = None
    ) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """Take the gradient of each window back through a block: the window, and the gradients of the block's layers,
        or of those in `slots`. Blocks are taken from the last to the first, each with all windows."""
        slots = find_layers(block.module, block.name) if slots is None else slots
        entering, stack = self._entering.pop(), self.model.stack_of(block.index)
        span = self.model.spans[stack]
        if stack and block.index == span.stop - 1:
            with self.model.outside(head=False, checkpoint=self._checkpoint):
                batches = [on(batch, self.model.device) for batch in self.stream.batches]
                states = [self.stream.hidden.states(n)[:stack] for n in range(len(entering))]
                self._crossings = [Crossing(self.stream.calls, *some) for some in zip(batches, states, strict=True)]
        for n in range(len(entering)):
            found = self._through(block, slots, entering, n, watch)
            if stack and block.index == span.start:
                self._cross(n)
            yield n, found

    def _cross(self, n: int) -> None:
        """The gradient of what left the stack before takes the place of that of what entered this one."""
        through = self._crossings[n].back(self.stream.hidden[n])
        sums = [one + other for one, other in zip(self._left[n], through, strict=True)]
        *self._left[n], self.stream.hidden[n] = sums

    def skip(self, block: LoadedBlock) -> None:
        """Take the gradients back through a block none of whose layers is of interest."""
        for _ in self.advance(block, ()):
            pass

    def _through(
        self, block: LoadedBlock, slots: Collection[Slot], entering: Hidden, n: int, watch: Watch | None
    ) -> dict[str, Tensor]:
        """The gradients of a block's layers on window n; that of its input takes the place of that of its output."""
        state = entering[n].detach().requires_grad_()
        call, pairs = self.stream.calls.batches[n][block.index], list[tuple[Tensor, Tensor]]()
        if self.model.stack_of(block.index):
            call, pairs = self._crossings[n].call(block.index)
        weights = {slot.key: getattr(slot.module, slot.parameter) for slot in slots}
        with torch.enable_grad(), _asked(weights.values()):
            with watch or contextlib.nullcontext():
                output, beside = call.run(block.module, state, entering.beside[n])
            if _hangs_on([state, *weights.values()], tensors(tuple(beside.values()))):
                raise _more(self.model)
            found = torch.autograd.grad(
                output,
                (state, *weights.values(), *(leaf for _, leaf in pairs)),
                self.stream.hidden[n],
                allow_unused=True,  # experts that no token reached
                materialize_grads=True,
            )
        self.stream.hidden[n] = found[0]
        for (argument, _), gradient in zip(pairs, found[1 + len(weights) :], strict=True):
            self._crossings[n].gather(argument, gradient)
        by_key = dict(zip(weights, found[1:], strict=False))
        return {slot.name: slot.read(by_key[slot.key]) for slot in slots}

    def prune(
        self, block: LoadedBlock, slots: Sequence[Slot], steps: Sequence[Step], *, min_tokens: int = 32
    ) -> BlockResult:
        """Take the gradients back through a block, and apply `steps` to it as `Stream.prune` does. The statistics are
        those of its dense inputs and of the gradients."""
        needs = frozenset().union(*[step.needs for step in steps])
        active = {slot.name: slot for slot in slots if slot.sparsity > 0}
        if not active:
            self.skip(block)
        with together():
            known = self._known(block, active, needs) if active else {}
            return self.stream.prune(block, slots, steps, min_tokens=min_tokens, last=True, known=known)

    def _known(self, block: LoadedBlock, active: Mapping[str, Slot], needs: frozenset[str]) -> dict[str, Stats]:
        """The statistics of those layers of a block that a token reached."""
        of_gradient = taking("gradient_NOI", needs)
        of_input = frozenset(statistic.name for statistic in whole(needs)) - of_gradient
        # What is one behind the other in the end is put together once, and not for each window anew.
        together = any(statistic.merge is concatenate for statistic in whole(of_gradient))
        gather = Gather(of_input)
        waiting: dict[str, list[Tensor]] = {name: [] for name in active}
        values: dict[str, dict[str, Tensor]] = {name: {} for name in active}
        for n, found in self.advance(block, active.values(), Watch(active, gather.see)):
            gather.sample = 0
            for name, gradient_OI in found.items():
                waiting[name].append(gradient_OI)
            if together and n + 1 < len(self.losses):
                continue
            for name, several in waiting.items():
                made = of_gradients(of_gradient, torch.stack(several))
                values[name] = merged(values[name], made)
                several.clear()
        for name, made in values.items():
            for value in made.values():
                demand(torch.isfinite(value).all(), partial(_not_finite, name))
        shared = {name: gather.stats[first] for name, first in gather.leader.items()}
        return {name: replace(stats, values={**stats.values, **values.pop(name)}) for name, stats in shared.items()}


def gradients(
    model: Model,
    windows_NL: Tensor,
    *,
    loss: Loss | None = None,
    checkpoint: Source | None = None,
    track: Track = no_track,
) -> Iterator[tuple[int, int, dict[str, Tensor]]]:
    """The gradients of the model's loss on each window, block by block from the last to the first.

    Neither the model nor its gradients are ever held whole. Gradients have the model's dtype: in float16 small ones
    become zero, in bfloat16 and float32 they do not.

    Args:
        model: from `load_model` or `wrap_model`.
        windows_NL: token ids, one window a row.
        loss: of a window's logits (L, V) and token ids (L), both on the model's device, a scalar; None: the mean cross
            entropy of each next token.
        checkpoint: read the weights from here in place of the model's own (its pruned version, say).
        track: wraps each loop over blocks, `track(range, what, total)`, to show progress.

    Yields:
        (block, window, {layer name: gradient (O, I)}): all windows of a block, then those of the block before it. While
        one is handed out, its block is loaded.

    Raises:
        InputError: the windows are not of the model's tokens, longer than it has positions, or of a single token.
        ModelError: its blocks pass each other more than the hidden state.
        NumericalError: the loss of a window is NaN or infinite.
    """
    samples = targeted(model, Samples.of(windows_NL, model.task.argument), checkpoint=checkpoint, track=track)
    stream = Stream(model, samples, alone=True, checkpoint=checkpoint)
    back = Back(stream, loss=loss, checkpoint=checkpoint, track=track)
    for index, block in model.walk(checkpoint, back=True, track=track, what="gradients"):
        for window, found in back.advance(block):
            yield index, window, found


def _hangs_on(inputs: Sequence[Tensor], made: Sequence[Tensor]) -> bool:
    """Has what was made a gradient in one of these inputs?"""
    made = [tensor for tensor in made if tensor.requires_grad]
    zeros = [torch.zeros_like(tensor) for tensor in made]
    found = torch.autograd.grad(made, inputs, zeros, retain_graph=True, allow_unused=True) if made else ()
    return any(gradient is not None for gradient in found)


def _more(model: Model) -> ModelError:
    return ModelError(
        f"the blocks of {type(model.network).__name__} pass each other more than the hidden state: its gradients cannot"
        " be made block by block."
    )


def _not_finite(name: str) -> NumericalError:
    return NumericalError(f"the gradients of layer '{name}' hold NaN or infinity: use --dtype float32 or bfloat16.")


@contextlib.contextmanager
def _asked(parameters: Collection[Tensor]) -> Iterator[None]:
    """Parameters whose gradients may be asked for."""
    before = [parameter.requires_grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.requires_grad_()
        yield
    finally:
        for parameter, old in zip(parameters, before, strict=True):
            parameter.requires_grad_(old)
