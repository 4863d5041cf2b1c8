"""From the name of a text to its documents.

A source is one of

    notes.txt                    a file that is one document
    corpus.jsonl, .json          JSON lines or an array, an object with `text`, or with `messages`, a document
    table.parquet, .csv, .tsv    the same by columns
    corpus.jsonl.gz              any of them compressed: .gz, .bz2, .xz
    hf:DATASET[:CONFIG[:SPLIT]]  a data set of the hub, its `text` or `messages` column
    c4, wikitext2                two of them by their usual names: the train split to calibrate and heal on, the test
                                 split to evaluate on
    pydoc                        the documentation inside every Python; no network
    self                         text that the dense model samples itself (see `prunella.calibrate`)

`messages` are a conversation, written down by the model's own chat template.
"""

from __future__ import annotations

import bz2
import contextlib
import csv
import gzip
import io
import itertools
import json
import lzma
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

from .errors import InputError, first_line, say, unknown

Split = Literal["train", "test"]
_Rows = Iterator[tuple[str, Any]]  # each with its place, in words
_COLUMNS = ("text", "messages")  # of a table whose rows are documents


class _Named(NamedTuple):
    """A data set of the hub, and which of its splits is for what."""

    name: str
    config: str
    train: str
    test: str
    short: bool  # is its test split evaluated as a whole?


_NAMED = {
    "c4": _Named("allenai/c4", "en", "train", "validation", short=False),
    "wikitext2": _Named("Salesforce/wikitext", "wikitext-2-raw-v1", "train", "test", short=True),
}


def documents(source: str, tokenizer: Any = None, split: Split = "train") -> Iterator[str]:
    """The documents of a source that is text, one by one. Raises InputError.

    Args:
        tokenizer: with the chat template for conversations.
        split: what a data set that goes by its usual name is wanted for.
    """
    if source == "pydoc":
        from pydoc_data import topics

        return iter([topics.topics[key] for key in sorted(topics.topics)])
    if found := _hub(source, split):
        return _texts(_dataset(*found, _COLUMNS), tokenizer)
    path = Path(source)
    if read := _reader(path):
        if not path.is_file():
            raise InputError(f"text file '{source}' does not exist.")
        return _documents(_file(path, *read, _COLUMNS), tokenizer, path, read[1] is _plain)
    if path.is_dir() and source:
        raise InputError(
            f"'{source}' is a directory: give a file in it, or hf:{source} for a data set that lies there."
        )
    if path.is_file():
        raise InputError(
            f"'{source}' is none of the files that are read as text: {_ENDINGS}. Convert it, or rename it."
        )
    known = [*_NAMED, "pydoc", "self"]
    raise InputError(unknown("text", source, known) + f" Or give a file ({_ENDINGS}), or hf:DATASET[:CONFIG[:SPLIT]].")


def records(source: str, columns: Sequence[str], split: Split = "train") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The rows of a source that is a table (JSON lines, CSV, parquet, a data set of the hub), one by one, each with its
    place in words. Columns beside these need not be there. Raises InputError for what is no table, and for a row that
    is no object.

    Args:
        columns: those that are of interest; at least one of them is there.
        split: as for `documents`.
    """
    if found := _hub(source, split):
        rows = _dataset(*found, columns)
    elif (read := _reader(path := Path(source))) and read[1] is not _plain:
        if not path.is_file():
            raise InputError(f"file '{source}' does not exist.")
        rows = _file(path, *read, columns)
    else:
        tables = ", ".join(ending for ending, reader in _READERS.items() if reader is not _plain)
        raise InputError(
            f"'{source}' is no table: give a file ({tables}), or hf:DATASET[:CONFIG[:SPLIT]], with"
            f" {' and '.join(map(repr, columns))}."
        )
    place = ""
    for place, row in rows:
        if not isinstance(row, Mapping):
            raise InputError(f"{place}: not a JSON object.")
        yield place, row
    if not place:
        raise InputError(f"'{source}' is empty.")


def is_table(source: str) -> bool:
    """Is a source a file of rows with columns, or a data set of the hub?"""
    read = _reader(Path(source))
    return source.startswith("hf:") or (read is not None and read[1] is not _plain)


def same_text(source: str, tested: str) -> bool:
    """Is `source`, as a text to calibrate and heal on, the text that `tested` is to evaluate on? It may be a file or a
    data set by two names."""
    one, other = _hub(source, "train"), _hub(tested, "test")
    if one or other:
        return one == other
    return source == tested or same_file(source, tested)


def same_file(name: str, other: str) -> bool:
    """Are these two names of one file or directory?"""
    return Path(name).exists() and Path(other).exists() and Path(name).samefile(other)


def endless(source: str) -> bool:
    """Is the text too long to be read as a whole?"""
    return _hub(source, "test") is not None and not (source in _NAMED and _NAMED[source].short)


def _hub(source: str, split: Split) -> tuple[str, str | None, str] | None:
    """Data set, config and split of a source on the hub; None for any other."""
    if source in _NAMED:
        named = _NAMED[source]
        return named.name, named.config, named.train if split == "train" else named.test
    if not source.startswith("hf:"):
        return None
    name, _, rest = source[3:].partition(":")
    config, _, own = rest.partition(":")
    return name, config or None, own or "train"


# ---------------------------------------------------------------------------------------------------------
# A document of a row


def _documents(rows: _Rows, tokenizer: Any, path: Path, plain: bool) -> Iterator[str]:
    """The documents of a file. Raises InputError where it has none, or is a plain text of white space."""
    found = False
    for text in _texts(rows, tokenizer):
        found = found or not plain or bool(text.strip())
        yield text
    if not found:
        raise InputError(f"text file '{path}' is empty.")


def _texts(rows: _Rows, tokenizer: Any) -> Iterator[str]:
    for place, row in rows:
        if (text := _document(row, place, tokenizer)) is not None:
            yield text


def _document(row: Any, place: str, tokenizer: Any) -> str | None:
    """The text of a row: its `text`, or its `messages` as the chat template writes them; None where it has neither,
    as tables have rows with nothing in a column."""
    if not isinstance(row, Mapping) or not row.keys() & {"text", "messages"}:
        raise InputError(f"{place}: not a JSON object with a 'text' field, nor one with 'messages'.")
    text, messages = row.get("text"), row.get("messages")
    if text is None and messages is not None:
        text = _conversation(messages, place, tokenizer)
    if text is None:
        return None
    if not isinstance(text, str):
        raise InputError(f"{place}: 'text' is not a string.")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(f"{place}: the text holds half of a surrogate pair, which is no character.") from None
    return text


def _conversation(messages: Any, place: str, tokenizer: Any) -> str:
    if getattr(tokenizer, "chat_template", None) is None:
        raise InputError(
            f"{place}: 'messages' need a chat template to be written down, and the model has none: give a 'text' field."
        )
    if not isinstance(messages, list) or not all(
        isinstance(message, Mapping)
        and isinstance(message.get("role"), str)
        and message.keys() & {"content", "tool_calls"}
        for message in messages
    ):
        raise InputError(f"{place}: 'messages' are no list of objects with 'role' and 'content'.")
    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as error:  # of the template, which says what it does not take
        raise InputError(f"{place}: the model's chat template refuses these messages: {first_line(error)}") from None
    return text.removeprefix(tokenizer.decode(lead(tokenizer)))  # each window gets it


def lead(tokenizer: Any) -> list[int]:
    """The tokens that the tokenizer puts before every text: a BOS, or none."""
    plain: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole: list[int] = tokenizer("a")["input_ids"]
    starts = (at for at in range(len(whole)) if plain and whole[at : at + len(plain)] == plain)
    return whole[: next(starts, 0)]


# ---------------------------------------------------------------------------------------------------------
# Files


def _file(
    path: Path,
    open_: Callable[..., Any],
    rows: Callable[[IO[bytes], str, Sequence[str]], _Rows],
    columns: Sequence[str],
) -> _Rows:
    try:
        with open_(path, "rb") as file:
            yield from rows(file, f"'{path}'", columns)
    except UnicodeDecodeError as error:
        where = f" (byte {error.start})" if rows is _plain else ""
        raise InputError(f"'{path}' is not UTF-8 text{where}: convert it first.") from None
    except OSError as error:
        raise InputError(f"text file '{path}' cannot be read: {error.strerror or first_line(error)}.") from None
    except (EOFError, zlib.error, lzma.LZMAError, csv.Error) as error:
        raise InputError(f"text file '{path}' is damaged: {first_line(error)}.") from None


def _decoded(file: IO[bytes], newline: str | None = None) -> io.TextIOWrapper:
    """A file decoded from UTF-8, without a byte order mark."""
    return io.TextIOWrapper(file, encoding="utf-8-sig", newline=newline)


def _plain(file: IO[bytes], name: str, columns: Sequence[str]) -> _Rows:
    text = _decoded(file).read()
    yield name, {"text": text}


def _json_lines(file: IO[bytes], name: str, columns: Sequence[str]) -> _Rows:
    return _objects(_decoded(file), name)


def _objects(lines: Iterable[str], name: str) -> _Rows:
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                yield f"{name}, line {number}", json.loads(line)
            except (ValueError, RecursionError):
                yield f"{name}, line {number}", None  # not an object


def _json(file: IO[bytes], name: str, columns: Sequence[str]) -> _Rows:
    """An array, one object, or JSON lines, which many .json files hold."""
    text, start = _decoded(file), list[str]()
    for line in text:
        start.append(line)
        if line.strip():
            break
    else:
        return
    with contextlib.suppress(ValueError, RecursionError):
        if isinstance(json.loads(start[-1]), Mapping):
            yield from _objects(itertools.chain(start, text), name)
            return
    whole = "".join(start) + text.read()
    try:
        value = json.loads(whole)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name} is neither JSON nor JSON lines: {first_line(error)}.") from None
    if isinstance(value, list):
        yield from ((f"{name}, entry {number}", entry) for number, entry in enumerate(value, 1))
    else:
        yield name, value


def _csv(file: IO[bytes], name: str, columns: Sequence[str], delimiter: str = ",") -> _Rows:
    csv.field_size_limit(sys.maxsize)  # a document is one field
    rows = csv.DictReader(_decoded(file, newline=""), delimiter=delimiter)
    _check_columns(rows.fieldnames or (), name, columns)
    for row in rows:
        yield f"{name}, line {rows.line_num}", row


def _tsv(file: IO[bytes], name: str, columns: Sequence[str]) -> _Rows:
    return _csv(file, name, columns, "\t")


def _parquet(file: IO[bytes], name: str, columns: Sequence[str]) -> _Rows:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise InputError("parquet files need the package pyarrow: pip install 'prunella[data]'.") from None
    number = 0
    try:
        table = ParquetFile(file)
        wanted = _check_columns(table.schema_arrow.names, name, columns)
        for batch in table.iter_batches(batch_size=256, columns=wanted):
            for row in batch.to_pylist():
                number += 1
                yield f"{name}, row {number}", row
    except ArrowException as error:
        raise InputError(f"text file {name} is damaged: {first_line(error)}.") from None


def _check_columns(names: Iterable[str], name: str, columns: Sequence[str]) -> list[str]:
    """Those of the columns that are there. Raises InputError if none is."""
    found = [column for column in names if column in columns]
    if not found:
        first, *others = map(repr, columns)
        wanted = " nor ".join((f"{first} column,", *others)) if others else f"{first} column"
        raise InputError(f"{name} has no {wanted}; it has: {', '.join(names) or 'none'}.")
    return found


_READERS: dict[str, Callable[[IO[bytes], str, Sequence[str]], _Rows]] = {
    ".txt": _plain,
    ".jsonl": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _tsv,
    ".parquet": _parquet,
}
_COMPRESSED: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_ENDINGS = f"{', '.join(_READERS)}, or one of them in {', '.join(_COMPRESSED)}"


def _reader(path: Path) -> tuple[Callable[..., Any], Callable[[IO[bytes], str, Sequence[str]], _Rows]] | None:
    """How a file is opened and read, by the ending of its name; None for one that is not text."""
    kind, packed = path.suffix.lower(), None
    if kind in _COMPRESSED:
        kind, packed = Path(path.stem).suffix.lower(), kind
    return (_COMPRESSED[packed] if packed else open, _READERS[kind]) if kind in _READERS else None


# ---------------------------------------------------------------------------------------------------------
# Data sets of the hub


def _dataset(name: str, config: str | None, split: str, columns: Sequence[str]) -> _Rows:
    try:
        import datasets
    except ImportError:
        raise InputError("data sets of the hub need the package datasets: pip install 'prunella[data]'.") from None
    say(f"reading the data set {name} ({config or 'default'}, {split}) from the hub")
    try:
        for number, row in enumerate(datasets.load_dataset(name, config, split=split, streaming=True), 1):
            if number == 1:
                _check_columns(row, f"data set '{name}'", columns)
            yield f"data set '{name}', row {number}", row
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"data set '{name}' cannot be read: {first_line(error)}") from None
