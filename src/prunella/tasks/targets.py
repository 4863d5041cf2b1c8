"""Networks that write a text: what tasks have in common whose samples come with the text to write."""

from __future__ import annotations

import inspect
import itertools
import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..calibrate import check_tokens
from ..compat import quiet_transformers
from ..errors import EndlessError, InputError, ModelError, first_line, say
from ..model.checks import check_config
from ..model.divergence import kl
from ..model.network import Model
from ..model.open import open_files
from ..model.task import NO_ANSWERS, Answers, Task
from ..overlap import fingerprint, joined
from ..samples import TARGET, Batch, Samples
from ..texts import documents, passages

IGNORED = -100  # a label that is none, as transformers writes it
UNKNOWN = -1  # a label that the dense network gives
AT = "at"  # among a group's tensors: how far into its source each sample reaches, as the source is counted


class Targets(Task):
    """Networks that predict a text, token by token, of something they are given.

    A group of samples has `labels` (n, M) beside what the network is called with: of each prediction the token that is
    right, -100 where none is asked for, -1 where it is what the dense network says. What a task has to say besides:
    `auto` and `kind`, the class of transformers that builds its networks and what they are called, and `claims`.
    """

    figure = "target perplexity"
    many = None
    auto = ""
    kind = ""

    def open(self, name: str, **options: Any) -> Model:
        opening = {"processor": self.load_processor, **options}
        return open_files(name, self, self.auto, self.kind, admit=self.admit, check=lambda model: None, **opening)

    def wrap(self, network: Any, tokenizer: Any = None, name: str = "") -> Model:
        check_config(network)
        self.admit(name or "in memory", network.config)
        return super().wrap(network, tokenizer, name)

    @abstractmethod
    def admit(self, name: str, config: Any) -> None:
        """Raises ModelError for a config of a network that is for something else, with the task that takes it."""

    @abstractmethod
    def load_processor(self, directory: Path, name: str, remote_code: bool) -> Any:
        """What makes samples, from a model's directory; None where it has none. Raises ModelError."""

    def reads(self, model: Model) -> bool:
        return model.tokenizer is not None

    def size(self, samples: Samples) -> int:
        """As the source is counted, which the samples know that were read from one."""
        ends = [int(group[AT].max()) for group in samples.groups if AT in group]
        return max(ends) if ends else len(samples)

    def check(self, model: Model, samples: Samples) -> None:
        for group in samples.groups:
            check_labels(self, model, group)
        super().check(model, samples)

    def lacks(self, group: Batch) -> bool:
        return "labels" in group and TARGET not in group and bool((group["labels"] == UNKNOWN).any())

    def target(self, outputs: Any, batch: Batch) -> Tensor:
        """Labels (B, M), the most likely tokens among them where they were not known."""
        return torch.where(batch["labels"] == UNKNOWN, outputs.logits.argmax(-1), batch["labels"])

    def losses(self, outputs: Any, batch: Batch) -> Tensor:
        """Mean negative log-likelihood per target token of each sample."""
        # One at a time: in float32 its logits are as large as all of them in bfloat16.
        each = zip(outputs.logits, _asked(batch), strict=True)
        return torch.stack([cross_entropy(logits_MV.float(), labels_M) for logits_MV, labels_M in each])

    def parts(self, run: Any, batch: Batch) -> Iterator[Tensor]:
        """One part, in float64 if the logits are."""
        (logits_MV,), (labels_M,) = run().logits, _asked(batch)
        yield cross_entropy(logits_MV.to(torch.promote_types(logits_MV.dtype, torch.float32)), labels_M)

    def divergence(self, outputs: Any, teacher: Any, batch: Batch, *, temperature: float = 1.0) -> Tensor:
        """tau^2 KL(teacher || model), mean over target tokens."""
        asked_BM = batch["labels"] != IGNORED
        return kl(outputs.logits[asked_BM], teacher.logits[asked_BM], temperature)

    def answers(self, outputs: Any, batch: Batch) -> Answers:
        """How many target tokens there are, and how many of them are the most likely ones."""
        labels_BM = _asked(batch)
        asked_BM = labels_BM != IGNORED
        right_BM = (outputs.logits.argmax(-1) == labels_BM) & asked_BM
        return {"right": right_BM.sum(1), "asked": asked_BM.sum(1)}

    def scores(
        self,
        model: Model,
        samples: Samples,
        losses: Sequence[float],
        answers: Answers = NO_ANSWERS,
        dense: Answers = NO_ANSWERS,
    ) -> dict[str, Any]:
        """exp of the mean negative log-likelihood over all target tokens, how many there are, and the share of those
        that are the most likely ones."""
        if not losses:
            return {self.figure: None}
        counts = [int(n) for n in answers["asked"]]
        mean = sum(loss * n for loss, n in zip(losses, counts, strict=True)) / sum(counts)
        found: dict[str, Any] = {"samples": len(losses), self.figure: math.exp(min(mean, 700.0)), "tokens": sum(counts)}
        return {**found, "right": int(answers["right"].sum()) / sum(counts), "losses": list(losses)}

    def fingerprint(self, samples: Samples) -> str:
        texts = [group[key] for group in samples.groups for key in ("input_ids", "labels") if key in group]
        return joined(*(fingerprint(text_NL.clamp(min=0)) for text_NL in texts))


def check_labels(task: Task, model: Model, group: Batch) -> None:
    """Raises InputError for labels that are none, (n, M) of the network's tokens."""
    if "labels" not in group or group["labels"].ndim != 2 or group["labels"].is_floating_point():
        raise InputError(
            f"samples of task '{task.name}' hold the tokens to write, `labels` (n, M) of integers; these are"
            f" {', '.join(f'{key} {tuple(tensor.shape)}' for key, tensor in group.items())}."
        )
    if bool((group["labels"] == IGNORED).all(1).any()):
        raise InputError(f"a sample of task '{task.name}' has no token to write: all its labels are {IGNORED}.")
    check_tokens(model, group["labels"].clamp(min=0), "texts to write")


def _asked(batch: Batch) -> Tensor:
    """Of each prediction the token that is right, (B, M)."""
    return batch[TARGET] if TARGET in batch else batch["labels"]


def built_for(table: str, config: Mapping[str, Any]) -> bool:
    """Does a config name a class that stands in this table of transformers' auto classes?"""
    from transformers.models.auto import modeling_auto

    return not {*getattr(modeling_auto, table).values()}.isdisjoint(config.get("architectures") or ())


def reaching(one: Batch, at: int) -> Batch:
    """A sample, {argument: (1, …)}, which reaches to this place of its source."""
    return {**one, AT: torch.tensor([at])}


def taken(network: nn.Module, made: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a processor made, as far as the network takes it; a mask that hides nothing is left out."""
    takes = inspect.signature(network.forward).parameters
    return {k: t for k, t in made.items() if k in takes and not (k == "attention_mask" and bool(t.all()))}


def load_processor(directory: Path, name: str, remote_code: bool) -> Any:
    """What turns sounds or pictures, and texts, into tensors; None where a directory has none. Raises ModelError."""
    from transformers import AutoProcessor

    if not any(directory.glob("*processor_config.json")):
        return None
    try:
        with quiet_transformers():
            return AutoProcessor.from_pretrained(directory, trust_remote_code=remote_code)
    except Exception as error:
        raise ModelError(f"the processor of '{name}' cannot be read: {first_line(error)}") from None


def sentences(words: int) -> Iterator[str]:
    """Texts of so many words without end: what is given where nobody says what a sound or a picture says."""
    each = (" ".join(passage.split()[:words]) for one in documents("pydoc") for passage in passages(one))
    return itertools.cycle(each)


def of_network(batch: Batch) -> dict[str, Tensor]:
    """A batch without what the network is not called with."""
    return {key: tensor for key, tensor in batch.items() if key not in ("labels", AT, TARGET)}


def enough(found: int, count: int | None, used: int, source: str, what: str) -> None:
    """Raises InputError where a source has too few samples, or none."""
    if found < (count or 1):
        before = f" after the first {used} of it, which are held out," if used else ""
        asked = f", but {count} are asked for (--samples, --windows)" if count else ""
        raise InputError(f"'{source}' holds{before} {found or 'no'} {what}{asked}.")


def has_end(source: str, count: int | None, endless: str) -> None:
    """Raises EndlessError where all of a source is asked for that has no end."""
    if count is None and source == endless:
        raise EndlessError(f"'{source}' has no end: say how many samples of it, or give another source.")


def say_cut(cut: int, count: int, what: str, length: int) -> None:
    """That some samples are longer than what is taken of them."""
    if cut:
        say(f"{cut} of {count} {what} are longer than {length} tokens, and cut there")


def written(text: str) -> str:
    """A text on one line."""
    return " ".join(text.split())
