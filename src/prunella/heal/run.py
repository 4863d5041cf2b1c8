"""A pruned directory -> what trains -> a healed directory, exactly as sparse."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from ..calibrate import check_windows, context, text_tokens, up_to, window_length, windows
from ..errors import (
    InputError,
    ModelError,
    NumericalError,
    PrunellaError,
    ReadError,
    command,
    disk_error,
    disk_full,
    kept,
)
from ..evaluate.measure import digest, held_out_windows, measure, measure_once
from ..layers import Slot, find_layers, survey
from ..lenses import wear
from ..machine import fork_random, pick_device
from ..model.names import named
from ..model.network import Model
from ..outcome import BlockResult, LayerResult
from ..overlap import fingerprint, joined
from ..pattern import pack
from ..progress import Track, Watcher, no_track
from ..recipe import Healing, Recipe
from ..report import Report, peak_memory
from ..save import REPORT, Output, identity
from ..tasks.text import load_model, wrap_model
from ..texts import same_text
from ..workshop import BEFORE, Workshop, check_output, finished, partial_of, workshop
from .biases import LIST, add_biases
from .lora import save_adapter, undo
from .masks import full, masks_of, slots_of, verify
from .parts import Chosen, attach, choose, detach, parts_of, trained
from .processes import asked, check_way, gather, scatter, shard, world
from .reconstruct import reconstruct_blocks

DEFAULT: tuple[dict[str, dict[str, Any]], ...] = ({"mask-lora": {}},)  # what trains if nobody says what
ADAPTING: tuple[dict[str, dict[str, Any]], ...] = ({"mask-lora": {"rate": 2e-3}},)  # of a dense model: the mask is full


def heal(
    directory: str | Path,
    recipe: Recipe | Mapping[str, Any] | None = None,
    *,
    output: str | Path,
    resume: bool = False,
    track: Track = no_track,
    watch: Watcher | None = None,
    remote_code: bool = False,
    pickles: bool = False,
    portion: tuple[int, int] = (0, 1),
) -> Report:
    """Retrain a pruned model, the mask held.

    Args:
        directory: a model that Prunella pruned (the masks saved with it hold), or any other model with zeros (they
            are the mask).
        recipe: its `heal` section says what trains and how; `evaluate`, `seed`, `device` and `calibration` count too
            (the calibration is that of the pruning, if nothing else is said), the rest does not.
        output: directory for the result, exactly as sparse; it appears when it is whole. With `lora`, which is kept
            apart, its subdirectory `adapter` has PEFT's format.
        resume: continue the run that was interrupted while it wrote `output`, or begin it.
        track: wraps loops over blocks, `track(range, what, total)`, to show progress.
        watch: called after each step, `watch(step, steps, loss)`.
        remote_code, pickles: trust code that comes with the model, weights that are pickles.
        portion: (k, n): of n times as much text take the k-th portion, from 0, as the rounds of iterative pruning do.

    Returns:
        The report of the pruning with a section on the healing, as it stands in prunella.json.

    Raises:
        PrunellaError: anything about the input that the user can mend; a loss that is not finite.

    >>> import prunella
    >>> report = prunella.heal("pruned", {"heal": {"train": ["mask-lora", "norms"]}}, output="healed")  # doctest: +SKIP
    """
    if not isinstance(recipe, Recipe):
        recipe = Recipe.of(calibrated(directory, recipe or {}))
    if not recipe.heal.train:
        recipe = recipe.model_copy(update={"heal": recipe.heal.model_copy(update={"train": DEFAULT})})
    path = Path(output)
    if finished(path) and resume:
        return Report.read(path)
    check_output(path)
    if not Path(directory).is_dir():
        raise ModelError(
            f"'{directory}' is not a directory: prune a model first, {command('prune', 'MODEL', '-o', directory)}."
        )
    with ExitStack() as stack:
        stack.enter_context(fork_random(pick_device(recipe.device)))
        sharded = stack.enter_context(asked())
        run = _Run(Path(directory), recipe, path, resume, track, watch, remote_code, pickles, portion, sharded=sharded)
        return run.all()


def calibrated(directory: str | Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """Plain recipe data; what it does not say of the calibration is that of the pruning."""
    said = Report.read(Path(directory)).recipe if (Path(directory) / REPORT).is_file() else {}
    own = values.get("calibration") or {}
    bos = {"bos": said["bos"]} if "bos" in said else {}
    return {**bos, **values, "calibration": {**said.get("calibration", {}), **own}}


def adapt(
    dense: str,
    recipe: Recipe,
    *,
    output: Path,
    resume: bool,
    track: Track,
    watch: Watcher | None,
    remote_code: bool,
    pickles: bool,
    sharded: bool = False,
) -> Report:
    """Train a dense model on `heal.adapt` tokens, so that it fits the text: low-rank changes of all layers in its
    blocks, merged. The text is what follows that on which `recipe` heals, where there is enough.

    Sreenivas et al., "LLM Pruning and Distillation in Practice: The Minitron Approach", 2024 (arXiv 2408.11796), call
    it teacher correction: a dense model that was tuned for something else is no good teacher on this text.
    """
    kept = ("text", "length", "batch", "micro", "warmup", "clip", "betas", "held_out", "patience", "checkpointing")
    settings = recipe.heal
    own = Healing(train=ADAPTING, tokens=settings.adapt, evaluations=1, **{key: getattr(settings, key) for key in kept})
    taken = max(1, settings.tokens // settings.length) + settings.held_out
    run = _Run(
        Path(dense),
        recipe.model_copy(update={"heal": own}),
        output,
        resume,
        track,
        watch,
        remote_code,
        pickles,
        skip=taken,
        whole=True,
        sharded=sharded,
    )
    return run.all()


def check_dtype(dtype: torch.dtype, way: str) -> None:
    """Raises InputError if models of this dtype cannot be healed this way."""
    if dtype == torch.float16 and way == "retrain":
        raise InputError(
            "float16 has no room for the gradients of a whole model: prune it with --dtype bfloat16 and heal that, or"
            " heal with --way reconstruct."
        )


def check_text(model: Model, recipe: Recipe, portions: int) -> None:
    """Raises InputError if there is too little text to heal on, or to measure on, or it cannot be read; what a model
    that is not there yet will write is not looked at."""
    run = _Run(Path(), recipe, Path(), False, no_track, None, False, False, (0, portions))
    run.check_text(model)


def _portion(ids_NL: Tensor, portion: tuple[int, int]) -> Tensor:
    """The k-th of n portions, from 0, or all of it where there are too few windows."""
    at, portions = portion
    own_NL = ids_NL.tensor_split(portions)[at]
    return own_NL if len(own_NL) else ids_NL


@dataclass
class _Run:
    directory: Path
    recipe: Recipe
    path: Path
    resume: bool
    track: Track
    watch: Watcher | None
    remote_code: bool
    pickles: bool
    portion: tuple[int, int] = (0, 1)
    skip: int = 0  # windows of the text
    whole: bool = False  # nothing is pruned: all weights of the layers train
    sharded: bool = False  # each of several processes keeps its share of the model
    shop: Workshop | None = None  # of the process that writes
    out: Output | None = None

    @functools.cached_property
    def said(self) -> Report | None:
        """The report of the pruning, if Prunella did it."""
        return Report.read(self.directory) if (self.directory / REPORT).is_file() else None

    @property
    def settings(self) -> Healing:
        return self.recipe.heal

    def all(self) -> Report:
        team = world(pick_device(self.recipe.device))
        self.sharded = self.sharded and team.num_processes > 1
        check_way(self.settings.way, team)
        self.shop = workshop(self.path, self.resume) if team.is_main_process else None
        try:
            return self._all(team)
        except NumericalError:
            raise  # the checkpoints are kept, the best one is named
        except (OSError, RuntimeError, SafetensorError) as error:  # of the Trainer's checkpoints
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

    def _all(self, team: Any) -> Report:
        started, cpu = time.perf_counter(), time.process_time()
        source = self.directory
        main: bool = team.is_main_process
        names = [name for item in self.settings.train for name in item]
        if self.settings.adapt:
            self.check_text(self._open(source))
            self._adapt()
        dense = None
        if self.settings.way == "reconstruct" or self.settings.distill or "new-biases" in names:
            dense = self._dense
        new: list[str] = []
        if "new-biases" in names:
            assert dense is not None
            new = self._add_biases(dense, team)
            source = self._biased / "pruned"
            if self.settings.way == "reconstruct":
                dense = self._open(self._biased / "dense")
        model = self._open(source)
        check_dtype(model.dtype, self.settings.way)
        masks: Mapping[str, Tensor] = full(model) if self.whole else masks_of(model, self.directory)
        slots = [slot for slot in slots_of(model) if slot.name in masks]
        if self.settings.way == "reconstruct":
            ids_NL, held_NL = self._calibration(model), None
            check_windows(model, ids_NL)
            seen = fingerprint(ids_NL)
        else:
            ids_NL, held_NL = self._text(model)
            all_NL = ids_NL if held_NL is None else torch.cat([ids_NL, held_NL])
            check_windows(model, all_NL)
            seen = fingerprint(all_NL)
            ids_NL = _portion(ids_NL, self.portion)
        if self.said is not None:  # it may have been healed before
            seen = joined(seen, self.said.healing.get("fingerprint", ""))
        recipe = self.recipe.model_copy(update={"model": str(self.directory), "dtype": str(model.dtype)[6:]})
        author = self._author(model, recipe.evaluate.source)
        test_NL = held_out_windows(author, recipe, self._calibrated(model))
        if self.shop:
            made = [] if self.whole else slots
            host = self._open(source, "cpu") if self.sharded else model  # merging needs all of it at once
            texts = [ids_NL] if held_NL is None else [ids_NL, held_NL]
            texts += [self._calibration(model)] if new else []
            same = identity(model.checkpoint, recipe.plain(), texts, dense.checkpoint if dense else None)
            self.out = Output(self.path, host, made, same, self.shop)
        out = self.out
        team.wait_for_everyone()  # the directory is there
        before = self._known(model, test_NL) if source == self.directory else None
        if before is None:
            before = measure_once(out, "before", model, recipe, test_NL, None, self.track) if main else {}
        clock = time.perf_counter()
        if self.settings.way == "reconstruct":
            assert dense is not None
            assert out is not None
            did = reconstruct_blocks(model, dense, masks, ids_NL, recipe, out, self.track, frozenset(new))
            after = None
        else:
            did, after = self._retrain(
                model, dense if self.settings.distill else None, masks, new, ids_NL, held_NL, test_NL, recipe, out
            )
        seconds = time.perf_counter() - clock
        if out is None:
            team.wait_for_everyone()
            return Report({}, {}, {}, {}, (), {})
        out.complete()
        weights = None
        if after is None:
            after = measure_once(out, "after", model, recipe, test_NL, out.checkpoint, self.track)
        elif did["best_step"] and set(names) - set(did["apart"]):
            weights = measure_once(out, "weights", model, recipe, test_NL, out.checkpoint, self.track)
        else:
            weights = before
        healing = {
            "recipe": recipe.plain()["heal"],
            "source": str(self.directory),
            **did,
            "taught": _taught(dense),
            "processes": team.num_processes,
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
        report = _report(self.said, model, masks, recipe, before, healing)
        out.finish(report.plain(), report.card())
        team.wait_for_everyone()
        return report

    def _known(self, model: Model, test_NL: Tensor | None) -> dict[str, Any] | None:
        """What the pruning measured on these windows, if nothing has touched the model since."""
        said, checkpoint = self.said, model.checkpoint
        if said is None or said.healing or test_NL is None or checkpoint is None:
            return None
        written = (self.directory / REPORT).stat().st_mtime
        touched = any((self.directory / file).stat().st_mtime > written for file in checkpoint.files)
        same = said.pruned.get("text") == digest(test_NL) and said.model.get("dtype") == str(model.dtype)[6:]
        return said.pruned if same and not touched else None

    def _open(self, directory: Path | str, device: str | None = None, dtype: str = "auto") -> Model:
        model = load_model(
            str(directory),
            dtype=dtype,
            device=device or self.recipe.device,
            remote_code=self.remote_code,
            pickles=self.pickles,
        )
        model.scratch = partial_of(self.path)
        wear(map(model.module, model.blocks), self.recipe.lenses)
        return model

    @property
    def _biased(self) -> Path:
        return partial_of(self.path) / BEFORE / "biased"

    def _add_biases(self, dense: Model, team: Any) -> list[str]:
        """Write the pruned model and the dense one with new biases; their names."""
        names = self._biased / "pruned" / LIST
        pruned = self._open(self.directory)
        check_dtype(pruned.dtype, self.settings.way)
        if self.settings.way == "retrain":
            self.check_text(pruned)  # too little of it is said now, not when the biases have been computed
        if team.is_main_process and not names.is_file():
            add_biases(pruned, dense, self._calibration(pruned), self._biased, self.track)
        team.wait_for_everyone()
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
            output=self._adapted,
            resume=True,
            track=self.track,
            watch=self.watch,
            remote_code=self.remote_code,
            pickles=self.pickles,
            sharded=self.sharded,
        )

    @property
    def _dense_name(self) -> str:
        if self.settings.dense is not None:
            return self.settings.dense
        said = self.said.model if self.said else {}
        name, path = said.get("name"), said.get("path")
        elsewhere = self.said is not None and self.said.healing.get("source") == name  # pruned, and healed first, there
        if name is None or name == "in memory" or elsewhere:
            raise InputError(
                f"'{self.directory}' does not say which model it was pruned from: give it with --dense MODEL."
            )
        if path is not None and not Path(path).exists():
            raise InputError(
                f"'{self.directory}' was pruned from '{path}', which is not there any more: say where it is now, with"
                " --dense MODEL."
            )
        return str(path or name)

    @functools.cached_property
    def _dense(self) -> Model:
        """The model before it was pruned."""
        name = str(self._adapted) if self.settings.adapt else self._dense_name
        pruned = self._open(self.directory)
        dense = self._open(name, dtype=str(pruned.dtype)[6:])
        theirs = {key: value.shape for key, value in dense.network.named_parameters()}
        for key, value in pruned.network.named_parameters():
            if key not in theirs and key.endswith(".bias"):
                continue  # one that healing added
            if theirs.get(key) != value.shape:
                raise InputError(
                    f"'{name}' is not the dense model of '{self.directory}': its '{key}' has another shape, or it has"
                    " none. Give the right one with --dense MODEL."
                )
        return dense

    def _author(self, model: Model, source: str | None) -> Model:
        """Who writes the text: of `self` it is the dense model."""
        return self._dense if source == "self" else model

    def _length(self, model: Model) -> int:
        """Tokens in a window to calibrate on, as when it was pruned."""
        return window_length(model, self.recipe.calibration.length)

    def _calibration(self, model: Model) -> Tensor:
        wanted = self.recipe.calibration
        author = self._author(model, wanted.source)
        length = self._length(model)
        return windows(author, wanted.source, wanted.samples, length, seed=self.recipe.seed, bos=self.recipe.bos)

    def _calibrated(self, model: Model) -> int:
        """At most so many tokens of the calibration come before those to evaluate on, if they are of one text."""
        return self.recipe.calibration.samples * self._length(model)

    def _check_step(self, length: int) -> None:
        """Raises InputError if the tokens to train on are not enough for a step of windows of this length."""
        settings, (_, rounds) = self.settings, self.portion
        step, key = settings.batch * length, "adapt" if self.whole else "tokens"
        if settings.tokens < step:
            each = f" in each of {rounds} rounds" if rounds > 1 else ""
            raise InputError(
                f"{settings.tokens:,} tokens to train on{each} are less than a single step takes, {settings.batch}"
                f" windows of {length}: give at least {step * rounds} (--set heal.{key}={step * rounds}), shorter"
                " windows (--set heal.length=…) or fewer of them a step (--set heal.batch=…)."
            )

    def check_text(self, model: Model) -> None:
        """What `_text` and the evaluation have to say against the text, before any work is done."""
        sources = self.settings.text or (self.recipe.calibration.source,)
        if self.settings.way == "retrain" and "self" not in sources:
            self._text(model)
        if self.recipe.evaluate.source != "self":
            held_out_windows(model, self.recipe, self._calibrated(model))

    def _text(self, model: Model) -> tuple[Tensor, Tensor | None]:
        """Windows to train on in all portions, shuffled, and those that are held out; never those to evaluate on."""
        settings, test, bos = self.settings, self.recipe.evaluate, self.recipe.bos
        length = min(settings.length, context(model))
        self._check_step(length)
        sources = list(settings.text) or [self.recipe.calibration.source]
        _, portions = self.portion
        wanted = portions * (settings.tokens // length) + settings.held_out
        missing = self.skip + wanted
        parts: list[Tensor] = []
        for source in sources:
            if missing <= 0:
                break
            first = last = 0  # windows that hold tokens to evaluate on
            if test.source is not None and same_text(source, test.source):
                theirs = text_tokens(model, window_length(model, test.length), bos)
                ours = text_tokens(model, length, bos)
                same = same_text(self.recipe.calibration.source, test.source)
                skip = -(-self._calibrated(model) // theirs) if same else 0
                first, last = skip * theirs // ours, -(-(skip + test.windows) * theirs // ours)
            author, count = self._author(model, source), missing + last - first
            found_NL = up_to(author, source, count, length, self.recipe.seed, bos=bos)
            parts.append(torch.cat([found_NL[:first], found_NL[last:]])[:missing])
            missing -= len(parts[-1])
        all_NL = torch.cat(parts)
        all_NL = all_NL[self.skip :] if len(all_NL) >= self.skip + wanted else all_NL[:wanted]
        if len(all_NL) <= settings.held_out:
            raise InputError(
                f"{' and '.join(sources)}: {len(all_NL)} windows of {length} tokens to train on are too few to hold"
                f" {settings.held_out} of them out. Give more text, or --set heal.held_out=0."
            )
        order = torch.randperm(len(all_NL), generator=torch.Generator().manual_seed(self.recipe.seed))
        shuffled_NL, held = all_NL[order], settings.held_out
        return shuffled_NL[held:], shuffled_NL[:held] if held else None

    def _retrain(
        self,
        model: Model,
        dense: Model | None,
        masks: Mapping[str, Tensor],
        new: Sequence[str],
        ids_NL: Tensor,
        held_NL: Tensor | None,
        test_NL: Tensor | None,
        recipe: Recipe,
        out: Output | None,
    ) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """Train, merge, and write what changed."""
        # Not before: transformers' Trainer takes seconds to import.
        from .retrain import Plan, retrain, teacher_in_memory, teacher_streamed

        settings = self.settings
        folder = partial_of(self.path) / "training"
        groups = settings.make_groups()
        total = model.parameters
        with ExitStack() as stack:

            def ready(model: Model) -> list[Chosen]:
                """Load all of it, and choose and attach what trains."""
                stack.enter_context(model.whole())
                chosen = choose(parts_of(model, masks, new), groups)
                attach(chosen)
                return chosen

            torch.manual_seed(recipe.seed)
            if self.sharded:
                assert model.checkpoint is not None
                trainee = self._open(model.checkpoint.directory)
                chosen = shard(trainee, groups, masks, new)
            else:
                trainee = model
                chosen = ready(model)
            count = sum(parameter.numel() for item in chosen for parameter in item.change.parameters())
            teacher = None
            if dense is not None and settings.teacher == "memory":
                teacher = stack.enter_context(teacher_in_memory(dense, self.sharded))
            elif dense is not None:
                teacher = stack.enter_context(teacher_streamed(dense, ids_NL, self.track))
            steps = settings.tokens // (settings.batch * ids_NL.shape[1])
            plan = Plan(
                steps=steps,
                share=settings.distill,
                seed=recipe.seed,
                batch=settings.batch,
                micro=settings.micro,
                warmup=settings.warmup,
                clip=settings.clip,
                betas=settings.betas,
                temperature=settings.temperature,
                evaluations=settings.evaluations,
                patience=settings.patience,
                checkpointing=settings.checkpointing,
            )
            did = retrain(
                trainee, chosen, ids_NL, held_NL, plan, folder, teacher=teacher, resume=self.resume, watch=self.watch
            )
            if self.sharded:
                values = gather(trained(chosen), keep=out is not None)
                if out is None:
                    return {}, None
                model = out.model
                chosen = ready(model)
                scatter(values, trained(chosen))
                del values  # as much as all that trains
            apart = [item for item in chosen if item.change.apart]
            merged = [item for item in chosen if not item.change.apart]
            changed = detach(merged, merge=did.best_step > 0)  # else what was there before is best
            if not did.best_step:
                undo(apart)
            after = None
            if apart and out is not None:
                with torch.no_grad():
                    after = measure(wrap_model(model.network, model.tokenizer), recipe, test_NL, None, self.track)
                save_adapter(out.folder / "adapter", apart, str(self.path))
            detach(apart)
            verify(model, masks)
            if out is not None:
                _write(model, changed, {} if self.whole else masks, out)
        return {
            "trained": count / total,
            "trained_parameters": count,
            "parameters": total,
            "steps": did.steps,
            "tokens": did.steps * settings.batch * ids_NL.shape[1],
            "losses": list(did.losses),
            "held_out": {str(step): loss for step, loss in did.held_out.items()},
            "best_step": did.best_step,
            "apart": sorted({item.group.name for item in apart}),
        }, after


def _results(said: Report | None, slots: Sequence[Slot], masks: Mapping[str, Tensor]) -> tuple[LayerResult, ...]:
    """What the report says of these layers, or what their masks say."""
    known = {layer.name: layer for layer in said.layers} if said else {}
    out = []
    for slot in slots:
        mask = masks.get(slot.name)
        share = 0.0 if mask is None else 1 - mask.count_nonzero().item() / mask.numel()
        out.append(known.get(slot.name) or LayerResult(slot.name, slot.shape, share, share, "unstructured", None, 0))
    return tuple(out)


def _write(model: Model, changed: Mapping[str, Tensor], masks: Mapping[str, Tensor], out: Output) -> None:
    """Put everything on disk: changed parameters, and the others as they were."""
    for index, name in enumerate(model.blocks):
        if index < out.blocks:
            continue  # written by a run that was interrupted then
        slots = find_layers(model.module(name), name)
        inside = {key: value for key, value in changed.items() if key.startswith(name + ".")}
        bits = {slot.name: pack(masks[slot.name]) for slot in slots if slot.name in masks}
        out.write(BlockResult(index, name, _results(None, slots, masks), bits, {}, inside, 0.0))
    outside = {key: value for key, value in changed.items() if model.block_of(key) is None}
    assert model.checkpoint is not None
    stored = {name for key, (name, _) in model.plan().items() if key in model.checkpoint.where}
    for pair in model.network.all_tied_weights_keys.items():  # both may be in the files
        for one, other in (pair, pair[::-1]):
            same = model.network.get_parameter(one) is model.network.get_parameter(other)
            if one in outside and other in stored and same:
                outside[other] = outside[one]
    if outside:
        out.write_outside(outside)


def _taught(dense: Model | None) -> dict[str, Any]:
    """How the dense model was trained before it taught, if it was."""
    if dense is None or dense.checkpoint is None or not (dense.checkpoint.directory / REPORT).is_file():
        return {}
    did = Report.read(dense.checkpoint.directory).healing
    return {key: did[key] for key in ("tokens", "seconds", "held_out", "fingerprint") if key in did}


def _report(
    said: Report | None,
    model: Model,
    masks: Mapping[str, Tensor],
    recipe: Recipe,
    before: dict[str, Any],
    healing: dict[str, Any],
) -> Report:
    """The report of the pruning, with the healing; a new one for a model that was pruned elsewhere."""
    slots = slots_of(model)
    if said is None:
        about = {
            **named(healing["source"]),
            "class": type(model.network).__name__,
            "dtype": str(model.dtype).removeprefix("torch."),
            "parameters": model.parameters,
            "prunable": sum(math.prod(slot.shape) for slot in slots),
        }
        run = {"seconds": {}, "cpu_seconds": 0.0, "peak_memory": peak_memory()}
        unknown = {"perplexity": None, "sample": None}
        left = tuple(item for name in model.blocks for item in survey(model.module(name), name)[1])
        said = Report(recipe.plain(), about, unknown, before, _results(None, slots, masks), run, left_out=left)
    return replace(said, healing=healing)
