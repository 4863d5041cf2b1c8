"""From the last block to the first: gradients of the whole model's loss, and pruning by them (`order: back`)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .backward import Loss
from .layers import LeftOut, Slot, left_out
from .model.checkpoint import Source
from .model.network import Model
from .outcome import LayerResult
from .progress import Track, no_track
from .recipe import Recipe
from .samples import Samples
from .save import Output
from .stream import Stream


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
    stream = Stream(model, windows_NL, alone=True, checkpoint=checkpoint)
    back = stream.back(loss=loss, checkpoint=checkpoint, track=track)
    for index, block in model.walk(checkpoint, back=True, track=track, what="gradients"):
        for window, found in back.advance(block):
            yield index, window, found


def prune_back(
    model: Model, recipe: Recipe, slots: list[list[Slot]], samples: Samples, out: Output | None, track: Track
) -> tuple[list[LayerResult], list[LeftOut]]:
    """Prune each block when its gradients have arrived. What became of each layer, and what is left out.

    All is made of the dense model. So a run that is resumed makes the gradients anew, and takes them through the dense
    weights of the blocks that are on disk already, which are the last ones.
    """
    steps = recipe.make_steps()
    stream = Stream(model, samples, alone=True, rounding=recipe.rounding, keep_zeros=recipe.keep_zeros)
    back = stream.back(track=track)
    last = len(model.blocks) - 1
    done = out.finished if out else []
    first = min(index for index, block in enumerate(slots) if any(slot.sparsity > 0 for slot in block))
    layers: list[LayerResult] = []
    left: list[LeftOut] = []
    for index, block in model.walk(back=True, track=track, what="pruning"):
        left[:0] = left_out(block.module, block.name)
        if index < first:  # all that comes before stays dense: no gradient has to get there
            layers[:0] = [LayerResult.dense(slot) for slot in slots[index]]
            continue
        if last - index < len(done):
            layers[:0] = done[last - index]
            back.skip(block)
            continue
        torch.manual_seed(recipe.seed + index)  # a resumed run draws what an uninterrupted one does
        result = back.prune(block, slots[index], steps, min_tokens=recipe.calibration.min_tokens)
        if out:
            with block.use(result.changed):
                out.write(result)
        if model.checkpoint is None:
            block.keep(result.changed)
        layers[:0] = result.layers
    return layers, left
