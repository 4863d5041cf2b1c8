"""Every kind of source gives its documents, or says what would."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from prunella import InputError, Model, load_model
from prunella.calibrate import all_windows, windows
from prunella.texts import ClassName, documents, is_prose, passages, records, same_text

TEXTS = [f"Document {n} tells of {n} pruned branches.\nThey grew back." for n in range(60)]


LINES = "".join(json.dumps({"text": text, "n": 1}) + "\n" for text in TEXTS)
TALK = [{"role": "user", "content": "What grows?"}, {"role": "assistant", "content": "A branch."}]


@pytest.fixture(scope="module")
def model(llama: Path) -> Model:
    return load_model(str(llama))


def write_csv(path: Path, delimiter: str = ",") -> None:
    with path.open("w", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows([["n", "text"], *([1, text] for text in TEXTS)])


def write_parquet(path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    from pyarrow import table

    parquet.write_table(table({"n": list(range(60)), "text": TEXTS}), path, row_group_size=7)


FORMS: dict[str, Callable[[Path], Any]] = {
    "docs.jsonl": lambda path: path.write_text(LINES),
    "DOCS.JSONL": lambda path: path.write_text(LINES),
    "gaps.jsonl": lambda path: path.write_text("\n" + LINES.replace("\n", "\r\n\n")),
    "marked.jsonl": lambda path: path.write_text("\ufeff" + LINES, encoding="utf-8"),
    "array.json": lambda path: path.write_text(json.dumps([{"text": text} for text in TEXTS], indent=1)),
    "short.json": lambda path: path.write_text("\ufeff" + json.dumps([{"text": text} for text in TEXTS])),
    "lines.json": lambda path: path.write_text("\n" + LINES),
    "one.Json": lambda path: path.write_text(json.dumps({"text": "\n\n".join(TEXTS)}, indent=1)),
    "docs.jsonl.gz": lambda path: path.write_bytes(gzip.compress(LINES.encode())),
    "docs.Json.GZ": lambda path: path.write_bytes(gzip.compress(LINES.encode("utf-8-sig"))),
    "docs.txt.bz2": lambda path: path.write_bytes(bz2.compress("\n\n".join(TEXTS).encode())),
    "docs.jsonl.xz": lambda path: path.write_bytes(lzma.compress(LINES.encode())),
    "docs.TXT": lambda path: path.write_text("\n\n".join(TEXTS)),
    "marked.txt": lambda path: path.write_text("\n\n".join(TEXTS), encoding="utf-8-sig"),
    "docs.csv": write_csv,
    "docs.tsv": lambda path: write_csv(path, "\t"),
    "docs.parquet": write_parquet,
}


@pytest.mark.parametrize("name", FORMS)
def test_the_same_text_in_any_form_is_the_same(name: str, tmp_path: Path) -> None:
    FORMS[name](tmp_path / name)
    assert "\n\n".join(documents(str(tmp_path / name))) == "\n\n".join(TEXTS)


def test_a_field_of_a_table_may_be_long_and_rows_may_be_empty(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table

    long = "word " * 50_000
    (tmp_path / "a.csv").write_text(f"text,n\n{long},1\n\n")
    write_table(pyarrow.table({"text": [None, long, None]}), tmp_path / "a.parquet")
    for name in ("a.csv", "a.parquet"):
        assert list(documents(str(tmp_path / name))) == [long]


# ---------------------------------------------------------------------------------------------------------
# Conversations


@pytest.mark.parametrize("name", ["talk.jsonl", "talk.json", "talk.parquet"])
def test_a_conversation_is_written_by_the_models_chat_template(name: str, model: Model, tmp_path: Path) -> None:
    path = tmp_path / name
    if name.endswith("parquet"):
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow.parquet import write_table

        write_table(pyarrow.table({"messages": [TALK, TALK], "n": [1, 2]}), path)
    else:
        path.write_text((json.dumps({"messages": TALK}) + "\n") * 2)
    expected = model.tokenizer.apply_chat_template(TALK, tokenize=False)
    assert "user: What grows?" in expected
    assert list(documents(str(path), model.tokenizer)) == [expected] * 2


def test_text_goes_before_messages(model: Model, tmp_path: Path) -> None:
    path = tmp_path / "both.jsonl"
    path.write_text(json.dumps({"text": "own", "messages": TALK}) + "\n" + json.dumps({"text": None, "messages": TALK}))
    own, talk = documents(str(path), model.tokenizer)
    assert own == "own"
    assert "What grows?" in talk


def test_a_template_that_begins_with_bos_adds_none_to_that_of_the_window(bos: Path, tmp_path: Path) -> None:
    model = load_model(str(bos))
    (tmp_path / "talk.jsonl").write_text((json.dumps({"messages": TALK}) + "\n") * 9)
    model.tokenizer.chat_template = "{{ bos_token }}" + model.tokenizer.chat_template
    found = windows(model, str(tmp_path / "talk.jsonl"), 3, 16)
    assert found[:, 0].tolist() == [1, 1, 1]
    assert not (found[:, 1:] == 1).any()


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hello", "no list of objects with 'role' and 'content'"),
        ([{"from": "human", "value": "hello"}], "no list of objects with 'role' and 'content'"),
        ([{"role": "robot", "content": "hello"}], "template refuses these messages: only people"),
    ],
)
def test_messages_that_cannot_be_written_are_named(messages: Any, message: str, llama: Path, tmp_path: Path) -> None:
    model = load_model(str(llama))
    model.tokenizer.chat_template = (
        "{% if messages[0]['role'] != 'user' %}{{ raise_exception('only people') }}{% endif %}"
    )
    path = tmp_path / "talk.jsonl"
    path.write_text(json.dumps({"messages": TALK}) + "\n" + json.dumps({"messages": messages}))
    with pytest.raises(InputError, match=rf"talk\.jsonl', line 2: .*{message}"):
        list(documents(str(path), model.tokenizer))


def test_messages_without_a_template_say_what_would_work(tmp_path: Path) -> None:
    (tmp_path / "talk.jsonl").write_text(json.dumps({"messages": TALK}))
    with pytest.raises(InputError, match=r"line 1: 'messages' need a chat template .* give a 'text' field"):
        list(documents(str(tmp_path / "talk.jsonl")))


# ---------------------------------------------------------------------------------------------------------
# What cannot be read


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "is empty"),
        ("a.txt", b" \n\t\n", "is empty"),
        ("a.jsonl", b"\n\n", "is empty"),
        ("a.txt", b"fine until \xff\xfe here", r"is not UTF-8 text \(byte 11\)"),
        ("a.jsonl", b'{"text": "\xff"}', "is not UTF-8 text"),
        ("a.jsonl", b'{"text": "one"}\n\n{"text": \n', "line 3: not a JSON object with a 'text' field"),
        ("a.jsonl", b'{"text": "one"}\n{"txt": "two"}\n', "line 2: not a JSON object with a 'text' field"),
        ("a.jsonl", b'["text"]\n', "line 1: not a JSON object with a 'text' field"),
        ("a.jsonl", b'{"text": 3}\n', "line 1: 'text' is not a string"),
        ("a.jsonl", rb'{"text": "\ud800"}', "line 1: the text holds half of a surrogate pair"),
        ("a.json", b" \n", "is empty"),
        ("a.json", b"[]", "is empty"),
        ("a.json", b'[{"text": "one"}, {"txt": 3}]', "entry 2: not a JSON object with a 'text' field"),
        ("a.json", b'[{"text": "one"},', "is neither JSON nor JSON lines"),
        ("a.json", b'[{"text": "\xff"}]', "is not UTF-8 text"),
        ("a.csv", b"", "has no 'text' column, nor 'messages'; it has: none"),
        ("a.csv", b"id,body\n1,x\n", "has no 'text' column, nor 'messages'; it has: id, body"),
        ("a.csv", b"text\n", "is empty"),
        ("a.txt.gz", b"not gzip", r"cannot be read: Not a gzipped file"),
        ("a.txt.gz", gzip.compress(b"The garden grows" * 99, mtime=0)[:30], "is damaged"),
        ("a.txt.xz", b"not xz", "is damaged"),
        ("a.parquet", b"not parquet", "is damaged"),
        ("a.md", b"# Notes", r"none of the files that are read as text: \.txt, .*\. Convert it, or rename it"),
        ("a.txt.zst", b"zstd", "none of the files that are read as text"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_with_the_place(
    model: Model, tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        windows(model, str(path), 1, 8)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere.txt", "text file 'nowhere.txt' does not exist"),
        ("nowhere.jsonl", "text file 'nowhere.jsonl' does not exist"),
        ("wikitext", "unknown text 'wikitext'. Did you mean 'wikitext2'"),
        ("notes.md", "unknown text 'notes.md'"),
        ("", "unknown text ''"),
        (".", r"'\.' is a directory: give a file in it, or hf:\. for"),
    ],
)
def test_an_unknown_source_is_named(model: Model, source: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        windows(model, source, 1, 8)


# ---------------------------------------------------------------------------------------------------------
# Data sets of the hub


@pytest.mark.parametrize(
    ("source", "arguments"),
    [
        ("c4", ("allenai/c4", "en", "train")),
        ("wikitext2", ("Salesforce/wikitext", "wikitext-2-raw-v1", "train")),
        ("hf:some/set", ("some/set", None, "train")),
        ("hf:some/set:small", ("some/set", "small", "train")),
        ("hf:some/set:small:dev", ("some/set", "small", "dev")),
        ("hf:some/set::dev", ("some/set", None, "dev")),
    ],
)
def test_a_data_set_is_asked_for_by_name_config_and_split_and_says_so(
    source: str, arguments: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    datasets = pytest.importorskip("datasets")
    asked: list[Any] = []

    def load_dataset(name: str, config: str | None, *, split: str, streaming: bool) -> Iterator[dict[str, str]]:
        asked.append((name, config, split))
        assert streaming
        return iter([{"text": "one"}, {"text": "two"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert list(documents(source)) == ["one", "two"]
    assert asked == [arguments]
    assert arguments[0] in capsys.readouterr().err


def test_a_local_data_set_is_read_like_one_of_the_hub(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "train.jsonl").write_text(LINES)
    assert list(documents(f"hf:{tmp_path}")) == TEXTS


@pytest.mark.parametrize(
    ("source", "split"), [("c4", "validation"), ("wikitext2", "test"), ("hf:some/set", "train"), ("hf:a/b::dev", "dev")]
)
def test_named_sets_are_evaluated_on_another_split_than_they_calibrate_on(
    source: str, split: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    asked: list[str] = []

    def load_dataset(*_: Any, split: str, streaming: bool) -> Iterator[dict[str, str]]:
        asked.append(split)
        return iter([{"text": "one"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    list(documents(source, split="test"))
    assert asked == [split]


@pytest.mark.parametrize(
    ("trained", "tested", "same"),
    [
        ("wikitext2", "wikitext2", False),
        ("c4", "c4", False),
        ("hf:some/set", "hf:some/set", True),
        ("hf:some/set", "hf:some/set::train", True),
        ("hf:some/set", "hf:some/set::test", False),
        ("wikitext2", "hf:Salesforce/wikitext:wikitext-2-raw-v1:train", True),
        ("hf:Salesforce/wikitext:wikitext-2-raw-v1:test", "wikitext2", True),
        ("pydoc", "pydoc", True),
        ("pydoc", "self", False),
        ("pydoc", "wikitext2", False),
    ],
)
def test_a_text_is_the_same_if_its_split_is(trained: str, tested: str, same: bool) -> None:
    assert same_text(trained, tested) == same


@pytest.mark.parametrize("source", ["c4", "hf:some/set", "wikitext2"])
def test_an_evaluation_on_a_data_set_without_end_ends(
    source: str, llama: Path, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    read = 0

    def rows(*_: Any, **__: Any) -> Iterator[dict[str, str]]:
        nonlocal read
        for read in range(20_000 if source == "wikitext2" else 10**9):  # noqa: B007
            yield {"text": "The garden grows."}

    monkeypatch.setattr(datasets, "load_dataset", rows)
    found = all_windows(model, source, 16, split="test")
    assert len(found) == 256 if source != "wikitext2" else len(found) > 256
    assert read < 20_000


def test_a_data_set_that_cannot_be_had_is_named_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def fail(*_: Any, **__: Any) -> Any:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(InputError, match=r"data set 'some/set' cannot be read: no route$"):
        list(documents("hf:some/set"))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: iter([{"body": "x"}]))
    with pytest.raises(InputError, match="data set 'some/set' has no 'text' column, nor 'messages'; it has: body"):
        list(documents("hf:some/set"))


# ---------------------------------------------------------------------------------------------------------
# Rows with more than a text


def pair(row: Any, place: str) -> tuple[str, str, str] | None:
    return None if row["text"] == "skip" else (row["text"], str(row.get("label")), place)


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv", ".tsv", ".parquet", ".jsonl.gz"])
def test_rows_come_with_the_columns_that_are_wanted(tmp_path: Path, ending: str) -> None:
    rows = [{"text": "a", "label": "x", "id": 1}, {"text": "skip", "label": "x", "id": 2}, {"text": "b", "label": "y"}]
    path = tmp_path / f"rows{ending}"
    if ending == ".parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
        pyarrow = pytest.importorskip("pyarrow")
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif ending in (".csv", ".tsv"):
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["text", "label", "id"], delimiter="," if ending == ".csv" else "\t")
            writer.writeheader()
            writer.writerows(rows)
    else:
        lines = "\n".join(map(json.dumps, rows)) if "l" in ending else json.dumps(rows)
        (gzip.open if ending.endswith("gz") else open)(path, "wt").write(lines)
    found = list(records(str(path), pair, ("text", "label")))
    assert [(text, label) for text, label, _ in found] == [("a", "x"), ("b", "y")]
    assert "rows" in found[1][2]
    assert "3" in found[1][2] or ending in (".csv", ".tsv")


def test_a_table_without_any_of_the_columns_says_which_it_has(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("words,grade\na,b\n")
    with pytest.raises(InputError, match=r"has no 'text' column, nor 'label'; it has: words, grade"):
        list(records(str(tmp_path / "x.csv"), pair, ("text", "label")))


def test_classes_of_a_data_set_of_the_hub_come_with_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])}
    )
    rows = datasets.Dataset.from_list([{"text": "a", "label": 1}, {"text": "b", "label": -1}], features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows.to_iterable_dataset())
    found = list(records("hf:some/set", lambda row, _: row["label"], ("text", "label")))
    assert found == ["good", -1]
    assert isinstance(found[0], ClassName)
    assert found[0].number == 1


def test_prose_is_cut_into_passages() -> None:
    assert is_prose("pydoc")
    assert is_prose("notes.txt.gz")
    assert not is_prose("notes.jsonl")
    assert not is_prose("hf:some/set")
    text = "Title\n\nOne two three\nfour five.\n \n\nsix seven eight nine ten eleven"
    assert passages(text) == ["One two three four five.", "six seven eight nine ten eleven"]
