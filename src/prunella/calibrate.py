"""From a text to windows of tokens.

A source is one of

    notes.txt, corpus.jsonl      a file (`text` field in JSON lines, one document a line)
    hf:DATASET[:CONFIG[:SPLIT]]  a data set of the hub, its `text` column
    c4, wikitext2                two of them by their usual names
    pydoc                        the documentation inside every Python; no network
    self                         text that the dense model samples itself

Documents are joined by an empty line, the text is tokenized once and cut into consecutive windows.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .errors import InputError, first_line, say, unknown
from .load import cache_directory

if TYPE_CHECKING:
    from .load import Model

NAMED = {
    "c4": ("allenai/c4", "en", "train"),
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", "test"),
}


def windows(model: Model, source: str, count: int, length: int, *, skip: int = 0, seed: int = 0) -> Tensor:
    """`count` consecutive windows of `length` tokens, (N, L) int64, after the first `skip` windows.

    Raises InputError if the source is unknown, unreadable, or too short; the error says how many tokens
    there are.
    """
    if count < 1 or length < 2:
        raise InputError(f"{count} windows of {length} tokens: at least 1 window of 2 tokens is needed.")
    limit = getattr(model.network.config, "max_position_embeddings", None) or length
    if length > limit:
        raise InputError(f"windows of {length} tokens are longer than the model's context of {limit}.")
    needed = (skip + count) * length
    if source == "self":
        return sample_self(model, skip + count, length, seed)[skip:]
    if model.tokenizer is None:
        raise InputError(f"model '{model.name}' has no tokenizer, so the text of '{source}' cannot be used.")
    ids = _tokenize(model.tokenizer, documents(source), needed)
    if len(ids) < needed:
        raise InputError(
            f"'{source}' holds {len(ids):,} tokens, but {skip + count} windows of {length} take {needed:,}"
            + (f" ({skip} of them held out for calibration)" if skip else "")
            + ". Ask for fewer (--samples, --windows) or shorter (--length) windows, or give a longer text."
        )
    return torch.tensor(ids[skip * length : needed]).view(count, length)


def check_windows(model: Model, windows_NL: Tensor) -> None:
    """Raises InputError for what is no windows of the model's token ids, (N, L)."""
    if windows_NL.ndim != 2 or not windows_NL.numel() or windows_NL.is_floating_point():
        raise InputError(
            f"calibration windows are {str(windows_NL.dtype)[6:]} of shape {tuple(windows_NL.shape)}, expected token"
            " ids as integers of shape (N, L)."
        )
    size = model.network.get_input_embeddings().weight.shape[0]
    low, high = int(windows_NL.min()), int(windows_NL.max())
    if low < 0 or high >= size:
        raise InputError(f"token {low if low < 0 else high} lies outside the model's vocabulary of {size:,}.")


def all_windows(model: Model, source: str, length: int) -> Tensor:
    """The whole source in windows of `length` tokens, (N, L); what is left over at the end is dropped."""
    if source == "self":
        raise InputError("the text that a model writes itself has no end: say how many windows (--windows).")
    if model.tokenizer is None:
        raise InputError(f"model '{model.name}' has no tokenizer, so the text of '{source}' cannot be used.")
    ids = _tokenize(model.tokenizer, documents(source), None)
    return windows(model, source, max(1, len(ids) // length), length)


def up_to(model: Model, source: str, count: int, length: int, seed: int = 0) -> Tensor:
    """The first `count` windows of `length` tokens, (N, L), or as many as the source holds: maybe none."""
    if source == "self":
        return windows(model, source, count, length, seed=seed)
    if model.tokenizer is None:
        raise InputError(f"model '{model.name}' has no tokenizer, so the text of '{source}' cannot be used.")
    ids = _tokenize(model.tokenizer, documents(source), count * length)
    found = min(count, len(ids) // length)
    return torch.tensor(ids[: found * length], dtype=torch.int64).view(found, length)


def _tokenize(tokenizer: Any, docs: Iterator[str], needed: int | None) -> list[int]:
    """Token ids of the joined documents: all of them, or at least `needed` where there are that many.

    Only as much text is read as it takes. Tokenizing the beginning of a text gives the beginning of its
    tokens, up to a word at the cut; a margin keeps that word out.
    """
    text, chars, exhausted = "", sys.maxsize if needed is None else needed * 6, False
    while True:
        parts = [text] if text else []
        size = len(text)
        for document in docs:
            parts.append(document)
            size += len(document)
            if size > chars:
                break
        else:
            exhausted = True
        text = "\n\n".join(parts)
        whole = exhausted and len(text) <= chars
        ids: list[int] = tokenizer(text if whole else text[:chars], verbose=False)["input_ids"]
        if whole or needed is None or len(ids) >= needed + 64:
            return ids
        chars *= 2


def documents(source: str) -> Iterator[str]:
    """The documents of a source that is text, one by one. Raises InputError."""
    if source == "pydoc":
        from pydoc_data import topics

        return iter([topics.topics[key] for key in sorted(topics.topics)])
    if source in NAMED:
        return _dataset(*NAMED[source])
    if source.startswith("hf:"):
        name, _, rest = source[3:].partition(":")
        config, _, split = rest.partition(":")
        return _dataset(name, config or None, split or "train")
    path = Path(source)
    if path.suffix in (".txt", ".jsonl"):
        if not path.is_file():
            raise InputError(f"text file '{source}' does not exist.")
        return _file(path)
    known = [*NAMED, "pydoc", "self"]
    raise InputError(unknown("text", source, known) + " Or give a .txt or .jsonl file, or hf:DATASET[:CONFIG[:SPLIT]].")


def _file(path: Path) -> Iterator[str]:
    try:
        if path.suffix == ".txt":
            text = path.read_text(encoding="utf-8")
            if not text.strip():
                raise InputError(f"text file '{path}' is empty.")
            yield text
            return
        found = False
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    text = json.loads(line)["text"]
                except (ValueError, KeyError, TypeError, RecursionError):
                    raise InputError(f"'{path}', line {number}: not a JSON object with a 'text' field.") from None
                if not isinstance(text, str):
                    raise InputError(f"'{path}', line {number}: 'text' is not a string.")
                found = True
                yield text
        if not found:
            raise InputError(f"text file '{path}' is empty.")
    except UnicodeDecodeError as error:
        raise InputError(f"'{path}' is not UTF-8 text (byte {error.start}): convert it first.") from None
    except OSError as error:
        raise InputError(f"text file '{path}' cannot be read: {error.strerror}.") from None


def _dataset(name: str, config: str | None, split: str) -> Iterator[str]:
    try:
        import datasets
    except ImportError:
        raise InputError("data sets of the hub need the package datasets: pip install 'prunella[data]'.") from None
    say(f"reading the data set {name} ({config or 'default'}, {split}) from the hub")
    try:
        rows = datasets.load_dataset(name, config, split=split, streaming=True)
        for row in rows:
            yield row["text"]
    except KeyError:
        raise InputError(f"data set '{name}' has no 'text' column.") from None
    except Exception as error:
        raise InputError(f"data set '{name}' cannot be read: {first_line(error)}") from None


def sample_self(model: Model, count: int, length: int, seed: int, *, batch: int = 16) -> Tensor:
    """Windows that the dense model writes itself, (N, L): each starts from the beginning-of-text token (or,
    without one, a random token) and every further token is drawn from the model's own distribution.

    Batch b is drawn with seed + b, so that more windows begin with the same ones. Kept in the cache.
    """
    key = hashlib.sha256(f"{_fingerprint(model)}|{length}|{seed}|{batch}".encode()).hexdigest()[:16]
    path = cache_directory() / "self" / f"{key}.safetensors"
    with contextlib.suppress(OSError, SafetensorError, KeyError):  # a damaged one is made again
        have: Tensor = load_file(path)["windows"]
        if len(have) >= count:
            return have[:count]
    say(f"sampling {count} windows of {length} tokens from the dense model")
    first = getattr(model.tokenizer, "bos_token_id", None)
    parts = []
    with model.whole() as network, torch.no_grad(), torch.random.fork_rng():
        for number in range(-(-count // batch)):
            torch.manual_seed(seed + number)
            start = torch.full((batch, 1), first or 0)
            if first is None:
                start = torch.randint(network.config.vocab_size, (batch, 1))
            ids = network.generate(
                start.to(model.device),
                attention_mask=torch.ones_like(start).to(model.device),
                do_sample=True,
                top_k=0,
                top_p=1.0,
                temperature=1.0,
                repetition_penalty=1.0,
                min_new_tokens=length - 1,
                max_new_tokens=length - 1,
                pad_token_id=0,
            )
            parts.append(ids.cpu())
    out = torch.cat(parts)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}")
        save_file({"windows": out}, temporary)
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        say(f"the text is not kept for another run, since '{path.parent}' cannot be written ({first_line(error)})")
    return out[:count]


def _fingerprint(model: Model) -> str:
    """What the model's weights are, as far as names, sizes and a few values tell."""
    if model.checkpoint is not None:
        files = [(model.checkpoint.directory / name).stat() for name in model.checkpoint.files]
        return repr([(str(model.checkpoint.directory), s.st_size, s.st_mtime_ns) for s in files] + [str(model.dtype)])
    some: Iterable[Tensor] = itertools.islice(model.network.parameters(), 8)
    return repr([(tuple(p.shape), p.float().sum().item()) for p in some])
