"""Encoder-decoders from text to text: T5, BART, Pegasus, Marian, mBART, M2M100, LED and their kin.

A source is one of

    pairs.jsonl, .json, .csv, .tsv, .parquet, hf:DATASET[:CONFIG[:SPLIT]]
                        `text` (or `source`) and `target` of each row: what is read, and what is to be written
    any other text      (`prunella.texts`; `pydoc` is the default): each sample is a run of tokens, of which the first
                        part is read and the rest is to be written
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..calibrate import check_tokens, context, tokenized
from ..errors import InputError, ModelError, say
from ..model.checkpoint import Source
from ..model.network import Model
from ..model.tokenizer import load_tokenizer
from ..samples import Batch, Samples
from ..texts import documents, is_prose, not_empty, records
from .registry import register_task
from .targets import AT, Targets, built_for, enough, of_network, reaching, say_cut, written

READ = 512  # tokens that a sample reads where nobody says how many
WRITTEN = 128  # and writes
PROMPT = "The most important thing about a garden is the soil, since all that grows there lives on it."


@register_task("seq2seq")
class Seq2Seq(Targets):
    """Encoder-decoders, on texts and what is to be made of them."""

    source = "pydoc"
    auto = "AutoModelForSeq2SeqLM"
    kind = "encoder-decoder"

    def __init__(
        self,
        *,
        length: int | None = None,
        target_length: int | None = None,
        prefix: str = "",
        text: str = "",
        target: str = "target",
        source_lang: str = "",
        target_lang: str = "",
    ):
        """
        Args:
            length: tokens that are read, at most; None: 512, or the model's context if that is shorter.
            target_length: tokens that are written, at most; None: 128, or the context if that is shorter.
            prefix: what is put before each text, `summarize: ` say.
            text: the column of a table that is read; by default `text`, or `source` where there is none.
            target: the column that is to be written.
            source_lang: the language that is read, as the tokenizer calls it (mBART: en_XX), where it knows several.
            target_lang: the language that is written.
        """
        self.length = length
        self.target_length = target_length
        self.prefix = prefix
        self.columns = ((text,) if text else ("text", "source"), target)
        self.languages = {"src_lang": source_lang, "tgt_lang": target_lang}

    @classmethod
    def claims(cls, name: str, config: Mapping[str, Any]) -> bool:
        return bool(config.get("is_encoder_decoder")) and built_for(
            "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES", config
        )

    def admit(self, name: str, config: Any) -> None:
        if not config.is_encoder_decoder:
            raise ModelError(
                f"'{name}' is no encoder-decoder: {config.model_type} is one network from end to end. Leave --task out,"
                " and its config says what it is for."
            )

    def load_processor(self, directory: Path, name: str, remote_code: bool) -> Any:
        return load_tokenizer(directory, name, remote_code)

    # --- samples

    def samples(
        self, model: Model, source: str, count: int | None, *, used: int = 0, seed: int = 0, test: bool = False
    ) -> Samples:
        if model.tokenizer is None:
            raise InputError(f"model '{model.name}' has no tokenizer, so the text of '{source}' cannot be used.")
        length = min(READ, context(model)) if self.length is None else self.length
        write = min(WRITTEN, context(model)) if self.target_length is None else self.target_length
        if min(length, write) < 4 or max(length, write) > context(model):
            raise InputError(
                f"{length} tokens to read and {write} to write: both are between 4 and the model's context"
                f" of {context(model)}."
            )
        if not is_prose(source):
            split: Any = "test" if test else "train"
            rows = records(source, _row, (*self.columns[0], self.columns[1]), split)
            first = next(rows, None)
            if first is not None and self.columns[1] in first[1]:
                return self._pairs(model, source, itertools.chain([first], rows), count, used, (length, write))
            say(f"'{source}' has no '{self.columns[1]}': the beginning of each text is read, the rest is to be written")
        return self._continued(model, source, count, used, (length, write), test)

    def _pairs(
        self,
        model: Model,
        source: str,
        rows: Iterable[tuple[str, Mapping[str, Any]]],
        count: int | None,
        used: int,
        lengths: tuple[int, int],
    ) -> Samples:
        """Rows of a table, counted as such."""
        found, cut = list[Batch](), [0, 0]
        texts, target = self.columns
        for number, (place, row) in enumerate(rows, 1):
            if number <= used:
                continue
            key = next((key for key in texts if key in row), texts[0])
            with self._speaking(model.tokenizer):
                read = _ids(model.tokenizer, lengths[0], text=self.prefix + not_empty(row.get(key), key, place))
                wrote = _ids(model.tokenizer, lengths[1], text_target=not_empty(row.get(target), target, place))
            cut = [cut[0] + read[1], cut[1] + wrote[1]]
            one = {"input_ids": torch.tensor([read[0]]), "labels": torch.tensor([wrote[0]])}
            found.append(reaching(one, number))
            if len(found) == count:
                break
        enough(len(found), count, used, source, "pairs")
        say_cut(cut[0], len(found), "texts", lengths[0])
        say_cut(cut[1], len(found), "targets", lengths[1])
        return Samples.gathered(found)

    def _continued(
        self, model: Model, source: str, count: int | None, used: int, lengths: tuple[int, int], test: bool
    ) -> Samples:
        """Runs of a text's tokens, counted in these."""
        tokenizer = model.tokenizer
        with self._speaking(tokenizer):
            (start, end), (begin, stop) = _frame(tokenizer, target=False), _frame(tokenizer, target=True)
        prefix = tokenizer(self.prefix, add_special_tokens=False)["input_ids"] if self.prefix else []
        start = [*start, *prefix]
        read, write = lengths[0] - len(start) - len(end), lengths[1] - len(begin) - len(stop)
        if min(read, write) < 1:
            raise InputError(f"{lengths[0]} tokens to read have no room for text beside the prefix '{self.prefix}'.")
        text = documents(source, tokenizer, "test" if test else "train")
        needed = None if count is None else used + count * (read + write)
        ids = tokenized(tokenizer, text, needed)[used:]
        own_NL = torch.tensor(ids[: len(ids) // (read + write) * (read + write)]).view(-1, read + write)[:count]
        enough(len(own_NL), count, used, source, f"runs of {read + write} tokens")
        count = len(own_NL)

        def framed(before: list[int], text_NL: Tensor, after: list[int]) -> Tensor:
            ends = (torch.tensor(some, dtype=torch.long).expand(count, -1) for some in (before, after))
            return torch.cat([next(ends), text_NL, next(ends)], 1)

        found = {
            "input_ids": framed(start, own_NL[:, :read], end),
            "labels": framed(begin, own_NL[:, read:], stop),
            AT: used + torch.arange(1, count + 1) * (read + write),
        }
        return Samples.of(found)

    @contextlib.contextmanager
    def _speaking(self, tokenizer: Any) -> Iterator[None]:
        """The tokenizer set to the languages that were asked for."""
        asked = {key: lang for key, lang in self.languages.items() if lang}
        for key in asked:
            if not hasattr(tokenizer, key):
                raise InputError(f"the tokenizer of this model knows no languages: leave {key} out.")
        before = {key: getattr(tokenizer, key) for key in asked}
        try:
            for key, lang in asked.items():
                setattr(tokenizer, key, lang)
            yield
        finally:
            for key, lang in before.items():
                setattr(tokenizer, key, lang)

    def about(self, samples: Samples) -> dict[str, Any]:
        lengths = {group["input_ids"].shape[1] for group in samples.groups if "input_ids" in group}
        return {"length": self.length or (lengths.pop() if len(lengths) == 1 else None)}

    def example(self, network: nn.Module) -> Batch:
        return {"input_ids": torch.arange(3, 11)[None], "labels": torch.arange(3, 8)[None]}

    def check(self, model: Model, samples: Samples) -> None:
        for group in samples.groups:
            if "input_ids" not in group:
                raise InputError(f"samples of seq2seq are `input_ids` and `labels`; these are {', '.join(group)}.")
            hidden = group.get("attention_mask")
            if bool((group.get("labels", group["input_ids"]) < 0).any()) or (hidden is not None and not hidden.all()):
                raise InputError(
                    "these samples are padded, which would count as text: give those of a shape as groups."
                )
            check_tokens(model, group["input_ids"], "texts")
        super().check(model, samples)

    # --- what the network makes of them

    def run(self, network: Any, batch: Batch, **options: Any) -> Any:
        """The decoder is given the labels shifted right, as the network does it, or `decoder_input_ids`."""
        given = of_network(batch)
        if "decoder_input_ids" not in given:
            given["decoder_input_ids"] = shifted_right(network, batch["labels"])
        return network(**given, use_cache=False, **options)

    # --- what a report says

    def specimen(self, model: Model, checkpoint: Source | None = None, tokens: int = 24) -> str | None:
        """What it writes, greedily, of a fixed text, where the whole model fits comfortably in memory."""
        if not model.fits():
            return None
        with self._speaking(model.tokenizer):
            inputs = model.tokenizer(self.prefix + PROMPT, return_tensors="pt").to(model.device)
        if inputs.input_ids.shape[1] > context(model):
            return None
        started = self.languages["tgt_lang"] and model.tokenizer.convert_tokens_to_ids(self.languages["tgt_lang"])
        with model.whole(checkpoint) as network, torch.no_grad():
            ids = network.generate(
                inputs.input_ids,
                attention_mask=inputs.attention_mask,
                max_new_tokens=tokens,
                do_sample=False,
                num_beams=1,
                **({"forced_bos_token_id": started} if started else {}),
            )
        return written(model.tokenizer.decode(ids[0], skip_special_tokens=True))


def shifted_right(network: Any, labels_BM: Tensor) -> Tensor:
    """What a decoder is given to predict these labels: all but the last, behind the token that it begins with. Raises
    ModelError where the network does not say which that is."""
    if hasattr(network, "prepare_decoder_input_ids_from_labels"):
        ids_BM: Tensor = network.prepare_decoder_input_ids_from_labels(labels=labels_BM)
        return ids_BM
    config = network.config
    start = getattr(config, "decoder_start_token_id", None)
    start = getattr(config, "bos_token_id", None) if start is None else start
    if start is None:
        raise ModelError(
            f"the config of this {type(network).__name__} has no decoder_start_token_id: what its decoder begins with"
            " is not known."
        )
    return torch.cat([labels_BM.new_full((len(labels_BM), 1), start), labels_BM[:, :-1]], 1)


def _row(row: Any, place: str) -> tuple[str, Mapping[str, Any]]:
    if not isinstance(row, Mapping):
        raise InputError(f"{place}: not a JSON object.")
    return place, row


def _ids(tokenizer: Any, length: int, **text: str) -> tuple[list[int], bool]:
    """The tokens of a text, so many at most, and whether there were more."""
    ids: list[int] = tokenizer(**text, verbose=False)["input_ids"]
    if len(ids) <= length:
        return ids, False
    return tokenizer(**text, truncation=True, max_length=length)["input_ids"], True


def _frame(tokenizer: Any, *, target: bool) -> tuple[list[int], list[int]]:
    """The tokens that a tokenizer puts before and behind a text that is read, or written."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole: list[int] = (tokenizer(text_target="a") if target else tokenizer("a"))["input_ids"]
    for at in range(len(whole) - len(plain), -1, -1):
        if plain and whole[at : at + len(plain)] == plain:
            return whole[:at], whole[at + len(plain) :]
    return [], [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
