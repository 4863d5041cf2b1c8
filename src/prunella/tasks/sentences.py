"""Networks that are run on whole texts, one text or a pair a sample: what their tasks have in common.

A source is one of `prunella.texts`. A row is a text, with its pair and its label where there are columns for them; what
is one document (`pydoc`, a .txt file) is cut at empty lines into passages. Each sample goes as long as it is: samples
are grouped by their length, and nothing is padded.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..calibrate import check_tokens, context, positions
from ..errors import EndlessError, InputError, ModelError, say
from ..model.checks import check_config
from ..model.files import read_json
from ..model.network import Model
from ..model.task import Counts, Task
from ..overlap import fingerprint, joined
from ..samples import TARGET, Batch, Samples
from ..texts import checked_text, endless, is_prose, passages, records

LONGEST = 512  # tokens of a text, where nobody says how many, and the model takes more
LABELS = "labels"  # among the tensors of samples: what is right
_SENTENCES = "sentence_bert_config.json"  # sentence-transformers' word on how long texts are


@dataclass(frozen=True)
class Row:
    """A text, maybe its pair and its label, and where it stands, in words."""

    text: str
    pair: str | None
    label: Any
    place: str


class Sentences(Task):
    """Networks of transformers on whole texts."""

    source = "pydoc"
    many = None
    counts = Counts(128, 512)

    def __init__(self, *, length: int | None, text: str, pair: str, label: str = "label"):
        """
        Args:
            length: tokens of a sample, at most; None: 512, or what the model takes.
            text, pair, label: the columns.
        """
        self.length = length
        self.columns = {"text": text, "pair": pair, "label": label}

    def wrap(self, network: Any, tokenizer: Any = None, name: str = "") -> Model:
        check_config(network)
        self.admit(name or "in memory", network.config)
        model = super().wrap(network, tokenizer, name)
        try:
            self.check_network(model)
        except ModelError:
            model.give_back()
            raise
        return model

    def admit(self, name: str, config: Any) -> None:
        """Raises ModelError for a config of a network that is for something else, with the task that takes it."""

    def check_network(self, model: Model) -> None:
        """Raises ModelError for a network that this task cannot run."""

    # --- samples

    def reads(self, model: Model) -> bool:
        return model.tokenizer is not None

    def example(self, network: nn.Module) -> Batch:
        return {"input_ids": torch.arange(3, 11)[None]}

    def longest(self, model: Model) -> int:
        """How many tokens a sample has at most. Raises InputError for more than the model takes."""
        most = min(context(model), positions(model) or context(model))
        if self.length is not None and self.length > most:
            raise InputError(
                f"texts of {self.length} tokens are longer than the model's {most} positions: use fewer (--length)."
            )
        if self.length is not None:
            return self.length
        said = read_json(model.checkpoint.directory / _SENTENCES).get("max_seq_length") if model.checkpoint else None
        own = (most, getattr(model.tokenizer, "model_max_length", None), said)
        return min(LONGEST, *(int(length) for length in own if isinstance(length, int | float) and length > 0))

    def rows(self, model: Model, source: str, count: int | None, used: int, test: bool) -> list[Row]:
        """So many rows of a source, or all, after those that are used. Raises InputError where there are too few of
        them, or no end."""
        if count is None and endless(source):
            raise EndlessError(f"'{source}' has no end in sight: say how many samples.")
        if model.tokenizer is None:
            raise InputError(f"model '{model.name}' has no tokenizer, so the texts of '{source}' cannot be used.")
        empty = 0

        def rows() -> Iterator[Row]:
            nonlocal empty
            split: Any = "test" if test else "train"
            for row in records(source, self.read_row, (*self.columns.values(),), split):
                for text in passages(row.text) if is_prose(source) else [row.text]:
                    if text.strip():
                        yield Row(text, row.pair, row.label, row.place)
                    else:
                        empty += 1

        found = list(itertools.islice(rows(), None if count is None else used + count))
        if empty:
            say(f"{empty} rows of '{source}' have no text, and are left out")
        usual = count == (self.counts.evaluate if test else self.counts.calibration)  # nobody asked for so many
        if len(found) < used + (1 if usual else count or 1):
            before = f" and {used} before them are calibrated on" if used else ""
            raise InputError(
                f"'{source}' holds {len(found)} texts, but {count or 'more'} are asked for{before}: ask for fewer"
                " (--samples, --windows)."
            )
        return found[used:]

    def read_row(self, row: Any, place: str) -> Row:
        """A row of a source. Raises InputError for what is none."""
        column = self.columns["text"]
        if not isinstance(row, Mapping):
            raise InputError(f"{place}: no JSON object (is the line cut off?).")
        if column not in row:
            raise InputError(
                f"{place}: no '{column}'; it has: {', '.join(map(str, row)) or 'nothing'}. Another column can be named,"
                f" --set {self.name}.text=NAME."
            )
        text, pair = row[column], row.get(self.columns["pair"])
        label = row.get(self.columns["label"])
        return Row(
            "" if text is None else checked_text(text, place, column),
            None if pair is None or pair == "" else checked_text(pair, place, self.columns["pair"]),
            None if label == "" else label,
            place,
        )

    def encode(self, model: Model, rows: Sequence[Row]) -> list[dict[str, list[int]]]:
        """The tokens of each row, with segment ids where the network takes them; cut to `longest`, which is said."""
        longest, kept = self.longest(model), ["input_ids"]
        if "token_type_ids" in arguments(model.network):
            kept.append("token_type_ids")
        found, cut = list[dict[str, list[int]]](), 0
        for row in rows:
            own = model.tokenizer.num_special_tokens_to_add(pair=row.pair is not None)
            if longest <= own:
                raise InputError(f"{longest} tokens have no room for text: the tokenizer adds {own} of its own.")
            one = model.tokenizer(row.text, row.pair, verbose=False)
            if len(one["input_ids"]) > longest:
                cut += 1
                one = model.tokenizer(row.text, row.pair, truncation=True, max_length=longest, verbose=False)
            if not one["input_ids"]:
                raise InputError(f"{row.place}: the model's tokenizer finds no tokens in this text.")
            found.append({key: list(one[key]) for key in kept if key in one})
        if cut:
            say(f"{cut} of {len(rows)} texts are longer than {longest} tokens, and cut there")
        return found

    def check(self, model: Model, samples: Samples) -> None:
        takes = arguments(model.network)
        for group in samples.groups:
            if "input_ids" not in group:
                raise InputError(f"samples of texts are token ids, `input_ids`; these are {', '.join(group)}.")
            for key in group:
                if key not in takes and key not in (LABELS, TARGET):
                    raise InputError(f"{type(model.network).__name__} takes no '{key}': leave it out of the samples.")
            ids_NL, seen_NL = group["input_ids"], group.get("attention_mask")
            if ids_NL.ndim != 2 or not ids_NL.numel() or ids_NL.is_floating_point():
                raise InputError(f"token ids are integers of shape (N, L), not {tuple(ids_NL.shape)}.")
            check_tokens(model, ids_NL, "texts")
            if seen_NL is not None and not seen_NL.all():
                raise InputError(
                    "the attention_mask of these samples hides tokens, which would count as text: give samples of"
                    " different lengths as groups, without padding."
                )
            segments, known = group.get("token_type_ids"), getattr(model.network.config, "type_vocab_size", None)
            if segments is not None and known and int(segments.max()) >= known:
                raise InputError(
                    f"segment id {int(segments.max())} (token_type_ids) is none of the {known} that the model has."
                )
        super().check(model, samples)

    def fingerprint(self, samples: Samples) -> str:
        return joined(*(fingerprint(group["input_ids"]) for group in samples.groups))

    # --- what the network makes of them

    def run(self, network: nn.Module, batch: Batch, **options: Any) -> Any:
        if "use_cache" in arguments(network):
            options = {"use_cache": False, **options}
        return network(**{key: value for key, value in batch.items() if key not in (LABELS, TARGET)}, **options)


def bare(network: Any) -> Any:
    """A network without what several processes put around it."""
    return network.module if isinstance(network, nn.parallel.DistributedDataParallel) else network


def arguments(network: nn.Module) -> Mapping[str, Any]:
    """What a network is called with, by its class: its own `forward` may be a stand-in's."""
    return inspect.signature(type(bare(network)).forward).parameters


def right_of(batch: Batch) -> Tensor:
    """What outputs are compared with: labels, or else what the dense network answered. Raises InputError."""
    right = batch.get(LABELS, batch.get(TARGET))
    if right is None:
        raise InputError("these samples have no labels, and no answers of the dense network in their place.")
    return right


def tensors(encoded: Sequence[Mapping[str, list[int]]]) -> list[dict[str, Tensor]]:
    """Encoded rows, each as a batch of its own, {argument: (1, L)}."""
    return [{key: torch.tensor([ids]) for key, ids in one.items()} for one in encoded]
