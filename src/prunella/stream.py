"""Hidden states on their way through the blocks: the only watcher of activations, the only writer of pruned weights.

    for each block: its layers -> statistics -> steps -> pruned weights -> outputs, the next block's inputs

How a block is called is not hard-coded but recorded, see calls.py.
"""

from __future__ import annotations

import contextlib
import copy
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .backward import Back, Loss, goes_back
from .calls import Calls
from .compat import attention_of, version_of
from .errors import DefectError, InputError, NumericalError, StepError, say
from .examine import examine
from .grid import Grid, fit
from .hidden import Hidden, Shelf
from .histogram import histograms
from .layers import Slot, find_layers, unpruned, within
from .lenses import Chunks
from .machine import cache_directory, free_memory
from .model.checkpoint import Source
from .model.network import Model
from .model.walk import LoadedBlock, Weights
from .outcome import BlockResult, LayerResult, share_of
from .pattern import hold_zeros, pack
from .progress import Track, no_track
from .registry import Step, make
from .samples import Batch, Samples, size_of
from .standins import not_one_by_one
from .statistics.registry import taking
from .trees import first, map_tensors
from .types import Block, Layer, Stats
from .watch import SAMPLE, Gather, Stop, Watch, stats_of

TOKENS = 2048  # that go through a block at a time, in `block` order
NUMBERS = 1024  # of a picture or a sound that take the room of a token

Order = Literal["auto", "layer", "block", "back"]


class Stream:
    """Hidden states on their way through the blocks of a model.

    >>> stream = Stream(model, windows)                                        # doctest: +SKIP
    >>> for index, block in model.walk():                                      # doctest: +SKIP
    ...     result = stream.prune(block, slots[index], steps)

    `order` says from which inputs statistics are made. `block`: one pass through the dense block shows the
    inputs of all its layers, and a second pass through the pruned block makes the next block's inputs; what
    the reference codes of SparseGPT and Wanda do. `layer`: all windows go through the block together, each
    layer is pruned when its inputs arrive, and the pass goes on with the pruned weight; every layer sees
    what the pruned layers before it really produce, in half the passes, but the widest activation of all
    windows must fit in memory at once.

    `alone`: each window is a batch of its own, where `block` order would take several short ones together.
    `keep_zeros`: zeros that the weights come with stay zero, and count towards the sparsity (`hold_zeros`).
    `rounding`: bits and group of the grid to which pruned layers are rounded that no step has quantized; layers after
    them see what that does.
    `start`: the weights that the steps begin with, and `masks` theirs, where the model is pruned already; the blocks
    have the dense ones then, as always.
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
        self.order = order
        if order == "layer" and len(samples.groups) > 1:
            raise InputError(
                "the samples are of several shapes, which do not go through a layer together: use --order block."
            )
        with torch.no_grad(), model.outside(head=False, checkpoint=checkpoint):
            if model.interface is None:
                model.interface = examine(model, samples)
            alone = alone or (model.interface.stateful and order == "block")  # what travels cannot be cut into samples
            self.batches = tuple(
                batch
                for group in samples.groups
                for batch in Samples((group,)).batches(
                    len(samples) if order == "layer" else 1 if alone else max(1, TOKENS // tokens_of(group))
                )
            )
            self._places = [(b, n) for b, batch in enumerate(self.batches) for n in range(size_of(batch))]
            self._folder = model.scratch or cache_directory() / "hidden"
            self.calls = Calls(model, model.interface, self._shelf, len(samples))
            streams: list[Hidden] = []
            for index, batch in enumerate(self.batches):
                state, calls = self.calls.enter(batch)
                if not streams:
                    size = max(call.shape.numel() for call in calls) // size_of(batch) * state.element_size()
                    streams = [
                        Hidden(len(self.batches), model.device, Shelf(size * len(samples), model.device, self._folder))
                        for _ in range(1 + beside)
                    ]
                for hidden in streams:
                    hidden[index], hidden.calls[index] = state, list(calls)
        self.hidden = streams[0]
        self.dense = streams[1] if beside else None  # what the dense model has in place of `hidden`
        self.calls.batches = self.hidden.calls

    def _shelf(self, nbytes: int) -> Callable[[Any], Any]:
        return Shelf(nbytes, self.model.device, self._folder).put

    def advance(self, block: LoadedBlock, hidden: Hidden | None = None) -> None:
        """Run a block on all samples: its outputs become the hidden states (or those in `hidden`)."""
        hidden = self.hidden if hidden is None else hidden
        with torch.no_grad():
            for b in range(len(hidden)):
                self.forward(block, hidden, b)
        self.pass_on(block.index, hidden)

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

    def forward(self, block: LoadedBlock, hidden: Hidden, batch: int, *, keep: bool = True) -> Any:
        """Run a block on one batch of the hidden states, which move on if `keep` says so; what it puts out."""
        state = hidden[batch]
        version = version_of(state)
        out, beside = hidden.calls[batch][block.index].run(block.module, state, hidden.beside[batch])
        if version_of(state) != version:
            raise not_one_by_one(self.model.network, f"block {block.index} overwrites what it is given")
        if keep:
            hidden[batch] = out
            hidden.beside[batch] = {key: map_tensors(value, hidden.shelf.put) for key, value in beside.items()}
        return out

    def outputs(self, batch: int, **options: Any) -> Any:
        """What the model puts out for one batch, once the hidden states have passed the last block."""
        states = [*self.hidden.states(batch), self.hidden[batch]]
        return self.calls.outputs(self.batches[batch], states, **options)

    def fork(self, shelf: Shelf) -> Stream:
        """Another stream whose hidden states, the same as now, go on by themselves and wait on that shelf."""
        other = copy.copy(self)
        other.hidden = self.hidden.copy(shelf)
        return other

    def logits(self, batch: int) -> Tensor:
        """A language model's logits for one batch, once the hidden states have passed the last block."""
        logits: Tensor = self.outputs(batch).logits
        return logits

    def back(self, *, loss: Loss | None = None, checkpoint: Source | None = None, track: Track = no_track) -> Back:
        """Take all windows through all blocks, and the gradient of each one's loss the way back, see `Back`."""
        return Back(self, loss=loss, checkpoint=checkpoint, track=track)

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
        started = time.perf_counter()
        active = {slot.name: slot for slot in slots if slot.sparsity > 0}
        for slot in active.values():
            if not torch.isfinite(slot.read()).all():
                raise NumericalError(f"layer '{slot.name}' has NaN or infinite weights before pruning.")
        own = block.tensors()
        begin = {} if self.start is None else block.read(self.start)
        others: dict[str, Tensor] = {}
        with block.use({slot.key: own[slot.key].clone() for slot in active.values()}):
            if self.order == "layer":
                layers = self._prune_on_arrival(block, active, steps, min_tokens, begin)
                self.pass_on(block.index, self.hidden)
            else:
                layers, others = self._prune_after_dense_pass(block, active, steps, min_tokens, begin, known)
                if not last:
                    with block.use({**{k: v for k, v in begin.items() if k not in _keys(active)}, **others}):
                        self.advance(block)
            if self.dense is not None:
                self.pass_on(block.index, self.dense)
            results, masks, grids, changed = [], {}, {}, dict(others)
            for slot in slots:
                if slot.name not in layers:
                    results.append(LayerResult.dense(slot))
                    continue
                result, masks[slot.name], grid = layers[slot.name]
                results.append(result)
                if grid is not None:
                    grids[slot.name] = grid
                changed[slot.key] = slot.tensor
        seconds = time.perf_counter() - started
        return BlockResult(block.index, block.name, tuple(results), masks, grids, changed, seconds)

    def _layer(self, slot: Slot, stats: Stats, begin: Mapping[str, Tensor]) -> Layer:
        for value in stats.values.values():
            if value.ndim < 2 and not torch.isfinite(value).all():  # matrices would take long, and come with a norm
                raise NumericalError(
                    f"the inputs of layer '{slot.name}' hold NaN or infinity: the model overflows on the"
                    " calibration text; use --dtype float32 or bfloat16."
                )
        weight_OI = slot.read().contiguous()
        notes: tuple[str, ...] = ()
        if self.keep_zeros and (zeros := share_of(weight_OI == 0)) > slot.sparsity:
            notes = (f"came with {zeros:.1%} zeros, more than the {slot.sparsity:.1%} asked for: all stay",)
        layer = Layer(
            slot.name,
            weight_OI,
            weight_OI,
            stats,
            slot.sparsity,
            slot.pattern,
            bias_O=slot.bias(),
            notes=notes,
        )
        if slot.name in self.masks:
            mask_OI = self.masks[slot.name].to(weight_OI.device)
            return layer.pruned(slot.read(begin[slot.key]), mask_OI)
        return layer

    def _starved(self, layer: Layer, steps: Sequence[Step], min_tokens: int) -> bool:
        return any(step.needs for step in steps) and layer.stats.tokens < min_tokens

    def _apply(self, block: Block, steps: Sequence[Step], min_tokens: int) -> Block:
        """The steps, one after the other; magnitude for layers that saw too few tokens."""
        starved = {la.name: la for la in block.layers if self._starved(la, steps, min_tokens)}
        fed = replace(block, layers=tuple(la for la in block.layers if la.name not in starved))
        if fed.layers:
            for step in steps:
                allowed = {la.name: la.stats.only(step.needs) for la in fed.layers}
                kept = {la.name: la.stats for la in fed.layers}
                lent = tuple(replace(la, stats=allowed[la.name]) for la in fed.layers)
                fed = step.apply(replace(fed, layers=lent))
                fed = replace(fed, layers=tuple(replace(self._held(la), stats=kept[la.name]) for la in fed.layers))
        done = {la.name: la for la in fed.layers}
        for name, layer in starved.items():
            note = f"saw {layer.stats.tokens} tokens: pruned by magnitude"
            result = make("magnitude").apply(replace(block, layers=(layer,)))
            done[name] = replace(self._held(result.layers[0]), notes=(*layer.notes, note))
        return replace(fed, layers=tuple(self._rounded(done[la.name]) for la in block.layers))

    def _held(self, layer: Layer) -> Layer:
        return hold_zeros(layer) if self.keep_zeros else layer

    def _rounded(self, layer: Layer) -> Layer:
        if self.rounding is None or layer.grid is not None or layer.mask_OI is None:
            return layer
        grid = fit(layer.weight_OI, *self.rounding)
        return layer.pruned(grid.round(layer.weight_OI), layer.mask_OI, grid=grid)

    def _dense_inputs(
        self, block: LoadedBlock, active: Mapping[str, Slot], batch: int, needs: frozenset[str]
    ) -> dict[str, Chunks]:
        """What the layers of the block, still dense, get from the dense model's hidden states, which move on; of
        layers that share an input, the first. Experts are left out: other tokens may be routed to them."""
        inputs: dict[str, Chunks] = {}
        if self.dense is None:
            return inputs
        if not taking("dense_TI", needs):
            with torch.no_grad():
                self.forward(block, self.dense, batch)
            return inputs

        def see(layer_name: str, rows: Chunks, same: bool) -> None:
            if not same and not active[layer_name].routed:
                inputs[layer_name] = rows

        with torch.no_grad(), Watch(active, see):
            self.forward(block, self.dense, batch)
        return inputs

    def _prune_on_arrival(
        self,
        block: LoadedBlock,
        active: Mapping[str, Slot],
        steps: Sequence[Step],
        min_tokens: int,
        begin: Mapping[str, Tensor],
    ) -> dict[str, Settled]:
        needs = frozenset().union(*[step.needs for step in steps])
        done: dict[str, Settled] = {}
        stats = Stats()

        def see(layer_name: str, rows: Chunks, same: bool) -> None:
            nonlocal stats
            if layer_name in done:
                return
            if not same:
                stats = stats_of(rows, needs, SAMPLE, dense.pop(layer_name, None))
            layer = self._layer(active[layer_name], stats, begin)
            result = self._apply(Block(block.index, block.name, (layer,)), steps, min_tokens).layers[0]
            done[layer_name] = _settle(result, active[layer_name])

        dense = self._dense_inputs(block, active, 0, needs)
        with torch.no_grad(), Watch(active, see):
            self.forward(block, self.hidden, 0)
        _check_seen(block.name, done, active)
        for layer_name, slot in active.items():  # experts that no token reached
            if layer_name not in done:
                layer = self._layer(slot, Stats(), begin)
                result = self._apply(Block(block.index, block.name, (layer,)), steps, max(1, min_tokens)).layers[0]
                done[layer_name] = _settle(result, slot)
        return done

    def _prune_after_dense_pass(
        self,
        block: LoadedBlock,
        active: Mapping[str, Slot],
        steps: Sequence[Step],
        min_tokens: int,
        begin: Mapping[str, Tensor],
        known: dict[str, Stats] | None,
    ) -> tuple[dict[str, Settled], dict[str, Tensor]]:
        needs = frozenset().union(*[step.needs for step in steps])
        gather = Gather(needs)
        stats, leader = (gather.stats, gather.leader) if known is None else (known, {name: name for name in known})
        order: list[str] = []

        def see(layer_name: str, rows: Chunks, same: bool) -> None:
            gather.see(layer_name, rows, same)
            if gather.first and layer_name not in order:
                order.append(layer_name)
            # Nothing after the last layer is of interest, nor is its product, unless outputs are wanted.
            if not gather.first and whole and not keep_outputs and layer_name == order[-1]:
                raise Stop

        keep_outputs = "targets" in needs
        # The dense block's outputs are those on the pruned model's inputs where it does not run beside.
        same = self.dense is None or not taking("dense_TI", needs)
        outputs: list[Tensor] = []
        whole = False
        batches = range(0 if known is not None else len(self.hidden) if needs else 1)
        with torch.no_grad():
            for batch in batches:
                gather.first = batch == 0
                gather.dense = self._dense_inputs(block, active, batch, needs)
                with contextlib.suppress(Stop), Watch(active, see):
                    out = self.forward(block, self.hidden, batch, keep=False)
                    if keep_outputs and same:
                        outputs.append(out)
                whole = len(order) == len(active) and not any(slot.routed for slot in active.values())
        _check_seen(block.name, leader, active)
        if all(step.per_layer for step in steps):  # one layer at a time: its new weight and statistics can go
            done: dict[str, Settled] = {}
            waiting = [leader.get(layer_name, layer_name) for layer_name in active]
            for (layer_name, slot), source in zip(active.items(), tuple(waiting), strict=True):
                waiting.remove(source)
                found = stats.get(source, Stats()) if source in waiting else stats.pop(source, Stats())
                one = Block(block.index, block.name, (self._layer(slot, found, begin),))
                with torch.no_grad():
                    done[layer_name] = _settle(self._apply(one, steps, min_tokens).layers[0], slot)
            return done, {}
        layers = tuple(self._layer(t, stats.get(leader.get(n, n), Stats()), begin) for n, t in active.items())
        weights = {id(getattr(slot.module, slot.parameter)) for slot in active.values()}
        own = {within(block.name, key): p.data for key, p in block.module.named_parameters() if id(p) not in weights}
        beside: Any = self.dense
        whole_block = Block(
            block.index,
            block.name,
            layers,
            run=self._runner(block, active) if known is None else None,
            windows=len(self.samples) if known is None else 0,
            targets=(lambda n: self.window(n, outputs if same else beside)) if keep_outputs else None,
            dense=(lambda n: self.window(n, beside)) if "dense" in needs else None,
            others={key: begin.get(key, value) for key, value in own.items()},
            fixed=unpruned(block.module, block.name, _keys(active)),
        )
        with torch.no_grad():
            result = self._apply(whole_block, steps, min_tokens)
        changed = {key: value for key, value in result.others.items() if value is not whole_block.others[key]}
        return {la.name: _settle(la, active[la.name]) for la in result.layers}, changed

    def window(self, n: int, batches: Sequence[Any] | Hidden | None = None) -> Any:
        """The hidden state of sample n alone, or what another sequence of batches has for it."""
        batch, place = self._places[n]
        return self._one((self.hidden if batches is None else batches)[batch], place)

    def _one(self, state: Any, place: int) -> Any:
        """What a batch's state has for one of its samples."""
        return map_tensors(state, lambda tensor: tensor.narrow(self.calls.interface.batch, place, 1))

    def _record_windows(self, index: int) -> None:
        """See to it that it is known how the stack of block `index` is called on each sample alone."""
        while not self.calls.windows or len(self.calls.windows[0]) <= index:
            with self.model.outside(head=False, checkpoint=self.checkpoint):
                self.calls.record_windows(self.samples, self._left)

    def _left(self, n: int) -> list[Any]:
        """What left the stacks before the one whose calls are to be recorded, of sample n alone."""
        known = len(self.calls.windows[n]) if self.calls.windows else 0
        batch, place = self._places[n]
        passed = self.hidden.states(batch)[: sum(span.stop <= known for span in self.model.spans)]
        return [self._one(state, place) for state in passed]

    def _runner(self, block: LoadedBlock, active: Mapping[str, Slot]) -> Callable[..., Tensor]:
        """`Block.run`: the block on one window, with other weights in place of its own."""
        module = block.module
        prefix = block.name + "."

        def run(weights: Mapping[str, Tensor], n: int, at: str | None = None) -> Tensor:
            replaced: dict[str, Tensor] = {}
            parts: dict[str, dict[int, Tensor]] = {}  # of one parameter each, which is put together once
            for name, weight in weights.items():
                slot = active.get(name)
                if slot is None:
                    replaced[name.removeprefix(prefix)] = weight
                    continue
                parts.setdefault(slot.key, {})[slot.part or 0] = weight
            for slot in active.values():
                if slot.key in parts:
                    some = parts.pop(slot.key)
                    replaced[slot.key.removeprefix(prefix)] = slot.lens.put(slot.tensor, some)
            self._record_windows(block.index)
            beside = self.hidden.beside[self._places[n][0]]  # of this sample alone, if there is anything
            call = self.calls.windows[n][block.index]
            args, kwargs, _ = call.arguments(self.window(n), beside)
            out: Any = None

            def stop(module: nn.Module, inputs: Any, output: Any) -> None:
                nonlocal out
                out = output
                raise Stop

            watched = contextlib.nullcontext() if at is None else module.get_submodule(at).register_forward_hook(stop)
            with contextlib.suppress(Stop), watched:
                out = torch.func.functional_call(module, replaced, args, kwargs)
            result: Tensor = out if call.whole and at is None else first(out)
            return result

        return run


def _keys(active: Mapping[str, Slot]) -> set[str]:
    """The parameters that hold these layers."""
    return {slot.key for slot in active.values()}


def _check_seen(block: str, seen: Collection[str], active: Mapping[str, Slot]) -> None:
    """Raises DefectError for a layer of whose product nothing was seen; of a parameter with several matrices, such as
    the experts of a mixture, one is enough: the router need not pick them all."""
    reached = {active[name].key for name in seen}
    unseen = [name for name, slot in active.items() if slot.key not in reached]
    if unseen:
        short = dict.fromkeys(name.removeprefix(f"{block}.") for name in unseen)
        raise DefectError(
            f"layer '{unseen[0]}' was not seen at work while its block ran, so nothing is known of its inputs: leave it"
            f" out with {' '.join(f'--skip {name}' for name in short)}"
        )


Settled = tuple[LayerResult, Tensor, Grid | None]


def _settle(layer: Layer, slot: Slot) -> Settled:
    """Write the weight into the network; keep what the report needs, the mask as bits and the grid, nothing large and
    nothing on the device."""
    if layer.mask_OI is None:
        raise StepError(
            f"the steps chose no mask for layer '{layer.name}': the last one must end with layer.pruned(…)."
        )
    zero_OI = layer.dense_OI == 0
    result = LayerResult(
        layer.name,
        slot.shape,
        share_of(~layer.mask_OI | (zero_OI & (layer.weight_OI == 0))),
        slot.sparsity,
        str(slot.pattern),
        layer.error(),  # before the dense weight is overwritten: the two share their memory
        layer.stats.tokens,
        layer.notes,
        None if layer.grid is None else layer.grid.bits,
        histograms(layer.dense_OI, layer.weight_OI, layer.mask_OI),
        share_of(zero_OI),
    )
    slot.write(layer.weight_OI)
    return result, pack(layer.mask_OI), None if layer.grid is None else layer.grid.on(torch.device("cpu"))


ACTIVATIONS = 8 << 30  # bytes of them that `layer` order may hold at once where nobody chose it


def tokens_of(group: Batch) -> int:
    """How long a sample is, in tokens: an image or a sound takes as much room as so many."""
    return max(math.prod(t.shape[1:]) // (1 if not t.is_floating_point() else NUMBERS) for t in group.values()) or 1


def pick_order(
    order: Order, steps: Sequence[Step], samples: Samples | Tensor, model: Model
) -> Literal["layer", "block", "back"]:
    """`back` where a step reads gradients; `layer` where every step looks at one layer at a time and the activations of
    all windows are no more than `ACTIVATIONS`; else `block`. Nothing but sizes decides, so that a command gives the
    same masks whatever memory is free. Raises InputError where what was asked for cannot be."""
    if goes_back(order, steps, model.dtype):
        return "back"
    whole_block = [step.name for step in steps if not step.per_layer]
    if order == "layer" and whole_block:
        raise InputError(f"step '{whole_block[0]}' works on whole blocks: use --order block.")
    if order == "layer" or order == "block":
        return order
    if whole_block or not any(step.needs for step in steps):
        return "block"
    samples = Samples.of(samples)
    if not model.task.language or len(samples.groups) > 1:
        return "block"
    config, windows_NL = model.network.config.get_text_config(), samples.groups[0]["input_ids"]
    shapes = [s.shape for s in find_layers(model.module(model.blocks[0]), model.blocks[0])]
    widest = max((max(shape) for shape in shapes), default=0)
    tokens = windows_NL.numel()
    size = torch.empty(0, dtype=model.dtype).element_size()
    need = tokens * widest * size * 4 + tokens * widest * 4
    if any(taking("dense_TI", step.needs) for step in steps):
        need += tokens * widest * size * 3  # the dense model's inputs of all layers of a block
    if attention_of(config) == "eager":
        need += 3 * 4 * tokens * windows_NL.shape[1] * getattr(config, "num_attention_heads", 1)
    if need >= ACTIVATIONS:
        return "block"
    if need > (free := free_memory(model.device)):
        say(
            f"about {need / 1e9:.1f} GB of activations are held at once, and {free / 1e9:.1f} GB are free: if that is"
            " too little, --order block holds fewer (and gives other masks)"
        )
    return "layer"


def through(
    model: Model, samples: Samples | Tensor, *, checkpoint: Source | None = None, track: Track = no_track, what: str
) -> Stream:
    """A stream with no steps: all samples through all blocks, one block in memory at a time."""
    stream = Stream(model, samples, checkpoint=checkpoint)
    for _, block in model.walk(checkpoint, track=track, what=what):
        stream.advance(block)
    return stream
