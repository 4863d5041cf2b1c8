"""A sweep: one model pruned in every combination of some choices.

The cells of a sweep share all that does not depend on the cell: the process, the samples to calibrate and to measure
on, the dense weights in memory, how good they are, and the statistics of the dense model that allocations look at.
Each finished cell is a line of a JSON Lines file; a sweep that was killed goes on after the last whole line.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import itertools
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from .calibrate import with_bos
from .errors import InputError, PrunellaError, unknown
from .evaluate.measure import scored
from .evaluate.perplexity import answered
from .foreign import blamed
from .machine import free_memory
from .model.network import Model
from .model.task import NO_ANSWERS, Answers
from .outcome import LayerResult, mean
from .progress import Track, no_track
from .prune import prune
from .pruning import held_out
from .recipe import Evaluation, Recipe, only_dense, override
from .report.results import Results, figure_of
from .rows import Key, Row, Rows
from .samples import Samples
from .sparse.bench import bench
from .sparse.format import SPAN, expected
from .tasks import open_model
from .tasks import opened as open_for
from .texts import same_text
from .unlabelled import targeted

DENSE: Key = ("dense", "")
# Recipe keys that all cells have in common
SHARED = ("model", "task", "calibration", "bos", "evaluate", "dtype", "device")


@dataclass(frozen=True)
class Cell:
    """One run of a sweep, known by its `method` and `cell`: its row and its column in tables."""

    method: str
    cell: str
    recipe: Mapping[str, Any]

    @property
    def key(self) -> Key:
        return self.method, self.cell

    @property
    def label(self) -> str:
        return f"{self.method}, {self.cell}"


# ---------------------------------------------------------------------------------------------------------
# The cells


def cells_of(base: Mapping[str, Any], choices: Mapping[str, Sequence[Any]]) -> list[Cell]:
    """Every combination of the values of some recipe keys, in place of the base recipe's.

    An N:M pattern fixes sparsity and leaves nothing to allocate, so that combinations which differ in no more than
    that are one cell. Raises InputError for a key that cells cannot differ in and for values no recipe takes.

    >>> [cell.label for cell in cells_of({}, {"steps": ["wanda", "ria"], "sparsity": [0.5, 0.6]})]
    ['wanda, 50%', 'ria, 50%', 'wanda, 60%', 'ria, 60%']
    """
    known = [key for key in Recipe.model_fields if key not in SHARED]
    for key, values in choices.items():
        if key not in known:
            raise InputError(unknown("key of the grid", key, known))
        if not isinstance(values, list | tuple) or not values:
            raise InputError(f"grid key '{key}': {values!r} should be a list of values.")
    cells: dict[Key, Cell] = {}
    keys = sorted(choices, key=("pattern", "sparsity", "steps", "allocate", *known).index)  # column by column
    for values in itertools.product(*(choices[key] for key in keys)):
        chosen = dict(zip(keys, values, strict=True))
        wanted = {**base, **chosen}
        if isinstance(chosen.get("sparsity"), int | float):
            before = base.get("sparsity") or {}
            wanted["sparsity"] = {**(before if isinstance(before, Mapping) else {}), "*": chosen["sparsity"]}
        if ":" in str(wanted.get("pattern", "")):
            wanted["sparsity"] = only_dense(wanted.get("sparsity"))
            wanted.pop("allocate", None)
        cell = _cell(Recipe.of(wanted), [key for key in chosen if key not in _NAMED])
        cells.setdefault(cell.key, cell)
    return list(cells.values())


def complete_plan(
    plan: Mapping[str, Any], flags: Mapping[str, Sequence[Any]], lists: Sequence[str], settings: Sequence[str]
) -> dict[str, Any]:
    """A plan with what a command line adds to it: choices for recipe keys, as they are or as `KEY=[VALUE, ...]`, and
    settings of the recipe that all cells start from. Raises InputError."""
    axes = dict(plan.get("grid") or {}) | dict(flags)
    for item in lists:
        key, _, text = item.partition("=")
        try:
            axes[key] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise InputError(f"--grid {item}: '{text}' is not a YAML list.") from None
    base = {key: value for key, value in plan.items() if key != "grid"}
    return {**(override(base, settings) if settings else base), "grid": axes}


_NAMED = ("steps", "allocate", "sparsity", "pattern", "heal")  # keys that names of cells have words for


def _cell(recipe: Recipe, others: Sequence[str]) -> Cell:
    plain = recipe.plain()

    def words(part: Mapping[str, Mapping[str, Any]]) -> str:
        (name, options), *_ = part.items()
        chosen = ", ".join(f"{key}={value}" for key, value in options.items())
        return f"{name}({chosen})" if options else name

    method = " + ".join(words(step) for step in plain["steps"])
    if plain["allocate"] != {"uniform": {}}:
        method = f"{words(plain['allocate'])}, {method}"
    heal, usual = plain["heal"], Recipe.of({"task": plain["task"]}).plain()["heal"]
    if heal["train"]:
        chosen = [f"{key}={value}" for key, value in heal.items() if key != "train" and value != usual[key]]
        method += f", healed by {' + '.join(map(words, heal['train']))}" + (f" ({', '.join(chosen)})" if chosen else "")
    for key in others:
        method += f", {key}={plain[key] if isinstance(plain[key], str | int | float) else json.dumps(plain[key])}"
    if recipe.shape.sparsity is not None:
        return Cell(method, recipe.pattern, plain)
    shares = [f"{100 * recipe.default_sparsity:.6g}%"]
    shares += [f"{name} {100 * share:.6g}%" for name, share in recipe.sparsity.items() if name != "*"]
    if recipe.pattern != "unstructured":
        shares.insert(0, recipe.pattern)
    return Cell(method, " ".join(shares), plain)


# ---------------------------------------------------------------------------------------------------------
# The sweep


@dataclass(eq=False)
class Sweep:
    """Runs of one model on the same samples.

    model:       a model that was opened by name
    calibration: its calibration samples
    held_out:    the samples to measure on, {source: samples}
    rows:        where finished cells are and go
    speed:       measure how fast each cell decodes when it is packed, too
    tokenizer, trust: as for `open_model`, where a cell has to open the model again; `trust` is remote_code and pickles
    """

    model: Model
    calibration: Samples
    held_out: dict[str, Samples]
    rows: Rows
    speed: bool = False
    tokenizer: str | None = None
    trust: Mapping[str, Any] = field(default_factory=dict)
    _shared: dict[Any, Any] = field(default_factory=dict)
    _dense: dict[str, Answers] = field(default_factory=dict)  # what the dense network answers

    def run(
        self, cells: Sequence[Cell], *, say: Callable[[str], None] = lambda message: None, track: Track = no_track
    ) -> dict[Key, Row]:
        """Make the cells that are not in the file yet; all their rows, and the dense one, in order.

        A cell that fails leaves a row with `failed`, the reason, and is tried again by the next run; the others are
        not held up.
        """
        missing = [cell for cell in cells if not self._have(cell.key)]
        with contextlib.ExitStack() as stack:
            if missing or DENSE not in self.rows.rows:
                stack.enter_context(self.rows.open())
                network = stack.enter_context(self._dense_weights())
            if DENSE not in self.rows.rows or (missing and not self.model.task.language):  # cells are set beside it
                model = self.model if network is None else self._wrapped(network)
                size = model.parameters * model.dtype.itemsize
                self.held_out = {name: targeted(model, some, track=track) for name, some in self.held_out.items()}
                found_dense = self._measure(model, track, self._dense)
                if DENSE not in self.rows.rows:
                    self.rows.add(DENSE, {**found_dense, "size": size})
            for number, cell in enumerate(missing, 1):
                try:
                    row = self._make(cell, network, track)
                    found = ", ".join(str(figure_of(row, name)) for name in self.held_out)
                except Exception as error:  # of a method, maybe not ours: the rest goes on
                    reason = str(error) if isinstance(error, PrunellaError) else f"{type(error).__name__}: {error}"
                    row = {"failed": " ".join(reason.split())}
                    found = f"failed: {row['failed']}"
                self.rows.add(cell.key, row)
                say(f"{number} of {len(missing)}: {cell.label}: {found}")
        return {key: self.rows.rows[key] for key in (DENSE, *(cell.key for cell in cells))}

    def _have(self, key: Key) -> bool:
        row = self.rows.rows.get(key)
        return row is not None and "failed" not in row and ("speed" in row or not self.speed)

    @contextlib.contextmanager
    def _dense_weights(self) -> Iterator[Any]:
        """The dense network, or None where two of it do not fit into memory: then cells are read from its files and
        written to a scratch directory."""
        size = self.model.parameters * self.model.dtype.itemsize
        if 2 * size > free_memory(self.model.device) // 2:
            yield None
        else:
            with self.model.whole() as network:
                yield network

    def _make(self, cell: Cell, network: Any, track: Track) -> Row:
        # Measured below, on windows that all cells share; only healing has to know them, to keep away from them.
        wanted = Recipe.of(cell.recipe)
        heals, packs = bool(wanted.heal.train), wanted.format == "packed"
        recipe = cell.recipe if heals else {**cell.recipe, "evaluate": {"source": None}}
        with contextlib.ExitStack() as stack:
            output = None
            source: Any = self.model.name if heals else self.model
            if network is None or heals or packs:  # what is rounded for packing is measured as its files have it
                self.rows.path.parent.mkdir(parents=True, exist_ok=True)
                scratch = tempfile.TemporaryDirectory(prefix=".sweep-", dir=self.rows.path.parent)
                output = Path(stack.enter_context(scratch)) / "model"
            if network is not None:  # the open model holds the dense weights, for all cells
                source = self._wrapped(copy.deepcopy(network)) if output is None else self.model.name
            cpu = time.process_time()
            of_sweep: dict[str, Any] = {} if heals else {"calibration": self.calibration, "shared": self._shared}
            if isinstance(source, str):
                of_sweep["tokenizer"] = self.tokenizer
            report = prune(source, recipe, output=output, track=track, **of_sweep, **self.trust)
            cpu = time.process_time() - cpu
            # A directory may hold more than the model's own tensors, or hold them packed: it is opened as it is.
            device = str(self.model.device)
            model = source if output is None else self._opened(str(output), device)
            itemsize = self.model.dtype.itemsize
            healing, spent = report.healing, report.run["seconds"]
            size = (self.model.parameters - sum(layer.size for layer in report.layers)) * itemsize
            size += sum(packed_bytes(layer, itemsize) for layer in report.layers)
            row = {
                "recipe": {**report.recipe, "heal": healing["recipe"]} if healing else report.recipe,
                "sparsity": report.sparsity,
                **self._measure(model, track),
                "size": report.pruned["bytes"] if packs else size,
                "seconds": spent["allocate"] + spent["prune"] + healing.get("seconds", 0),
                "cpu_seconds": cpu,
                "error": mean(report.layers, lambda layer: layer.error or 0.0),
            }
            if self.speed:
                row["speed"] = bench(str(output) if output else model.network, prompt=128)
            return row

    def _wrapped(self, network: Any) -> Model:
        return self.model.task.wrap(network, self.model.tokenizer, self.model.name)

    def _opened(self, name: str, device: str) -> Model:
        """The model in a directory of a cell, with the task of the sweep, which knows the samples."""
        model = open_model(name, device=device, packed=True, **self.trust)
        model.task = self.model.task
        return model

    def _measure(self, model: Model, track: Track, told: dict[str, Answers] | None = None) -> dict[str, Any]:
        """What its row says of a model: perplexities, or the scores of another task; `told` takes what it answers."""
        found: dict[str, dict[str, Any]] = {}
        for name, samples in self.held_out.items():
            losses, answers = answered(model, samples, track=track)
            dense = self._dense.get(name, NO_ANSWERS)
            scores = scored(model, samples, losses, answers, dense)
            found[name] = {key: value for key, value in scores.items() if not isinstance(value, list)}
            if told is not None:
                told[name] = answers
        if self.model.task.language:
            return {"perplexity": {name: scores["perplexity"] for name, scores in found.items()}}
        return {"scores": found}


def packed_bytes(layer: LayerResult, itemsize: int) -> int:
    """What `prunella pack` makes of a layer: values, mask and where rows begin (of a quantized one with a scale for
    every 128 inputs), or all of it where that is less."""
    rows, columns = layer.shape
    kept = round((1 - layer.sparsity) * rows * columns)
    bits = None if layer.bits is None else max(4, layer.bits)  # three are stored as four
    width = {"weight_mask": 1, "weight_offsets": 4, "weight_values": 1 if bits else itemsize, "weight_scales": 2}
    shapes = expected(rows, columns, kept, bits, SPAN)
    packed = sum(math.prod(shape) * width[part] for part, shape in shapes.items())
    return min(packed, rows * columns * itemsize) if layer.target or bits else rows * columns * itemsize


def sweep(
    model: str,
    plan: Mapping[str, Any],
    directory: str | Path,
    *,
    texts: Sequence[str] | None = None,
    speed: bool = False,
    say: Callable[[str], None] = lambda message: None,
    track: Track = no_track,
    tokenizer: str | None = None,
    **trust: Any,
) -> Results:
    """Prune one model in many ways, and write down what each costs and saves.

    Args:
        model: hub id, directory, .gguf file or built-in name.
        plan: plain data of a recipe and, under `grid`, lists of values for any of its keys but those that all cells
            share; every combination is a cell.
        directory: for cells.jsonl, where finished cells are and new ones go, and what is made of it: table.csv,
            sweep.html and, with matplotlib, pareto.png and pareto.svg.
        texts: sources to measure on, in place of the recipe's one.
        speed: measure how fast each cell decodes packed, too.
        say: is told of each finished cell.
        tokenizer: a directory or hub id with a tokenizer, in place of the model's own.
        trust: `remote_code` and `pickles`, as for `open_model`.
    Raises:
        PrunellaError: anything about the input that the user can mend. Cells that fail do not raise.
    """
    base = {key: value for key, value in plan.items() if key != "grid"}
    recipe = Recipe.of({**base, "model": model}).resolved(model)
    cells = cells_of({**base, "task": recipe.task}, plan.get("grid") or {})
    task = recipe.make_task()
    with blamed(type(task), f"task '{task.name}'"):
        options = {"dtype": recipe.dtype, "device": recipe.device, "tokenizer": tokenizer, **trust}
        opened = open_for(task, model, **options)
        if speed and not task.language:
            raise InputError(
                f"'{model}' is of task '{task.name}': how fast text is decoded is of language models only."
            )
        wanted = recipe.calibration
        own = recipe.make_task(wanted.length) if task.language else task
        calibration = own.samples(opened, wanted.source, wanted.samples, seed=recipe.seed)
        task.check(opened, calibration)
    held: dict[str, Samples] = {}
    texts = texts or [text for text in [recipe.evaluate.source] if text]
    for text in texts:
        if Path(text).name in held:
            raise InputError(f"two texts are called '{Path(text).name}': rename one, the name is that of its column.")
        evaluation = recipe.evaluate.model_copy(update={"source": text})
        found = held_out(opened, recipe.model_copy(update={"evaluate": evaluation}), task.size(calibration))
        if found is not None:
            held[Path(text).name or "own"] = found
    if not held:
        what = "perplexities: it needs a text (--text) and a model with a tokenizer" if task.language else "scores"
        raise InputError(
            f"a sweep compares {what}{'' if task.language else ': it needs samples to measure on (--text)'}."
        )
    about = task.about(next(iter(held.values())))
    evaluation = recipe.evaluate.model_copy(update={"length": about["length"]} if task.language else {})
    cells = [_kept_apart(cell, evaluation, texts) for cell in cells]
    digest = hashlib.sha256(
        b"".join(t.numpy().tobytes() for some in (calibration, *held.values()) for t in some.tensors)
    )
    named = {*SHARED, *_NAMED, *(plan.get("grid") or {})}
    windows = [some.groups[0].get("input_ids") for some in held.values()] if task.language else []
    settings = {
        "model": model,
        "calibration": Path(wanted.source).name,
        "samples": wanted.samples,
        **({"length": task.about(calibration)["length"]} if task.language else {"task": task.name}),
        "windows": recipe.evaluate.windows,
        "dtype": str(opened.dtype).removeprefix("torch."),
        "text": list(held),
        "tokens": digest.hexdigest()[:16],
        **({"bos": True} if windows and all(with_bos(opened, ids) for ids in windows if ids is not None) else {}),
        "recipe": {key: value for key, value in recipe.plain().items() if key not in named},
    }
    directory = Path(directory)
    opened.scratch = directory
    rows = Rows(directory / "cells.jsonl", settings)
    sweep = Sweep(opened, calibration, held, rows, speed, tokenizer, trust)
    found_rows = sweep.run(cells, say=say, track=track)
    results = Results(rows.settings, tuple(found_rows.values()))
    results.write(directory)
    return results


def _kept_apart(cell: Cell, evaluation: Evaluation, texts: Sequence[str]) -> Cell:
    """The cell, healed on no window that it is measured on: its recipe evaluates on the text that it trains on."""
    heal = cell.recipe["heal"]
    if any("lora" in item for item in heal["train"]):
        raise InputError(
            f"cell '{cell.label}': what lora trains stays in an adapter beside the weights, and a sweep measures these:"
            " use mask-lora."
        )
    sources = heal["text"] or [cell.recipe["calibration"]["source"]]
    near = [text for text in texts if any(same_text(source, text) for source in sources)]
    if heal["train"] and len(near) > 1:
        raise InputError(f"cell '{cell.label}' would train on more than one of the texts that it is measured on.")
    source = [*near, *texts][0]
    return replace(cell, recipe={**cell.recipe, "evaluate": {**evaluation.model_dump(), "source": source}})
