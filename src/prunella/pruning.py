"""One run: load -> calibrate -> allocate -> stream[ block -> steps -> block ] -> evaluate -> save -> report."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .allocate import Budget
from .backward import Back
from .errors import InputError, PrunellaError, ReadError, kept
from .evaluate.measure import measure_once, whole_name
from .foreign import blamed
from .layers import LeftOut, Slot, left_out, matches, survey
from .lenses import wear
from .machine import at_a_time, fork_random, most_memory
from .model.checks import check_plain, check_saveable
from .model.names import named
from .model.network import Model
from .model.task import Answers
from .norms import BatchNorms, batch_norms
from .order import pick_order
from .outcome import BlockResult, LayerResult
from .overlap import joined
from .progress import Track, no_track
from .recipe import Recipe
from .report import Report, anatomy, buffer_bytes, peak_memory, seen
from .samples import Samples, tokens_of
from .save import Output, begun_as, identity
from .store import check_store
from .stream import TOKENS, Stream
from .tasks import Task
from .tasks import opened as open_for
from .tasks.augment import augmented
from .texts import same_text
from .unlabelled import targeted
from .workshop import workshop

OnBlock = Callable[[BlockResult], None]


def prune_once(
    model: Any,
    recipe: Recipe,
    path: Path | None = None,
    *,
    resume: bool = False,
    tokenizer: Any = None,
    calibration: Tensor | Samples | None = None,
    shared: dict[Any, Any] | None = None,
    task: Task | None = None,
    track: Track = no_track,
    on_block: OnBlock | None = None,
    remote_code: bool = False,
    pickles: bool = False,
) -> Report:
    """What `prunella.prune` does, with these arguments, where nothing is healed; `path` is the directory for the
    result, which can be written. `on_block` is called with each pruned block. `task` stands for the recipe's, where it
    holds what no recipe says."""
    recipe = recipe.resolved(model)
    task = task or recipe.make_task()
    if isinstance(model, str):
        trust = {"remote_code": remote_code, "pickles": pickles}
        opened = open_for(task, model, dtype=recipe.dtype, device=recipe.device, tokenizer=tokenizer, **trust)
        for key, got in {"dtype": str(opened.dtype)[6:], "device": opened.device.type}.items():
            if (asked := getattr(recipe, key).partition(":")[0]) not in ("auto", got):
                raise InputError(
                    f"task '{task.name}' opens '{model}' with {key} {got}, not {asked}: leave --{key} out."
                )
        if resume and opened.checkpoint is None:
            raise InputError(f"a model that task '{task.name}' opens is pruned in memory, and cannot be resumed.")
    else:
        if resume:
            raise InputError("a model in memory cannot be resumed: give its directory instead.")
        network = model.network if isinstance(model, Model) else model
        check_plain(network)
        if path is not None:
            check_saveable(network)
        opened = model if isinstance(model, Model) else task.wrap(model, tokenizer)
    scratch = opened.scratch
    try:
        if not isinstance(model, str):
            _check_opened(opened, task)
        with fork_random(opened.device):
            return _prune(opened, recipe, path, resume, calibration, {} if shared is None else shared, track, on_block)
    finally:
        if opened is not model:
            opened.give_back()
        opened.scratch = scratch


def _check_opened(opened: Model, task: Task) -> None:
    """Raises InputError for a model that is opened for another task, or whose weights can never change."""
    names = [name.rpartition(":")[2] for name in (opened.task.name, task.name)]  # of a file's it is the last part
    if names[0] != names[1]:
        raise InputError(f"the model is opened for task '{opened.task.name}', not for the recipe's '{task.name}'.")
    if any(parameter.is_inference() for parameter in opened.network.parameters()):
        raise InputError(
            "the model was made under torch.inference_mode, and its weights can never change: load it under"
            " torch.no_grad instead, or give its directory."
        )


def _prune(
    opened: Model,
    recipe: Recipe,
    path: Path | None,
    resume: bool,
    calibration: Tensor | Samples | None,
    shared: dict[Any, Any],
    track: Track,
    on_block: OnBlock | None,
) -> Report:
    started, cpu = time.perf_counter(), time.process_time()
    torch.manual_seed(recipe.seed)
    steps = recipe.make_steps()
    allocation = recipe.make_allocation()
    wear(map(opened.module, opened.blocks), recipe.lenses)
    slots = choose_slots(opened, recipe)
    task, wanted, source = opened.task, recipe.calibration, recipe.evaluate.source
    check_store(recipe.format, opened)
    normed = bool(batch_norms(opened.network))
    if not normed and set(recipe.batch_norm) - {"auto", "keep"}:
        raise InputError(f"batch_norm: '{opened.name}' has no batch norms: leave it out.")
    with blamed(type(task), f"task '{task.name}'"):
        samples, blind = _calibration(opened, recipe, calibration)
        task.check(opened, samples)
        measured = held_out(opened, recipe, task.size(samples))
    given = samples
    if wanted.augment and not blind:
        samples = augmented(task, samples, recipe.seed)
    shop = None if path is None else workshop(path, resume)
    out = None
    seconds: dict[str, float] = {}
    try:
        begun = begun_as(shop) if shop else None
        wanted_order = begun.get("order", "auto") if begun and recipe.order == "auto" else recipe.order
        order = pick_order(wanted_order, steps, samples, opened)
        recipe = recipe.model_copy(
            update={
                "model": opened.name,
                "task": {name: {**options, **task.settings()} for name, options in recipe.task.items()},
                "order": order,
                "dtype": str(opened.dtype).removeprefix("torch."),
                "device": str(opened.device),
                "calibration": wanted
                if blind
                else wanted.model_copy(
                    update={
                        "source": whole_name(wanted.source),
                        "samples": len(given),
                        **task.about(given),
                    }
                ),
            }
        )
        active = [slot for block in slots for slot in block if slot.sparsity > 0]
        if not active:
            raise InputError("nothing is left to prune: every layer is skipped or has sparsity 0.")
        if path is not None and shop is not None:
            run = identity(opened.checkpoint, recipe.plain(), samples.tensors)
            out = Output(path, opened, active, run, shop, recipe.make_store())
            opened.scratch = shop.directory
        clock = time.perf_counter()
        if measured is not None:
            measured = targeted(opened, measured, track=track)
        if order == "back" or recipe.spreads:  # these look at losses
            samples = targeted(opened, samples, track=track)
        answers: dict[str, Answers] = {}
        dense = measure_once(out, "dense", opened, source, measured, None, track, answers)
        seconds["dense evaluation"] = time.perf_counter() - clock
        clock = time.perf_counter()
        shares = out.notes.get("shares") if out else None
        if shares is None:
            free = free_layers(slots, recipe)
            shares = allocation(Budget(opened, samples, slots, free, recipe.default_sparsity, shared, track))
            if out and recipe.spreads:  # else it took no work
                out.note("shares", shares)
        slots = [[replace(s, sparsity=shares.get(s.name, s.sparsity)) for s in block] for block in slots]
        seconds["allocate"] = time.perf_counter() - clock
        clock = time.perf_counter()
        norms = _norms(opened, recipe, samples, track) if normed and not blind else None
        layers, left = _blocks(opened, recipe, slots, samples, norms, out, track, on_block)
        if blind:
            layers = [replace(layer, error=None, tokens=0) for layer in layers]
        seconds["prune"] = time.perf_counter() - clock
        if out and opened.checkpoint is not None:
            out.complete()
        estimated = norms.settle(out) if norms else {}
        if out and opened.checkpoint is None:
            out.complete()
        clock = time.perf_counter()
        written = out.checkpoint if out else None
        there = written if opened.checkpoint else None
        pruned = measure_once(out, "pruned", opened, source, measured, there, track, answers)
        seconds["pruned evaluation"] = time.perf_counter() - clock
        seconds["all"] = time.perf_counter() - started
        if written:
            dense |= {"bytes": opened.parameters * opened.dtype.itemsize + buffer_bytes(opened)}
            pruned |= {"bytes": written.nbytes}
        known = seen(opened.checkpoint.directory) if opened.checkpoint else ""
        report = Report(
            recipe=recipe.plain(),
            model={
                **named(opened.name),
                "class": type(opened.network).__name__,
                "dtype": str(opened.dtype).removeprefix("torch."),
                "parameters": opened.parameters,
                "prunable": sum(slot.shape[0] * slot.shape[1] for block in slots for slot in block),
                **({} if task.language else anatomy(opened)),
            },
            dense=dense,
            pruned=pruned,
            layers=tuple(layers),
            left_out=tuple(left),
            run={
                "seconds": seconds,
                "cpu_seconds": time.process_time() - cpu,
                "peak_memory": peak_memory(),
                "gpu_memory": most_memory(opened.device),
                "threads": torch.get_num_threads(),
                "resumed_after_blocks": len(out.finished) if out else 0,
                "handed_over": calibration is not None,
            },
            fingerprint="" if blind else joined(task.fingerprint(samples), known),
            batch_norm=estimated,
        )
        if out:
            out.finish(report.plain(), report.card())
        return report
    except BaseException as error:
        done = out is not None and (out.blocks > 0 or isinstance(error, ReadError))
        if out and (opened.checkpoint is None or (isinstance(error, PrunellaError) and not done)):
            out.discard()  # a model in memory cannot be resumed
        elif out and done and isinstance(error, PrunellaError):
            kept(error, out.partial)
        raise
    finally:
        if out:
            out.close()
        elif shop:
            shop.close()


def _calibration(model: Model, recipe: Recipe, given: Tensor | Samples | None) -> tuple[Samples, bool]:
    """What statistics are made from, and whether nobody looks at it."""
    task, wanted = model.task, recipe.calibration
    if isinstance(given, Tensor):
        return Samples(({task.argument: given},)), False
    if given is not None:
        return Samples.of(given), False
    if not task.reads(model) and not reads_samples(recipe):  # something has to pass through the blocks
        return Samples.of(task.example(model.network)), True
    own = recipe.make_task(wanted.length)
    return own.samples(model, wanted.source, wanted.samples, seed=recipe.seed), False


def _norms(model: Model, recipe: Recipe, samples: Samples, track: Track) -> BatchNorms | None:
    """The batch norms of a network that has some, dense yet, if anything is to become of them."""
    ways = recipe.make_ways()
    choose = "auto" in recipe.batch_norm
    return BatchNorms(model, samples, ways, choose=choose, seed=recipe.seed, track=track) if ways else None


def held_out(model: Model, recipe: Recipe, used: int) -> Samples | None:
    """The samples to evaluate on: none of the calibration's, which took at most `used` of its source (`Task.size`)."""
    recipe = recipe.resolved(model)
    wanted = recipe.evaluate
    if wanted.source is None or not model.task.reads(model):
        return None
    skip = used if same_text(recipe.calibration.source, wanted.source) else 0
    task = recipe.make_task(wanted.length)
    found = task.samples(model, wanted.source, wanted.windows, used=skip, seed=recipe.seed, test=True)
    task.check(model, found)
    return found


def choose_slots(model: Model, recipe: Recipe) -> list[list[Slot]]:
    """For each block its layers with their sparsities, before any allocation. Raises InputError for a pattern
    that does not divide a layer's shape and for name patterns that match no layer."""
    found = [survey(model.module(name), name) for name in model.blocks]
    flat = [slot for slots, _ in found for slot in slots]
    if not flat:
        raise InputError(f"no layer that can be pruned was found in '{model.name}'.")
    for glob in (*recipe.skip, *recipe.sparsity):
        if any(matches(slot.name, glob) for slot in flat):
            continue
        names = [(item.name.removesuffix(".weight"), item.why) for _, left in found for item in left]
        why = next((f": '{name}' stays dense by itself ({why})" for name, why in names if matches(name, glob)), "")
        raise InputError(f"'{glob}' matches no layer{why}; names look like '{flat[0].name}'. See prunella inspect.")

    def goal(slot: Slot) -> Slot:
        sparsity = recipe.default_sparsity
        for glob, share in recipe.sparsity.items():
            if glob != "*" and matches(slot.name, glob):
                sparsity = share
        if any(matches(slot.name, glob) for glob in recipe.skip):
            sparsity = 0.0
        if sparsity > 0:
            recipe.shape.check(slot.shape, slot.name, slot.channels)
        return replace(slot, sparsity=sparsity, pattern=recipe.shape)

    return [[goal(slot) for slot in slots] for slots, _ in found]


def reads_samples(recipe: Recipe) -> bool:
    """Does pruning look at the calibration samples, beyond measuring what it did to it?"""
    norms = bool(set(recipe.batch_norm) - {"auto", "keep"})
    return (
        norms
        or recipe.spreads
        or recipe.calibration.source == "self"
        or any(step.needs for step in recipe.make_steps())
    )


def free_layers(slots: list[list[Slot]], recipe: Recipe) -> frozenset[str]:
    """The layers that an allocation decides on: those for which the recipe has no word of its own."""
    fixed = [*recipe.skip, *(glob for glob in recipe.sparsity if glob != "*")]
    names = [slot.name for block in slots for slot in block if slot.sparsity > 0]
    return frozenset(name for name in names if not any(matches(name, glob) for glob in fixed))


def _blocks(
    model: Model,
    recipe: Recipe,
    slots: list[list[Slot]],
    samples: Samples,
    norms: BatchNorms | None,
    out: Output | None,
    track: Track,
    on_block: OnBlock | None,
) -> tuple[list[LayerResult], list[LeftOut]]:
    """Prune each block: on the way forward when the calibration samples have come to it, on the way back when its
    gradients have. What became of each layer, and what is left out.

    A run that is resumed takes the samples through the pruned weights of the blocks that are on disk already. On the
    way back it makes the gradients anew, and takes them through these blocks' dense weights.
    """
    steps = recipe.make_steps()
    goes_back = recipe.order == "back"
    if recipe.order == "block" and not any(step.needs for step in steps):  # errors are measured on the first batch
        samples = samples.first(max(1, at_a_time(TOKENS, model.device) // tokens_of(samples.groups[0])))
    stream = Stream(
        model,
        samples,
        order="layer" if recipe.order == "layer" else "block",
        alone=goes_back,
        beside=any(step.beside for step in steps),
        rounding=recipe.rounding,
        keep_zeros=recipe.keep_zeros,
    )
    back = Back(stream, track=track) if goes_back else None
    done = out.finished if out else []
    written = out.checkpoint if out and done else None
    last = max(n for n, block in enumerate(slots[::-1] if back else slots) if any(slot.sparsity > 0 for slot in block))
    if recipe.order != "block" or stream.dense is not None or not any(step.needs for step in steps):
        norms = None  # no block is pruned by what those before it make, or they are fitted to the dense network's
    layers: dict[int, Sequence[LayerResult]] = {}
    left: dict[int, list[LeftOut]] = {}
    for n, (index, block) in enumerate(model.walk(back=goes_back, track=track, what="pruning")):
        left[index] = left_out(block.module, block.name)
        if n > last:  # all that follows stays dense: nothing has to get there
            layers[index] = LayerResult.dense(slots[index])
            continue
        if n < len(done):
            layers[index] = done[n]
            if back:
                back.skip(block)
            elif written is not None and n < last and norms:
                norms.advance(stream, block, written)
            elif written is not None and n < last:
                stream.skip(block, written)
            continue
        torch.manual_seed(recipe.seed + index)  # a resumed run draws what an uninterrupted one does
        least = recipe.calibration.min_tokens
        if back:
            result = back.prune(block, slots[index], steps, min_tokens=least)
        else:
            result = stream.prune(block, slots[index], steps, min_tokens=least, last=n == last or norms is not None)
            if norms and n < last:
                norms.advance(stream, block, result.changed)
        if out:
            with block.use(result.changed):
                out.write(result)
        if model.checkpoint is None:
            block.keep(result.changed)
        if on_block is not None:
            on_block(result)
        layers[index] = result.layers
    blocks = range(len(slots))
    return [la for index in blocks for la in layers[index]], [item for index in blocks for item in left[index]]
