"""load -> calibrate -> allocate -> stream[ block -> steps -> block ] -> evaluate -> save -> report."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from .allocate import Budget
from .back import prune_back
from .errors import InputError, PrunellaError, ReadError, kept
from .evaluate.measure import held_out, measure_once, whole_name
from .foreign import blamed
from .layers import LeftOut, Slot, left_out, matches, survey
from .lenses import wear
from .machine import fork_random, most_memory
from .model.checks import check_plain, check_saveable
from .model.names import at_revision, named
from .model.network import Model
from .outcome import LayerResult
from .overlap import joined
from .progress import Track, Watcher, no_track
from .recipe import Recipe
from .report import Report, peak_memory, seen
from .samples import Samples
from .save import Output, begun_as, identity
from .stream import TOKENS, Stream, pick_order, tokens_of
from .workshop import check_output, finished, workshop


@torch.inference_mode(False)  # whatever the caller's mode: the stream changes weights, and some steps train
def prune(
    model: Any,
    recipe: Recipe | Mapping[str, Any] | None = None,
    *,
    output: str | Path | None = None,
    resume: bool = False,
    tokenizer: Any = None,
    revision: str | None = None,
    calibration: Tensor | Samples | None = None,
    shared: dict[Any, Any] | None = None,
    track: Track = no_track,
    watch: Watcher | None = None,
    remote_code: bool = False,
    pickles: bool = False,
) -> Report:
    """Prune a network in one shot and, if the recipe says so, heal it.

    Args:
        model: hub id, directory, .gguf file or built-in name, or what else the recipe's task opens; or a network in
            memory, which is pruned in place: a transformers model or, for a task that says so, any other.
        recipe: a `Recipe` or its plain data; its `model` gives way to the argument.
        output: directory for the result; it appears when it is whole. A name needs one, a model in memory
            does not.
        resume: continue the run that was interrupted while it wrote `output`, or begin it.
        tokenizer: of a model in memory, or in place of a named model's own: a tokenizer, or the directory or hub id
            of one; not needed if `calibration` is given, or no step reads text, and nothing is evaluated.
        revision: of a hub's model: a branch, tag or commit.
        calibration: samples in place of the recipe's: windows of token ids, (N, L), or what the task's networks take.
        shared: a dictionary in which runs on the same dense weights and the same calibration windows leave each
            other what they have in common: statistics of the dense model that allocations look at.
        track: wraps loops over blocks, `track(range, what, total)`, to show progress.
        watch: called after each step of healing, `watch(step, steps, loss)`.
        remote_code, pickles: trust code that comes with the model, weights that are pickles.

    Returns:
        The report, as it stands in prunella.json.

    Raises:
        PrunellaError: anything about the input that the user can mend.

    >>> import prunella
    >>> report = prunella.prune("smollm2-135m", {"steps": ["wanda"]}, output="pruned")  # doctest: +SKIP
    """
    if recipe is None or not isinstance(recipe, Recipe):
        recipe = Recipe.of(recipe or {})
    in_memory = not isinstance(model, str | Path)
    if output is None and not in_memory:
        raise InputError("a model given by name needs an output directory (-o).")
    if in_memory and isinstance(tokenizer, str | Path):
        raise InputError(f"the tokenizer of a model in memory is an object, not a name ('{tokenizer}').")
    if not in_memory:
        model = at_revision(str(model), revision)
    path = None if output is None else Path(output)
    if path is not None:
        done = finished(path)
        if recipe.heal.train:
            from .heal.rounds import ended

            done = ended(path) or done
        if done and resume:
            return Report.read(path)
        check_output(path)
    task = recipe.make_task()
    if recipe.heal.train:
        if not task.language:
            raise InputError(f"healing trains causal language models only, yet: leave it out for task '{task.name}'.")
        if in_memory or path is None or calibration is not None:
            raise InputError(
                "healing reads and writes directories: give the model by name, and its calibration as text."
            )
        from .heal.rounds import prune_and_heal

        return prune_and_heal(
            prune,
            model,
            recipe,
            path,
            tokenizer=tokenizer,
            resume=resume,
            track=track,
            watch=watch,
            remote_code=remote_code,
            pickles=pickles,
        )
    if not in_memory:
        trust = {"remote_code": remote_code, "pickles": pickles}
        with blamed(type(task), f"task '{task.name}'"):
            opened = task.open(model, dtype=recipe.dtype, device=recipe.device, tokenizer=tokenizer, **trust)
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
        names = [name.rpartition(":")[2] for name in (opened.task.name, task.name)]  # of a file's it is the last part
        if names[0] != names[1]:
            raise InputError(f"the model is opened for task '{opened.task.name}', not for the recipe's '{task.name}'.")
        if any(parameter.is_inference() for parameter in opened.network.parameters()):
            raise InputError(
                "the model was made under torch.inference_mode, and its weights can never change: load it under"
                " torch.no_grad instead, or give its directory."
            )
    scratch = opened.scratch
    try:
        with fork_random(opened.device):
            return _prune(opened, recipe, path, resume, calibration, {} if shared is None else shared, track)
    finally:
        if opened is not model:
            opened.give_back()
        opened.scratch = scratch


def _prune(
    opened: Model,
    recipe: Recipe,
    path: Path | None,
    resume: bool,
    calibration: Tensor | Samples | None,
    shared: dict[Any, Any],
    track: Track,
) -> Report:
    started, cpu = time.perf_counter(), time.process_time()
    torch.manual_seed(recipe.seed)
    steps = recipe.make_steps()
    allocation = recipe.make_allocation()
    wear(map(opened.module, opened.blocks), recipe.lenses)
    slots = choose_slots(opened, recipe)
    task, wanted = opened.task, recipe.calibration
    if recipe.format == "packed" and not hasattr(opened.network, "save_pretrained"):
        kind = type(opened.network).__name__
        raise InputError(f"packed files are of transformers models, and a {kind} is none: leave --format packed out.")
    with blamed(type(task), f"task '{task.name}'"):
        samples, blind = _calibration(opened, recipe, calibration)
        task.check(opened, samples)
        measured = held_out(opened, recipe, task.size(samples))
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
                "order": order,
                "dtype": str(opened.dtype).removeprefix("torch."),
                "device": str(opened.device),
                "calibration": wanted
                if blind
                else wanted.model_copy(
                    update={
                        "source": whole_name(wanted.source),
                        "samples": len(samples),
                        **task.about(samples),
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
        dense = measure_once(out, "dense", opened, recipe, measured, None, track)
        seconds["dense evaluation"] = time.perf_counter() - clock
        clock = time.perf_counter()
        shares = out.notes.get("shares") if out else None
        if shares is None:
            free = free_layers(slots, recipe)
            shares = allocation(Budget(opened, samples, slots, free, recipe.default_sparsity, shared, track))
            if out and "uniform" not in recipe.allocate:  # which takes no work
                out.note("shares", shares)
        slots = [[replace(s, sparsity=shares.get(s.name, s.sparsity)) for s in block] for block in slots]
        seconds["allocate"] = time.perf_counter() - clock
        clock = time.perf_counter()
        layers, left = (prune_back if order == "back" else _run)(opened, recipe, slots, samples, out, track)
        if blind:
            layers = [replace(layer, error=None, tokens=0) for layer in layers]
        seconds["prune"] = time.perf_counter() - clock
        if out:
            out.complete()
        clock = time.perf_counter()
        written = out.checkpoint if out else None
        pruned = measure_once(out, "pruned", opened, recipe, measured, written if opened.checkpoint else None, track)
        seconds["pruned evaluation"] = time.perf_counter() - clock
        seconds["all"] = time.perf_counter() - started
        if written:
            dense |= {"bytes": opened.parameters * opened.dtype.itemsize}
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
            },
            fingerprint="" if blind else joined(task.fingerprint(samples), known),
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
            recipe.shape.check(slot.shape, slot.name)
        return replace(slot, sparsity=sparsity, pattern=recipe.shape)

    return [[goal(slot) for slot in slots] for slots, _ in found]


def reads_samples(recipe: Recipe) -> bool:
    """Does pruning look at the calibration samples, beyond measuring what it did to it?"""
    spread = any(name != "uniform" for name in recipe.allocate)
    return spread or recipe.calibration.source == "self" or any(step.needs for step in recipe.make_steps())


def free_layers(slots: list[list[Slot]], recipe: Recipe) -> frozenset[str]:
    """The layers that an allocation decides on: those for which the recipe has no word of its own."""
    fixed = [*recipe.skip, *(glob for glob in recipe.sparsity if glob != "*")]
    names = [slot.name for block in slots for slot in block if slot.sparsity > 0]
    return frozenset(name for name in names if not any(matches(name, glob) for glob in fixed))


def _run(
    model: Model, recipe: Recipe, slots: list[list[Slot]], samples: Samples, out: Output | None, track: Track
) -> tuple[list[LayerResult], list[LeftOut]]:
    """Stream the calibration windows through the blocks, pruning each; blocks that an interrupted run left on
    disk are only passed through. What became of each layer, and what is left out."""
    steps = recipe.make_steps()
    order: Literal["layer", "block"] = "layer" if recipe.order == "layer" else "block"
    if order == "block" and not any(step.needs for step in steps):  # errors are measured on the first batch alone
        samples = samples.first(max(1, TOKENS // tokens_of(samples.groups[0])))
    beside = any(step.beside for step in steps)
    stream = Stream(model, samples, order=order, beside=beside, rounding=recipe.rounding, keep_zeros=recipe.keep_zeros)
    layers: list[LayerResult] = []
    left: list[LeftOut] = []
    done = out.finished if out else []
    written = out.checkpoint if out and done else None
    last = max(index for index, block in enumerate(slots) if any(slot.sparsity > 0 for slot in block))
    for index, block in model.walk(track=track, what="pruning"):
        if index > last:  # all that follows stays dense: nothing has to flow through it
            layers += [LayerResult.dense(slot) for slot in slots[index]]
            left += left_out(block.module, block.name)
            continue
        if index < len(done):
            layers += done[index]
            assert written is not None
            with block.use(written):
                left += left_out(block.module, block.name)
                if index < last:
                    stream.advance(block)
            if index < last and stream.dense is not None:
                stream.advance(block, stream.dense)
            continue
        torch.manual_seed(recipe.seed + index)  # a resumed run draws what an uninterrupted one does
        left += left_out(block.module, block.name)
        result = stream.prune(block, slots[index], steps, min_tokens=recipe.calibration.min_tokens, last=index == last)
        if out:
            with block.use(result.changed):
                out.write(result)
        if model.checkpoint is None:
            block.keep(result.changed)
        layers += result.layers
    return layers, left
