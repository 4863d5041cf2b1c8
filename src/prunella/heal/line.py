"""The line of healing: a pruned directory -> what trains -> a healed directory, exactly as sparse."""

from __future__ import annotations

import functools
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from ..errors import (
    InputError,
    NumericalError,
    PrunellaError,
    ReadError,
    command,
    disk_error,
    disk_full,
    kept,
)
from ..evaluate.measure import measure_once
from ..foreign import blamed
from ..lenses import wear
from ..machine import pick_device
from ..model.network import Model
from ..model.task import Answers
from ..overlap import joined
from ..progress import OnStep, Track
from ..recipe import Healing, Recipe
from ..report import Report, peak_memory
from ..samples import Samples
from ..save import Output, identity
from ..tasks import Task, opened
from ..team import Team, team
from ..tensors import MASKS
from ..unlabelled import targeted
from ..workshop import BEFORE, Workshop, partial_of, workshop
from .biases import LIST, add_biases
from .masks import full, masks_of, slots_of
from .reconstruct import reconstruct_blocks
from .report import known, report_of, said_of, taught
from .retraining import Retraining
from .sources import Sources
from .teacher import check_dense, dense_name
from .text import Text

ADAPTING: tuple[dict[str, dict[str, Any]], ...] = ({"mask-lora": {"rate": 2e-3}},)  # of a dense model: the mask is full


def adapt(dense: str, recipe: Recipe, output: Path, *, sharded: bool, **options: Any) -> Report:
    """Train a dense model on `heal.adapt` tokens, so that it fits the text: low-rank changes of all layers in its
    blocks, merged. The text is what follows that on which `recipe` heals, where there is enough. Of another task it is
    the same samples, in so many passes.

    Sreenivas et al., "LLM Pruning and Distillation in Practice: The Minitron Approach", 2024 (arXiv 2408.11796), call
    it teacher correction: a dense model that was tuned for something else is no good teacher on this text.
    """
    kept = ["text", "batch", "micro", "warmup", "clip", "betas", "held_out", "patience", "checkpointing"]
    settings, text = recipe.heal, recipe.make_task().language
    kept += ["length"] if text else ["samples", "batch_norm", "augment"]
    amount: dict[str, Any] = {"tokens" if text else "epochs": settings.adapt}
    own = Healing(train=ADAPTING, evaluations=1, **amount, **{key: getattr(settings, key) for key in kept})
    taken = max(1, settings.tokens // settings.length) + (settings.held_out or 0)
    recipe = recipe.model_copy(update={"heal": own})
    return Line(Path(dense), recipe, output, True, skip=taken, whole=True, sharded=sharded, **options).all()


def check_dtype(dtype: torch.dtype, way: str) -> None:
    """Raises InputError if models of this dtype cannot be healed this way."""
    if dtype == torch.float16 and way == "retrain":
        raise InputError(
            "float16 has no room for the gradients of a whole model: prune it with --dtype bfloat16 and heal that, or"
            " heal with --way reconstruct."
        )


def check_way(way: str, crew: Team) -> None:
    """Raises InputError if models are not healed this way by several processes."""
    if way == "reconstruct" and crew.size > 1:
        raise InputError("reconstruction runs in one process: start it without accelerate launch or torchrun.")


def check_sharded(task: Task, sharded: bool) -> None:
    """Raises InputError where other networks than causal language models are to be sharded."""
    if sharded and not task.language:
        raise InputError(
            f"FSDP shards causal language models, and no networks of task '{task.name}': start the processes without"
            " it, and each has the whole network."
        )


@dataclass
class Line:
    """One healing, from directory to directory; the fields are the arguments of `heal`, and what `adapt` sets."""

    directory: Path
    recipe: Recipe
    path: Path
    resume: bool
    track: Track
    watch: OnStep | None
    remote_code: bool
    pickles: bool
    portion: tuple[int, int] = (0, 1)
    skip: int = 0  # windows of text
    whole: bool = False  # nothing is pruned: all weights of the layers train
    sharded: bool = False  # each of several processes keeps its share of the model
    shop: Workshop | None = None  # of the process that writes
    out: Output | None = None

    @functools.cached_property
    def said(self) -> Report | None:
        return said_of(self.directory)

    @functools.cached_property
    def given(self) -> Text | Sources:
        """Samples to train on, to calibrate and to measure on."""
        if not self.task.language:
            return Sources(self.recipe)
        return Text(self.recipe, lambda: self._dense, self.portion, self.skip, self.whole)

    @functools.cached_property
    def task(self) -> Task:
        return self.recipe.make_task()

    @property
    def settings(self) -> Healing:
        return self.recipe.heal

    def all(self) -> Report:
        crew = team(pick_device(self.recipe.device))
        self.sharded = self.sharded and crew.size > 1
        check_way(self.settings.way, crew)
        check_sharded(self.task, self.sharded)
        self.shop = workshop(self.path, self.resume) if crew.main else None
        try:
            return self._all()
        except NumericalError:
            raise  # the checkpoints are kept, the best one is named
        except (OSError, RuntimeError, SafetensorError) as error:  # of the checkpoints
            if disk_full(error):
                raise disk_error(error, self.path) from None
            raise
        except PrunellaError as error:
            done = self._done() or isinstance(error, ReadError)
            if self.shop and not self.shop.resumed and not done:
                self.shop.remove()
            elif self.out and done:
                kept(error, partial_of(self.path))
            raise
        finally:
            if self.out:
                self.out.close()
            elif self.shop:
                self.shop.close()

    def _done(self) -> bool:
        """Is there anything that would have to be done again?"""
        blocks = self.out.blocks if self.out else 0
        training = (partial_of(self.path) / "training").exists()
        return blocks > 0 or training or self._adapted.exists() or partial_of(self._adapted).exists()

    def _all(self) -> Report:
        started, cpu = time.perf_counter(), time.process_time()
        source = self._begun()
        main = team().main
        names = [name for item in self.settings.train for name in item]
        if self.settings.adapt:
            self.given.check(self._open(source))
            self._adapt()
        dense = None
        if self.settings.way == "reconstruct" or self.settings.distill or "new-biases" in names:
            dense = self._dense
        new: list[str] = []
        if "new-biases" in names:
            assert dense is not None
            new = self._add_biases(dense)
            source = self._biased / "pruned"
            if self.settings.way == "reconstruct":
                dense = self._open(self._biased / "dense")
        model = self._open(source)
        check_dtype(model.dtype, self.settings.way)
        masks = self._masks(model)
        slots = [slot for slot in slots_of(model) if slot.name in masks]
        task = model.task
        if self.settings.way == "reconstruct":
            samples, held = self.given.calibration(model), None
        else:
            samples, held = self.given.training(model)
        for some in (samples,) if held is None else (samples, held):
            with blamed(type(task), f"task '{task.name}'"):
                task.check(model, some)
        seen = joined(task.fingerprint(samples), "" if held is None else task.fingerprint(held))
        if self.settings.way == "retrain":
            samples = self.given.own(samples)
        if self.said is not None:  # it may have been healed before
            seen = joined(seen, self.said.healing.get("fingerprint", ""))
        recipe = self.recipe.model_copy(update={"model": str(self.directory), "dtype": str(model.dtype)[6:]})
        test, tested = self.given.test(model, recipe), recipe.evaluate.source
        beside = self._compared(test)
        samples = self._targeted(samples)
        held, test = (None if some is None else self._targeted(some) for some in (held, test))
        if self.shop:
            made = [] if self.whole else slots
            host = self._open(source, "cpu") if self.sharded else model  # merging needs all of it at once
            given = [samples] if held is None else [samples, held]
            given += [self.given.calibration(model)] if new else []
            tensors = [tensor for some in given for tensor in some.tensors]
            same = identity(model.checkpoint, recipe.plain(), tensors, dense.checkpoint if dense else None)
            self.out = Output(self.path, host, made, same, self.shop)
        out = self.out
        team().barrier()  # the directory is there
        before = known(self.said, self.directory, model, test) if source == self.directory else None
        answers: dict[str, Answers] = {}
        if main and beside is not None:
            measure_once(out, "dense", beside, tested, test, None, self.track, answers)
        if before is None:
            before = measure_once(out, "before", model, tested, test, None, self.track, answers) if main else {}
        clock = time.perf_counter()
        if self.settings.way == "reconstruct":
            assert dense is not None
            assert out is not None
            did = reconstruct_blocks(model, dense, masks, samples, recipe, out, self.track, frozenset(new))
            did |= self.given.amount(samples, len(samples) * self.settings.epochs)
            after = None
        else:
            training = Retraining(
                recipe, self.path, self.resume, self.track, self.watch, self.whole, self.sharded, self._open, self.given
            )
            taught_by = dense if self.settings.distill else None
            did, after = training.run(model, taught_by, masks, new, samples, held, test, out, answers)
        seconds = time.perf_counter() - clock
        if out is None:
            team().barrier()
            return Report({}, {}, {}, {}, (), {})
        out.complete()
        weights = None
        there = out.checkpoint if model.checkpoint is not None else None  # else it is in memory, and changed there
        if after is None:
            after = measure_once(out, "after", model, tested, test, there, self.track, answers)
        elif did["best_step"] and set(names) - set(did["apart"]):
            weights = measure_once(out, "weights", model, tested, test, there, self.track, answers)
        else:
            weights = before
        healing = {
            "recipe": recipe.plain()["heal"],
            "source": str(self.directory),
            **did,
            "taught": taught(dense),
            "processes": team().size,
            "sharded": self.sharded,
            "before": before,
            "after": after,
            "weights": weights,
            "fingerprint": seen,
            "seconds": seconds,
            "cpu_seconds": time.process_time() - cpu,
            "seconds in all": time.perf_counter() - started,
            "peak_memory": peak_memory(),
        }
        report = report_of(self.said, model, masks, recipe, before, healing)
        out.finish(report.plain(), report.card())
        team().barrier()
        return report

    def _open(self, name: Path | str, device: str | None = None, dtype: str = "auto") -> Model:
        model = opened(
            self.task,
            str(name),
            dtype=dtype,
            device=device or self.recipe.device,
            tokenizer=None,
            remote_code=self.remote_code,
            pickles=self.pickles,
        )
        model.scratch = partial_of(self.path)
        wear(map(model.module, model.blocks), self.recipe.lenses)
        return model

    def _begun(self) -> Path:
        """What is opened: a dense network may lack something for its task."""
        if self.task.language or self.said is not None or (self.directory / MASKS).is_file():
            return self.directory
        folder = partial_of(self.path) / BEFORE / "begun"
        if team().main and not folder.exists():
            half = folder.with_name("begun.half")
            shutil.rmtree(half, ignore_errors=True)
            sources = self.settings.text or (self.recipe.calibration.source,)
            options = {"dtype": self.recipe.dtype, "remote_code": self.remote_code, "pickles": self.pickles}
            with blamed(type(self.task), f"task '{self.task.name}'"):
                self.task.begun(str(self.directory), half, sources, seed=self.recipe.seed, **options)
            if half.exists():
                half.rename(folder)
        team().barrier()
        return folder if folder.exists() else self.directory

    def _masks(self, model: Model) -> Mapping[str, Tensor]:
        """The masks to hold. A dense network of another task than text is one that trains as a whole."""
        if self.whole:
            return full(model)
        masks = masks_of(model, self.directory)
        if masks:
            return masks
        if self.task.language or self.settings.way == "reconstruct":
            raise InputError(
                f"nothing to heal: '{self.directory}' is dense. Prune it first:"
                f" {command('prune', self.directory)} -o OUT."
            )
        self.whole = True
        return full(model)

    def _compared(self, test: Samples | None) -> Model | None:
        """The dense model whose answers others are compared with, where the task compares any and it is known."""
        if self.whole or test is None or type(self.task).answers is Task.answers:
            return None
        try:
            return self._dense
        except InputError:
            return None

    def _targeted(self, samples: Samples) -> Samples:
        """Samples whose loss can be told: what lacks labels is compared with what the dense network answers."""
        if not any(map(self.task.lacks, samples.groups)):
            return samples
        if self.whole:
            raise InputError(
                f"the samples have no labels, which task '{self.task.name}' needs to train a dense network: give"
                " labelled ones (--text …)."
            )
        return targeted(self._dense, samples, track=self.track)

    @property
    def _biased(self) -> Path:
        return partial_of(self.path) / BEFORE / "biased"

    def _add_biases(self, dense: Model) -> list[str]:
        """Write the pruned model and the dense one with new biases; their names."""
        names = self._biased / "pruned" / LIST
        pruned = self._open(self.directory)
        check_dtype(pruned.dtype, self.settings.way)
        if self.settings.way == "retrain":
            self.given.check(pruned)  # too little of it is said now, not when the biases have been computed
        if team().main and not names.is_file():
            add_biases(pruned, dense, self.given.calibration(pruned), self._biased, self.track)
        team().barrier()
        return names.read_text(encoding="utf-8").split()

    @property
    def _adapted(self) -> Path:
        return partial_of(self.path) / BEFORE / "adapted"

    def _adapt(self) -> None:
        """Write the teacher."""
        if self.settings.way == "retrain" and not self.settings.distill:
            raise InputError(
                "heal.adapt trains the dense model so that it teaches better, but nothing asks it: add --distill 0.5."
            )
        if self._adapted.exists():
            return
        adapt(
            self._dense_name,
            self.recipe.model_copy(update={"evaluate": self.recipe.evaluate.model_copy(update={"source": None})}),
            self._adapted,
            track=self.track,
            watch=self.watch,
            remote_code=self.remote_code,
            pickles=self.pickles,
            sharded=self.sharded,
        )

    @property
    def _dense_name(self) -> str:
        return dense_name(self.directory, self.said, self.settings.dense)

    @functools.cached_property
    def _dense(self) -> Model:
        """The model before it was pruned."""
        name = str(self._adapted) if self.settings.adapt else self._dense_name
        pruned = self._open(self.directory)
        dense = self._open(name, dtype=str(pruned.dtype)[6:])
        check_dense(dense, name, pruned, self.directory)
        return dense
