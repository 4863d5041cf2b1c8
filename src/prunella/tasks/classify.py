"""Classifiers of texts and of pairs of texts: encoders, and decoders with a classification head."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from ..errors import InputError, ModelError, say
from ..model.divergence import kl
from ..model.files import read_json
from ..model.names import find_directory
from ..model.network import Model
from ..model.open import open_files
from ..model.task import NO_ANSWERS, Answers
from ..samples import TARGET, Batch, Samples
from ..texts import ClassName
from .heads import HEAD, label_names, with_head
from .registry import register_task
from .scores import class_answers, class_scores
from .sentences import LABELS, Row, Sentences, bare, right_of, tensors

_HIDDEN = -1  # the label of rows whose label a data set of the hub keeps to itself


@register_task("classify")
class Classify(Sentences):
    """Classifiers of texts."""

    figure = "accuracy"
    higher = True
    unit = "%"

    def __init__(self, *, length: int | None = None, text: str = "text", pair: str = "text_pair", label: str = "label"):
        """
        Args:
            length: tokens of a sample, at most: what is longer is cut, and counted; None: 512, or what the model takes.
            text: the column with the text.
            pair: the column with the second text of a pair, if there is one.
            label: the column with the label, if there is one.
        """
        super().__init__(length=length, text=text, pair=pair, label=label)

    @classmethod
    def claims(cls, name: str, config: Mapping[str, Any]) -> bool:
        return any(str(one).endswith(HEAD) for one in config.get("architectures") or ())

    def open(self, name: str, **options: Any) -> Model:
        auto = f"AutoModel{HEAD}"
        return open_files(
            name, self, auto, "classifier of texts", admit=self.admit, check=self.check_network, **options
        )

    def begun(self, name: str, folder: Path, sources: Sequence[str], *, seed: int = 0, **options: Any) -> str:
        """A network without a head for classes gets one, for the labels in the sources."""
        trust = {key: options[key] for key in ("remote_code", "pickles") if key in options}
        config = read_json(find_directory(name, **trust) / "config.json")
        if self.claims(name, config):
            return name
        own = {key: options[key] for key in ("remote_code", "dtype") if key in options}
        return str(with_head(name, folder, label_names(self, sources), seed=seed, **own))

    def admit(self, name: str, config: Any) -> None:
        built = getattr(config, "architectures", None) or ()
        if built and not self.claims("", {"architectures": built}) and name != "in memory":
            raise ModelError(
                f"'{name}' is no classifier of texts: its config.json names {built[0]}, which has no head for classes."
                " Leave --task out, and its config says what it is for; prunella heal --task classify --train all gives"
                " it a head."
            )
        if config.problem_type == "multi_label_classification":
            raise ModelError(
                f"'{name}' gives each text several labels (problem_type multi_label_classification), which task"
                " 'classify' does not: it takes one class a text, or one number."
            )
        if config.num_labels == 1 and config.problem_type == "single_label_classification":
            raise ModelError(
                f"'{name}' has one class (num_labels 1), of which nothing can be learned: set problem_type to"
                " regression in its config.json where it predicts a number."
            )

    # --- samples

    def samples(
        self, model: Model, source: str, count: int | None, *, used: int = 0, seed: int = 0, test: bool = False
    ) -> Samples:
        rows = self.rows(model, source, count, used, test)
        each = tensors(self.encode(model, rows))
        labels = self._labels(model, rows, source, test)
        return Samples.gathered(
            each if labels is None else [one | {LABELS: labels[n : n + 1]} for n, one in enumerate(each)]
        )

    def _labels(self, model: Model, rows: Sequence[Row], source: str, test: bool) -> Tensor | None:
        """The label of each row; None where none has one. Raises InputError where some have none, or one that the
        model does not know."""
        known = [row for row in rows if row.label is not None and row.label != _HIDDEN]
        if not known:
            return None
        if len(known) < len(rows):
            missing = next(row.place for row in rows if row.label is None or row.label == _HIDDEN)
            raise InputError(f"{missing}: no '{self.columns['label']}', which other rows have: label all, or none.")
        if strange := next((row for row in rows if not isinstance(row.label, str | int | float)), None):
            raise InputError(f"{strange.place}: the label {strange.label!r} is neither a name nor a number.")
        if _is_regression(model.network.config):
            return torch.tensor([_number(row) for row in rows])
        names = {int(number): str(name) for number, name in model.network.config.id2label.items()}
        numbers = matched([row.label for row in rows], names, [row.place for row in rows])
        shown = {str(row.label): number for row, number in zip(rows, numbers, strict=True)}
        said = ", ".join(f"{label} is {number} ({names[number]})" for label, number in sorted(shown.items()))
        if test:
            say(f"labels of '{source}': {said}")
        if len(shown) == 1 and len(rows) > 1:
            say(f"all {len(rows)} texts of '{source}' have one label: if the source is sorted by it, shuffle it")
        return torch.tensor(numbers)

    def lacks(self, group: Batch) -> bool:
        return LABELS not in group and TARGET not in group

    def target(self, outputs: Any, batch: Batch) -> Tensor:
        """The dense network's own answer: its class, or its number."""
        logits_BC: Tensor = outputs.logits
        return logits_BC[:, 0].float() if logits_BC.shape[1] == 1 else logits_BC.argmax(1)

    def check(self, model: Model, samples: Samples) -> None:
        classes = model.network.config.num_labels
        for group in samples.groups:
            labels = group.get(LABELS)
            if labels is None:
                continue
            if labels.ndim != 1 or (labels.is_floating_point() != _is_regression(model.network.config)):
                kind = "numbers" if classes == 1 else "integers"
                raise InputError(f"labels are {kind} of shape (N,), not {labels.dtype} {tuple(labels.shape)}.")
            if classes > 1 and not (int(labels.min()) >= 0 and int(labels.max()) < classes):
                wrong = int(labels.min()) if int(labels.min()) < 0 else int(labels.max())
                raise InputError(f"label {wrong} is out of range: the model has {classes} classes, 0 to {classes - 1}.")
        super().check(model, samples)

    # --- what the network makes of them

    def run(self, network: nn.Module, batch: Batch, **options: Any) -> Any:
        with _no_padding(network):
            return super().run(network, batch, **options)

    def losses(self, outputs: Any, batch: Batch) -> Tensor:
        """The cross entropy of each sample; of a network that predicts a number, the squared error."""
        logits_BC = outputs.logits.to(torch.promote_types(outputs.logits.dtype, torch.float32))
        right = right_of(batch)
        if logits_BC.shape[1] == 1:
            return mse_loss(logits_BC[:, 0], right.to(logits_BC.dtype), reduction="none")
        return cross_entropy(logits_BC, right, reduction="none")

    def divergence(self, outputs: Any, teacher: Any, batch: Batch, *, temperature: float = 1.0) -> Tensor:
        """KL(teacher || model), mean over samples; of numbers, the mean squared difference."""
        if outputs.logits.shape[1] == 1:
            return mse_loss(outputs.logits.float(), teacher.logits.float())
        return kl(outputs.logits, teacher.logits, temperature)

    # --- what a report says

    def answers(self, outputs: Any, batch: Batch) -> Answers:
        if outputs.logits.shape[1] == 1:
            return {"value": outputs.logits[:, 0].float()}
        return class_answers(outputs.logits, batch.get(LABELS))

    def scores(
        self,
        model: Model,
        samples: Samples,
        losses: Sequence[float],
        answers: Answers = NO_ANSWERS,
        dense: Answers = NO_ANSWERS,
    ) -> dict[str, Any]:
        if not losses:
            return {"accuracy": None}
        if "value" in answers:
            found = {"figure": "loss", "higher": False, "unit": "", **super().scores(model, samples, losses)}
            return found | ({"moved": (answers["value"] - dense["value"]).abs().mean().item()} if dense else {})
        found = class_scores(self.figure, losses, answers, dense)
        names = model.network.config.id2label
        if found["figure"] == self.figure:
            counted = Counter(label for group in samples.groups for label in group[LABELS].tolist())
            found["classes"] = {str(names[number]): counted[number] for number in sorted(counted)}
            chance = 1 / len(names)
            if not dense and found["accuracy"] + 3 * found.get("error", 1.0) < chance:
                say(
                    f"the dense network is right on {found['accuracy']:.1%} of the samples, far below chance"
                    f" ({chance:.1%}): are the labels those of this model, in its order?"
                )
        return found


def _is_regression(config: Any) -> bool:
    return bool(config.num_labels == 1)


def _number(row: Row) -> float:
    try:
        return float(row.label)
    except (TypeError, ValueError):
        raise InputError(f"{row.place}: the label {row.label!r} is no number, which this model predicts.") from None


def matched(labels: Sequence[Any], names: Mapping[int, str], places: Sequence[str]) -> list[int]:
    """The number of each label among a model's classes, by its name (in any case) or, where it is a number, as it is.

    Names that a data set has for its numbers count, unless the model has none of its own (LABEL_0, LABEL_1 …). Raises
    InputError, naming the place, for a label that is neither, and where both readings fit and disagree.
    """
    by_name = {name.strip().casefold(): number for number, name in names.items()}
    own = any(not name.startswith("LABEL_") for name in names.values())

    def named(label: Any) -> int | None:
        return by_name.get(str(label).strip().casefold())

    def numbered(label: Any) -> int | None:
        if isinstance(label, ClassName):
            number: Any = None if own else label.number
        elif isinstance(label, bool):
            number = None
        else:
            try:
                number = float(label)
            except (TypeError, ValueError):
                number = None
        return int(number) if number is not None and number in names else None

    first: dict[Any, str] = {}
    for label, place in zip(labels, places, strict=True):
        first.setdefault(label, place)
    ways = [{label: read(label) for label in first} for read in (named, numbered)]
    good = [way for way in ways if None not in way.values()]
    shown = ", ".join(f"{number} {name}" for number, name in sorted(names.items())[:6])
    if not good:
        label = max(first, key=lambda label: [way[label] for way in ways].count(None))  # the first that fits least
        raise InputError(
            f"{first[label]}: label '{label}' is none of the model's {len(names)} classes ({shown}"
            f"{' …' if len(names) > 6 else ''}): give their names or numbers, or put the right names into id2label in"
            " its config.json."
        )
    if len(good) == 2 and good[0] != good[1]:
        label = next(label for label in first if ways[0][label] != ways[1][label])
        raise InputError(
            f"label '{label}' is a name of the model's classes ({shown}), and a number of another one: give names that"
            " are no numbers."
        )
    return [int(good[0][label] or 0) for label in labels]


@contextlib.contextmanager
def _no_padding(network: Any) -> Iterator[None]:
    """Let a decoder's head look at the last token, also where no token is known for padding: nothing is padded."""
    config = bare(network).config.get_text_config()
    if getattr(config, "pad_token_id", None) is not None:
        yield
        return
    config.pad_token_id = -1
    try:
        yield
    finally:
        config.pad_token_id = None
