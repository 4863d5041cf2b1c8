"""`prunella.prune`: one run, or one that is healed."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import InputError
from .heal.rounds import ended, prune_and_heal
from .model.names import at_revision
from .progress import OnStep, Track, no_track
from .pruning import prune_once
from .recipe import Recipe
from .report import Report
from .samples import Samples
from .tasks import AUTO
from .tasks.module import Judge, Module
from .torch_prune import plain
from .workshop import check_output, finished


@torch.inference_mode(False)  # whatever the caller's mode: the stream changes weights, and some steps train
def prune(
    model: Any,
    recipe: Recipe | Mapping[str, Any] | None = None,
    *,
    output: str | Path | None = None,
    resume: bool = False,
    tokenizer: Any = None,
    revision: str | None = None,
    calibration: Tensor | Samples | Any = None,
    evaluate: Any = None,
    loss: Judge | None = None,
    score: Judge | None = None,
    remove: bool = False,
    shared: dict[Any, Any] | None = None,
    track: Track = no_track,
    watch: OnStep | None = None,
    remote_code: bool = False,
    pickles: bool = False,
) -> Report:
    """Prune a network in one shot and, if the recipe says so, heal it.

    Args:
        model: hub id, directory, .gguf file or built-in name, or what else the recipe's task opens; or a network in
            memory, which is pruned in place: a transformers model or any other module (task `module`).
        recipe: a `Recipe` or its plain data; its `model` gives way to the argument.
        output: directory for the result; it appears when it is whole. A name needs one, a model in memory
            does not.
        resume: continue the run that was interrupted while it wrote `output`, or begin it.
        tokenizer: of a model in memory, or in place of a named model's own: a tokenizer, or the directory or hub id
            of one; not needed if `calibration` is given, or no step reads text, and nothing is evaluated.
        revision: of a hub's model: a branch, tag or commit.
        calibration: samples in place of the recipe's: windows of token ids, (N, L), or what the task's networks take.
            Of any other module the batches that it is called with: a tensor, a tuple of positional arguments, a
            dictionary of keyword arguments; a list of these, or a DataLoader, whose pairs are inputs and targets.
        evaluate: of such a module, the batches to measure on; None: the calibration's.
        loss, score: of such a module, functions of its outputs and of the batch as it was handed over, which give their
            mean or one number a sample; of a score more is better. Without either the divergence from the dense
            network's outputs is measured.
        remove: a module under torch.nn.utils.prune is plain in the end; without it, it has new masks.
        shared: a dictionary in which runs on the same dense weights and the same calibration windows leave each
            other what they have in common: statistics of the dense model that allocations look at.
        track: wraps loops over blocks, `track(range, what, total)`, to show progress.
        watch: called after each step of healing, `watch(step, steps, loss)`.
        remote_code, pickles: trust code that comes with the model, weights that are pickles.

    Returns:
        The report, as it stands in prunella.json.

    Raises:
        PrunellaError: anything about the input that the user can mend. In a network in memory the blocks before the
            one that failed are pruned then.

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
    if in_memory and AUTO in recipe.task and not (evaluate is loss is score is None):
        recipe = Recipe.of({**recipe.plain(), "task": "module"})
    recipe = recipe.resolved(model)
    path = None if output is None else Path(output)
    if path is not None:
        done = finished(path)
        if recipe.heal.train:
            done = ended(path) or done
        if done and resume:
            return Report.read(path)
        check_output(path)
    options: dict[str, Any] = {"resume": resume, "tokenizer": tokenizer, "track": track}
    options |= {"remote_code": remote_code, "pickles": pickles}
    task = recipe.make_task()
    if in_memory and isinstance(task, Module) and isinstance(model, nn.Module):
        task.hold(model, calibration, loss, score, evaluate)
        calibration = task.held.get(False)
    elif not (evaluate is loss is score is None):
        raise InputError("evaluate, loss and score are of a module in memory (task 'module').")
    if not recipe.heal.train:
        options |= {"calibration": calibration, "shared": shared, "task": task}
        with plain(model, remove) if isinstance(model, nn.Module) else nullcontext():
            return prune_once(model, recipe, path, **options)
    if in_memory or path is None or calibration is not None:
        raise InputError("healing reads and writes directories: give the model by name, and its calibration as text.")
    return prune_and_heal(model, recipe, path, watch=watch, **options)
