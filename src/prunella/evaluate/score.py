"""All that `prunella eval` measures: perplexities and accuracies of a model, of two models side by side if asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..calibrate import all_windows, check_windows, context, with_bos
from ..calibrate import windows as take
from ..errors import InputError
from ..model.network import Model
from ..overlap import overlap
from ..progress import Track, no_track
from ..report import seen
from ..tasks import AUTO, open_model
from .difference import difference
from .perplexity import perplexity
from .task import judge

SHARED = 0.05  # of a text's 13-grams in the calibration text: more than two texts have in common by chance


def score(
    model: str,
    texts: Sequence[str] | None = (),
    tasks: Sequence[str] = (),
    files: Sequence[str | Path] = (),
    *,
    task: str = AUTO,
    beside: str | None = None,
    length: int | None = None,
    windows: int | None = None,
    limit: int | None = None,
    bos: bool = True,
    track: Track = no_track,
    **opening: Any,
) -> dict[str, Any]:
    """Measure a model by any name, a packed one in packed form.

    Args:
        texts: sources of what is measured on; None: the task's own, or with tasks or files none. Of text
            (`prunella.texts`) perplexity, in windows of `length` tokens: the first `windows` of each, or all (of `c4`
            and other long data sets of the hub the first 256). Of another task what that says of so many samples.
        task: what the model is for, by name; `auto`: as its files say.
        tasks, files, limit: for the accuracies, see `prunella.evaluate.harness.accuracies`.
        bos: every window, and every request of a task, begins with what the tokenizer puts before a text, if anything;
            else none does.
        beside: another model to measure on the same; differences are of `model` minus this one.
        opening: how models are opened, as for `load_model`: dtype, device, tokenizer, remote_code, pickles.
    Returns:
        Plain data: model, beside, dtype, texts and tasks (one entry each, with what `beside` got under that name), and
        warnings about what makes the figures doubtful. With one text its fields stand at the top as well. Of another
        task than text it has `sources` in place of texts, see `prunella.evaluate.task`.
    Raises:
        PrunellaError: anything about the input that the user can mend.
    """
    warnings: list[str] = []
    opened = open_model(model, task, packed=True, **opening)
    result = {"model": model, "beside": beside, "dtype": str(opened.dtype)[6:]}
    if not opened.task.language:
        _check_words(opened.task.name, tasks or files, length, bos)
        other = open_model(beside, task, packed=True, **opening) if beside else None
        found = judge(opened, texts or (), beside=other, count=windows, track=track)
        top = found[0] if len(found) == 1 else {}
        return {**top, **result, "task": opened.task.name, "sources": found, "warnings": warnings}
    if texts is None:
        texts = [] if tasks or files else [opened.task.source]
    other = open_model(beside, task, packed=True, **opening) if beside and texts else None
    if other is not None and not other.task.language:
        raise InputError(f"'{beside}' is of task '{other.task.name}', and '{model}' a causal language model.")
    length = length or min(2048, *(context(m) for m in (opened, other) if m is not None))
    known = {name: seen(name) for name in (model, beside) if name}
    cut: list[tuple[str, Tensor]] = []
    for text in texts:  # all of them, before the first is measured
        ids_NL = _windows(opened, text, windows, length, bos)
        check_windows(opened, ids_NL)
        if other is not None:
            if text != "self" and not torch.equal(ids_NL, _windows(other, text, windows, length, bos)):
                raise InputError(
                    f"'{model}' and '{beside}' cut '{text}' into different tokens: their perplexities cannot be"
                    " compared."
                )
            check_windows(other, ids_NL)
        cut.append((text, ids_NL))
    found_texts = []
    for text, ids_NL in cut:
        ours = perplexity(opened, ids_NL, track=track)
        shared = {name: overlap(grams, ids_NL) for name, grams in known.items() if grams}
        warnings += [
            f"{share:.0%} of the 13-grams of '{text}' stand in the text that '{name}' was calibrated or healed on as"
            " well: its perplexity there flatters it."
            for name, share in shared.items()
            if share is not None and share >= SHARED
        ]
        entry: dict[str, Any] = {
            "text": text,
            **ours.as_dict(),
            "bos": with_bos(opened, ids_NL),
            "overlap": shared.get(model),
        }
        if other is not None:
            theirs = perplexity(other, ids_NL, track=track)
            entry |= {"beside": theirs.as_dict(), "difference": asdict(difference(ours, theirs))}
        found_texts.append(entry)
    del opened, other
    found_tasks = []
    if tasks or files:
        try:
            from .harness import accuracies
        except ImportError as error:
            if error.name is None or error.name.partition(".")[0] not in ("lm_eval", "datasets"):
                raise
            raise InputError("accuracies on tasks need the package lm-eval: pip install 'prunella[eval]'.") from None
        mine = accuracies(model, tasks, files, limit=limit, bos=bos, **opening)
        found_tasks = [accuracy.plain() for accuracy in mine]
        if beside:
            for entry, one, two in zip(
                found_tasks, mine, accuracies(beside, tasks, files, limit=limit, bos=bos, **opening), strict=True
            ):
                entry |= {"beside": two.plain(), "changed": one.changed(two)}
    top = found_texts[0] if len(found_texts) == 1 else {}
    return {**top, **result, "texts": found_texts, "tasks": found_tasks, "warnings": warnings}


def _check_words(task: str, questions: object, length: int | None, bos: bool) -> None:
    """Raises InputError for what only language models are asked."""
    asked = {"questions (--tasks, --tasks-file)": questions, "a length": length is not None, "--no-bos": not bos}
    if words := [name for name, there in asked.items() if there]:
        raise InputError(f"task '{task}' takes no {words[0].removeprefix('a ')}: that is of causal language models.")


def _windows(model: Model, text: str, count: int | None, length: int, bos: bool) -> Tensor:
    if count is None:
        return all_windows(model, text, length, bos=bos, split="test")
    return take(model, text, count, length, bos=bos, split="test")
