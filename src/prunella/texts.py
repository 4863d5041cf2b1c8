"""From the name of a text to its documents, or to rows of which a task makes samples.

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
import re
import sys
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple, TypeVar

from .errors import InputError, first_line, say, unknown

T = TypeVar("T")
Split = Literal["train", "test"]
PASSAGE = 5  # words that a passage has at least


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
    return records(source, partial(_document, tokenizer=tokenizer), ("text", "messages"), split)


def records(
    source: str, make: Callable[[Any, str], T | None], columns: Collection[str], split: Split = "train"
) -> Iterator[T]:
    """What `make(row, place)` makes of each row of a source: a row is a mapping with these columns, as far as it has
    them, or whatever else stands in a file of JSON; its place is in words, for errors. None passes it over. A file that
    is one document has one row, its `text`. Raises InputError, too where a table has none of the columns."""
    if source == "pydoc":
        from pydoc_data import topics

        made = (make({"text": topics.topics[key]}, f"pydoc, '{key}'") for key in sorted(topics.topics))
        return (one for one in made if one is not None)
    if found := _hub(source, split):
        return _dataset(*found, make, columns)
    path = Path(source)
    if read := _reader(path):
        if not path.is_file():
            raise InputError(f"text file '{source}' does not exist.")
        return _file(path, *read, make, columns)
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


def is_prose(source: str) -> bool:
    """Is a row of this source a whole document, to be cut, and not one text of many?"""
    read = _reader(Path(source))
    return source == "pydoc" or (read is not None and read[1] is _plain)


def passages(document: str) -> list[str]:
    """A document cut at empty lines; what is shorter than a few words (headings, say) is left out."""
    cut = (" ".join(part.split()) for part in re.split(r"\n\s*\n", document))
    return [part for part in cut if part.count(" ") + 1 >= PASSAGE]


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


def _document(row: Any, place: str, *, tokenizer: Any) -> str | None:
    """The text of a row: its `text`, or its `messages` as the chat template writes them; None where it has neither,
    as tables have rows with nothing in a column."""
    if not isinstance(row, Mapping) or not row.keys() & {"text", "messages"}:
        raise InputError(f"{place}: not a JSON object with a 'text' field, nor one with 'messages'.")
    text, messages = row.get("text"), row.get("messages")
    if text is None and messages is not None:
        text = _conversation(messages, place, tokenizer)
    return None if text is None else checked_text(text, place)


def checked_text(text: Any, place: str, column: str = "text") -> str:
    """A text as it is. Raises InputError for what is none."""
    if not isinstance(text, str):
        raise InputError(f"{place}: '{column}' is not a string.")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(f"{place}: the text holds half of a surrogate pair, which is no character.") from None
    return text


def not_empty(text: Any, column: str, place: str) -> str:
    """A text that is to be written, or that was said: not empty. Raises InputError."""
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"{place}: '{column}' is no text that says something.")
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

_Rows = Iterator[tuple[str, Any]]  # each with its place, in words
_Read = Callable[[IO[bytes], str, Collection[str]], _Rows]  # of a file, its name in quotes, the columns that are wanted


def _file(
    path: Path,
    open_: Callable[..., Any],
    rows: _Read,
    make: Callable[[Any, str], T | None],
    columns: Collection[str],
) -> Iterator[T]:
    found = False
    try:
        with open_(path, "rb") as file:
            for place, row in rows(file, f"'{path}'", columns):
                made = make(row, place)
                if made is not None:
                    found = found or rows is not _plain or bool(row["text"].strip())
                    yield made
    except UnicodeDecodeError as error:
        where = f" (byte {error.start})" if rows is _plain else ""
        raise InputError(f"'{path}' is not UTF-8 text{where}: convert it first.") from None
    except OSError as error:
        raise InputError(f"text file '{path}' cannot be read: {error.strerror or first_line(error)}.") from None
    except (EOFError, zlib.error, lzma.LZMAError, csv.Error) as error:
        raise InputError(f"text file '{path}' is damaged: {first_line(error)}.") from None
    if not found:
        raise InputError(f"text file '{path}' is empty.")


def _decoded(file: IO[bytes], newline: str | None = None) -> io.TextIOWrapper:
    """A file decoded from UTF-8, without a byte order mark."""
    return io.TextIOWrapper(file, encoding="utf-8-sig", newline=newline)


def _plain(file: IO[bytes], name: str, columns: Collection[str]) -> _Rows:
    text = _decoded(file).read()
    yield name, {"text": text}


def _json_lines(file: IO[bytes], name: str, columns: Collection[str]) -> _Rows:
    return _objects(_decoded(file), name)


def _objects(lines: Iterable[str], name: str) -> _Rows:
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                yield f"{name}, line {number}", json.loads(line)
            except (ValueError, RecursionError):
                yield f"{name}, line {number}", None  # not an object


def _json(file: IO[bytes], name: str, columns: Collection[str]) -> _Rows:
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


def _csv(file: IO[bytes], name: str, columns: Collection[str], delimiter: str = ",") -> _Rows:
    csv.field_size_limit(sys.maxsize)  # a document is one field
    rows = csv.DictReader(_decoded(file, newline=""), delimiter=delimiter)
    _check_columns(rows.fieldnames or (), name, columns)
    for row in rows:
        yield f"{name}, line {rows.line_num}", row


def _tsv(file: IO[bytes], name: str, columns: Collection[str]) -> _Rows:
    return _csv(file, name, columns, "\t")


def _parquet(file: IO[bytes], name: str, columns: Collection[str]) -> _Rows:
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


def _check_columns(names: Iterable[str], name: str, columns: Collection[str]) -> list[str]:
    """Those of the columns that are there. Raises InputError if there is none."""
    found = [column for column in names if column in columns]
    if not found:
        first, *more = columns
        nor = "".join(f", nor '{column}'" for column in more)
        raise InputError(f"{name} has no '{first}' column{nor}; it has: {', '.join(names) or 'none'}.")
    return found


_READERS: dict[str, _Read] = {
    ".txt": _plain,
    ".jsonl": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _tsv,
    ".parquet": _parquet,
}
_COMPRESSED: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_ENDINGS = f"{', '.join(_READERS)}, or one of them in {', '.join(_COMPRESSED)}"


def _reader(path: Path) -> tuple[Callable[..., Any], _Read] | None:
    """How a file is opened and read, by the ending of its name; None for one that is not text."""
    kind, packed = path.suffix.lower(), None
    if kind in _COMPRESSED:
        kind, packed = Path(path.stem).suffix.lower(), kind
    return (_COMPRESSED[packed] if packed else open, _READERS[kind]) if kind in _READERS else None


# ---------------------------------------------------------------------------------------------------------
# Data sets of the hub


class ClassName(str):
    """The name of a class in a data set of the hub, with its number there."""

    number: int

    @classmethod
    def of(cls, names: list[str], number: int) -> ClassName:
        made = cls(names[number])
        made.number = number
        return made


def _dataset(
    name: str, config: str | None, split: str, make: Callable[[Any, str], T | None], columns: Collection[str]
) -> Iterator[T]:
    try:
        import datasets
    except ImportError:
        raise InputError("data sets of the hub need the package datasets: pip install 'prunella[data]'.") from None
    say(f"reading the data set {name} ({config or 'default'}, {split}) from the hub")
    try:
        data = datasets.load_dataset(name, config, split=split, streaming=True)
        features: Mapping[str, Any] = getattr(data, "features", None) or {}
        classes = {column: f.names for column, f in features.items() if column in columns and hasattr(f, "names")}
        for number, row in enumerate(data, 1):
            if number == 1:
                _check_columns(row, f"data set '{name}'", columns)
            for column, names in classes.items():
                if isinstance(row[column], int) and 0 <= row[column] < len(names):
                    row = {**row, column: ClassName.of(names, row[column])}
            made = make(row, f"data set '{name}', row {number}")
            if made is not None:
                yield made
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"data set '{name}' cannot be read: {first_line(error)}") from None
