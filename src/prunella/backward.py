"""Gradients of the whole model's loss, with one block's weights in memory.

    forward:   embeddings -> block 0 -> … -> last block -> norm, head, loss; what enters each block is kept
    backward:  last block -> … -> block 0: run it again with gradients, hand it what arrived from the block behind it

The hidden states that are kept wait where there is room for them: on the device, in main memory, on disk. Each window
goes on its own, so that its gradients can be told from those of the others.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Collection, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from .calibrate import check_windows
from .errors import InputError, ModelError, NumericalError
from .hidden import Hidden
from .layers import Slot, find_layers
from .model.checkpoint import Checkpoint
from .model.network import Model
from .model.walk import LoadedBlock
from .progress import Track, no_track
from .stream import Stream

ROWS = 256  # tokens at a time whose logits are made
Loss = Callable[[Tensor, Tensor], Tensor]  # of a window's logits (L, V) and ids (L)


def gradients(
    model: Model,
    windows_NL: Tensor,
    *,
    loss: Loss | None = None,
    checkpoint: Checkpoint | None = None,
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
    back = Back(model, windows_NL, loss=loss, checkpoint=checkpoint, track=track)
    for index, block in model.walk(checkpoint, back=True, track=track, what="gradients"):
        for window, found in back.advance(block):
            yield index, window, found


class Back:
    """The gradient of each window's loss on its way from the last block to the first.

    losses: of each window
    """

    def __init__(
        self,
        model: Model,
        windows_NL: Tensor,
        *,
        loss: Loss | None = None,
        checkpoint: Checkpoint | None = None,
        track: Track = no_track,
    ):
        check_windows(model, windows_NL)
        if loss is None and windows_NL.shape[1] < 2:
            raise InputError("windows of a single token have no next token to predict: use longer ones.")
        self.model = model
        self.loss = loss
        self.stream = Stream(model, windows_NL, alone=True, checkpoint=checkpoint)
        if self.stream.calls.interface.stateful:
            raise ModelError(
                f"the blocks of {type(model.network).__name__} pass each other more than the hidden state: its"
                " gradients cannot be made block by block."
            )
        self._entering: list[Hidden] = []  # what enters each block that is yet to come
        hidden = self.stream.hidden
        shelf = hidden.shelf_for(len(model.blocks))
        for _, block in model.walk(checkpoint, track=track, what="forward"):
            self._entering.append(hidden.copy(shelf))
            self.stream.advance(block)
        with model.outside(checkpoint=checkpoint):
            self.losses = [self._begin(n) for n in range(len(hidden))]

    def _begin(self, n: int) -> float:
        """The loss of window n; its gradient takes the place of the last block's output."""
        output = self.stream.hidden[n].detach().requires_grad_()
        total, gradient = 0.0, torch.zeros_like(output)
        with torch.enable_grad():
            for part in self._losses(self.stream.batches[n], output):
                gradient += torch.autograd.grad(part, output)[0]
                total += part.item()
        if not math.isfinite(total):
            raise NumericalError(
                f"the loss of window {n} is not finite: weights of '{self.model.name}' hold NaN or infinity, or it"
                " overflows on this text; use --dtype float32 or bfloat16."
            )
        self.stream.hidden[n] = gradient
        return total

    def _losses(self, ids_1L: Tensor, output: Tensor) -> Iterator[Tensor]:
        """The loss of a window, or parts that add up to it, each made when the one before it may go."""
        ids_L = ids_1L[0].to(self.model.device)
        if self.loss is not None:
            yield self.loss(self.stream.calls.logits(ids_1L, output)[0], ids_L)
            return
        chooses = "logits_to_keep" in inspect.signature(self.model.network.forward).parameters
        predicted = len(ids_L) - 1
        for rows_R in torch.split(torch.arange(predicted, device=ids_L.device), ROWS):
            logits_RV = self.stream.calls.logits(ids_1L, output, **({"logits_to_keep": rows_R} if chooses else {}))[0]
            if len(logits_RV) != len(rows_R):
                logits_RV = logits_RV[rows_R]
            logits_RV = logits_RV.to(torch.promote_types(logits_RV.dtype, torch.float32))
            yield functional.cross_entropy(logits_RV, ids_L[rows_R + 1], reduction="sum") / predicted

    def advance(self, block: LoadedBlock) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """Take the gradient of each window back through a block: the window, and the
        gradients of the block's layers. Blocks are taken from the last to the first, each with all windows."""
        slots = find_layers(block.module, block.name)
        entering = self._entering.pop()
        for n in range(len(entering)):
            yield n, self._through(block, slots, entering[n], n)

    def _through(self, block: LoadedBlock, slots: Sequence[Slot], entering: Tensor, n: int) -> dict[str, Tensor]:
        """The gradients of a block's layers on window n; that of its input takes the place of that of its output."""
        state = entering.detach().requires_grad_()
        weights = {slot.key: getattr(slot.module, slot.parameter) for slot in slots}
        with torch.enable_grad(), _asked(weights.values()):
            output, _ = self.stream.calls.batches[n][block.index].run(block.module, state, {})
            found = torch.autograd.grad(
                output,
                (state, *weights.values()),
                self.stream.hidden[n],
                allow_unused=True,  # experts that no token reached
                materialize_grads=True,
            )
        self.stream.hidden[n] = found[0]
        by_key = dict(zip(weights, found[1:], strict=True))
        return {slot.name: slot.read(by_key[slot.key]) for slot in slots}


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
