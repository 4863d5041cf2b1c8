"""Zero-shot accuracy through lm-evaluation-harness (`pip install 'prunella[eval]'`): its tasks, or a file of questions.

`PrunellaLM` is the model type `prunella` of the harness: any model that Prunella opens, packed ones in packed form.
"""

from __future__ import annotations

import functools
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from ..calibrate import check_tokens
from ..compat import quiet
from ..errors import InputError, first_line, unknown
from ..model.network import Model
from ..tasks.text import load_model
from ..texts import lead


class PrunellaLM(HFLM):  # type: ignore[misc]
    """A model by any name that `prunella eval` takes, for the harness.

    >>> lm_eval.simple_evaluate("prunella", "pretrained=packed", tasks=["piqa"])  # doctest: +SKIP
    """

    def __init__(
        self,
        pretrained: str | Model,
        dtype: str = "auto",
        device: str | None = None,
        tokenizer: str | None = None,
        batch_size: int | str | None = None,
        trust_remote_code: bool = False,
        allow_pickle: bool = False,
        **options: Any,
    ):
        if device is None or (device.startswith("cuda") and not torch.cuda.is_available()):  # the harness's default
            device = "auto"
        trust: dict[str, Any] = {"remote_code": trust_remote_code, "pickles": allow_pickle}
        opened = pretrained
        if isinstance(opened, str):
            opened = load_model(opened, dtype=dtype, device=device, tokenizer=tokenizer, packed=True, **trust)
        if opened.tokenizer is None:
            raise InputError(f"model '{opened.name}' has no tokenizer, so it cannot read questions.")
        self._opened = opened
        opened.load(lambda name: True)
        with quiet("lm_eval"):
            super().__init__(
                pretrained=opened.network, tokenizer=opened.tokenizer, batch_size=batch_size or 16, **options
            )

    def _model_call(self, inps: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        check_tokens(self._opened, inps, "requests")
        return super()._model_call(inps, *arguments, **options)

    def _model_generate(self, context: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        check_tokens(self._opened, context, "requests")
        return super()._model_generate(context, *arguments, **options)

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
        return super().loglikelihood(requests, disable_tqdm or not sys.stderr.isatty())


@dataclass(frozen=True)
class Accuracy:
    """One task's result.

    metrics: of the harness, by name: (value, standard error or None); `acc` takes the likeliest choice, `acc_norm` the
             likeliest per character
    answers: what the model chose for each question; numbers of choices, or texts
    """

    task: str
    questions: int
    bos: bool  # does each request begin with one?
    metrics: dict[str, tuple[float, float | None]]
    answers: tuple[Any, ...]

    def plain(self) -> dict[str, Any]:
        metrics = {name: {"value": value, "stderr": error} for name, (value, error) in self.metrics.items()}
        return {"task": self.task, "questions": self.questions, "bos": self.bos, "metrics": metrics}

    def changed(self, other: Accuracy) -> float:
        """The share of questions that another model answered differently."""
        different = [bool(a != b) for a, b in zip(self.answers, other.answers, strict=True)]
        return sum(different) / len(different)


def accuracies(
    model: str,
    tasks: Sequence[str] = (),
    files: Sequence[str | Path] = (),
    *,
    limit: int | None = None,
    bos: bool = True,
    **opening: Any,
) -> list[Accuracy]:
    """Zero-shot accuracies of a model, one for each task; those of groups of tasks (mmlu) are listed task by task.

    Args:
        tasks: names that the harness knows; it fetches their data from the hub.
        files: JSON lines with `query`, `choices` and `gold` (the number of the right choice, from 0). A query that asks
            a `Question:` is followed by `Answer:`, as in the harness's own tasks; any other is simply continued.
        limit: the first so many questions of each.
        bos: what the tokenizer puts before a text stands before each request; else nothing does.
        opening: how the model is opened, as for `load_model`.
    Raises:
        InputError: unknown tasks, tasks whose data cannot be had, damaged files.
    """
    with quiet("lm_eval"):
        names = [*tasks, *(Path(file).stem for file in files)]
        for name in names:
            if names.count(name) > 1:
                raise InputError(f"two tasks are called '{name}': a file of questions is called by its own name.")
        wanted: list[Any] = [_task(Path(file)) for file in files]
        manager = _manager(bool(tasks))
        for name in tasks:
            if name not in manager.all_tasks:
                near, _, _ = unknown("task", name, manager.all_tasks).partition(" Available")
                raise InputError(f"{near} `lm_eval ls tasks` lists all that the harness knows.")
        try:
            loaded = manager.load([*wanted, *tasks])
        except Exception as error:
            raise InputError(
                f"the data of '{', '.join(tasks)}' cannot be had ({first_line(error)}): with no network, give"
                " questions of your own with --tasks-file."
            ) from None
        for task in loaded["tasks"].values():
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=1234)
        lm = PrunellaLM(load_model(model, packed=True, **opening), add_bos_token=None if bos else False)
        begins = bos and bool(lead(lm.tokenizer))
        found = evaluate(lm, loaded, limit=limit, bootstrap_iters=1000)
    return [_accuracy(name, begins, found["results"][name], samples) for name, samples in found["samples"].items()]


@functools.cache
def _manager(everything: bool) -> Any:
    """The harness's tasks: to list them takes it seconds."""
    return TaskManager(include_defaults=everything)


def _accuracy(name: str, bos: bool, result: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> Accuracy:
    metrics: dict[str, tuple[float, float | None]] = {}
    for key, value in result.items():
        metric, comma, which = key.partition(",")
        if comma and not metric.endswith("_stderr") and isinstance(value, int | float):
            error = result.get(f"{metric}_stderr,{which}")
            metrics.setdefault(metric, (float(value), float(error) if isinstance(error, int | float) else None))
    ordered = sorted({sample["doc_id"]: sample for sample in samples}.items())
    return Accuracy(name, len(ordered), bos, metrics, tuple(_answer(sample) for _, sample in ordered))


def _answer(sample: Mapping[str, Any]) -> Any:
    """The likeliest choice, or the text that was generated."""
    scores = sample["filtered_resps"]
    if len(scores) > 1 and all(isinstance(score, tuple | list) and len(score) == 2 for score in scores):
        likelihoods = [float(score[0]) for score in scores]
        return likelihoods.index(max(likelihoods))
    return json.dumps(scores, default=str)


def _task(path: Path) -> Any:
    """A task of the harness from a file of questions."""
    from datasets import Dataset

    rows = _questions(path)
    return ConfigurableTask(
        config={
            "task": path.stem,
            "custom_dataset": lambda **_: {"test": Dataset.from_list(rows)},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "query",
            "doc_to_choice": "choices",
            "doc_to_target": "gold",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        }
    )


def _questions(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of questions, their queries as they are put to the model. Raises InputError."""
    rows = []
    try:
        for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                query, choices, gold = row["query"], row["choices"], row["gold"]
                if not (isinstance(query, str) and isinstance(choices, list) and len(choices) > 1):
                    raise ValueError
                if not all(isinstance(choice, str) and choice for choice in choices):
                    raise ValueError
                if not (isinstance(gold, int) and 0 <= gold < len(choices)):
                    raise ValueError
            except (ValueError, KeyError, TypeError):
                raise InputError(
                    f"'{path}', line {number}: not a JSON object with 'query', 'choices' (at least two) and 'gold', the"
                    " number of the right one from 0."
                ) from None
            query = query.rstrip()
            if re.search(r"^Question:", query, re.MULTILINE) and not query.endswith("Answer:"):
                query += "\nAnswer:"
            rows.append({"query": query, "choices": choices, "gold": gold})
    except UnicodeDecodeError as error:
        raise InputError(f"'{path}' is not UTF-8 text (byte {error.start}): convert it first.") from None
    except OSError as error:
        raise InputError(f"tasks file '{path}' cannot be read: {error.strerror}.") from None
    if not rows:
        raise InputError(f"tasks file '{path}' is empty.")
    return rows
