from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

import prunella
from prunella import InputError, Model, load_model, read_masks
from prunella.calibrate import all_windows, documents, sample_self, windows
from prunella.load import wrap_model
from prunella.measure import held_out_windows
from prunella.recipe import Recipe

TEXTS = [f"Document {n} tells of {n} pruned branches.\nThey grew back." for n in range(60)]


@pytest.fixture(scope="module")
def model(llama: Path) -> Model:
    return load_model(str(llama))


def ids_of(model: Model, text: str) -> list[int]:
    ids: list[int] = model.tokenizer(text)["input_ids"]
    return ids


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    path = tmp_path / "docs.jsonl"
    path.write_text("\n".join(json.dumps({"text": t, "n": n}) + "\n" for n, t in enumerate(TEXTS)), encoding="utf-8")
    return path


@pytest.fixture
def txt(tmp_path: Path) -> Path:
    path = tmp_path / "whole.txt"
    path.write_text("\n\n".join(TEXTS), encoding="utf-8")
    return path


def test_documents_are_joined_by_an_empty_line_and_cut_into_consecutive_windows(
    model: Model, jsonl: Path, txt: Path
) -> None:
    expected = torch.tensor(ids_of(model, "\n\n".join(TEXTS))[: 7 * 16]).view(7, 16)
    for source in (jsonl, txt):
        found = windows(model, str(source), 7, 16)
        assert found.dtype == torch.int64
        assert torch.equal(found, expected)


@pytest.mark.parametrize("skip", [0, 1, 5])
def test_windows_after_skipped_ones_are_those_that_follow(model: Model, skip: int) -> None:
    first = windows(model, "pydoc", 9, 32)
    assert torch.equal(windows(model, "pydoc", 9 - skip, 32, skip=skip), first[skip:])


def test_reading_only_the_beginning_of_a_long_text_changes_no_token(model: Model) -> None:
    whole = all_windows(model, "pydoc", 64)
    assert len(whole) > 1000
    for count in (1, 2, 50, 333):
        assert torch.equal(windows(model, "pydoc", count, 64), whole[:count])


def test_all_windows_drops_only_what_fills_no_window(model: Model, txt: Path) -> None:
    ids = ids_of(model, "\n\n".join(TEXTS))
    found = all_windows(model, str(txt), 48)
    assert len(found) == len(ids) // 48
    assert found.flatten().tolist() == ids[: found.numel()]


def test_a_text_that_is_too_short_says_how_many_tokens_it_has(model: Model, txt: Path) -> None:
    count = len(ids_of(model, "\n\n".join(TEXTS)))
    with pytest.raises(InputError, match=rf"holds {count:,} tokens, but 1000 windows of 32 take 32,000"):
        windows(model, str(txt), 1000, 32)
    with pytest.raises(InputError, match=r"1000 windows of 32 take 32,000 \(999 of them held out for calibration\)"):
        windows(model, str(txt), 1, 32, skip=999)


@pytest.mark.parametrize(("count", "length"), [(0, 16), (-1, 16), (2, 1), (2, 0)])
def test_windows_that_make_no_sense_are_refused(model: Model, count: int, length: int) -> None:
    with pytest.raises(InputError, match="at least 1 window of 2 tokens"):
        windows(model, "pydoc", count, length)


def test_windows_longer_than_the_context_are_refused(model: Model) -> None:
    with pytest.raises(InputError, match="windows of 129 tokens are longer than the model's context of 128"):
        windows(model, "pydoc", 1, 129)
    assert windows(model, "pydoc", 1, 128).shape == (1, 128)


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
    ],
)
def test_an_unknown_source_is_named(model: Model, source: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        windows(model, source, 1, 8)


def test_a_model_without_a_tokenizer_says_so() -> None:
    model = wrap_model(tiny.build())
    for call in (lambda: windows(model, "pydoc", 1, 8), lambda: all_windows(model, "pydoc", 8)):
        with pytest.raises(InputError, match="has no tokenizer"):
            call()


# ---------------------------------------------------------------------------------------------------------
# Data sets of the hub


@pytest.mark.parametrize(
    ("source", "arguments"),
    [
        ("c4", ("allenai/c4", "en", "train")),
        ("wikitext2", ("Salesforce/wikitext", "wikitext-2-raw-v1", "test")),
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


def test_a_local_data_set_is_read_like_one_of_the_hub(model: Model, jsonl: Path, txt: Path) -> None:
    pytest.importorskip("datasets")
    directory = jsonl.parent / "set"
    directory.mkdir()
    jsonl.rename(directory / "train.jsonl")
    found = windows(model, f"hf:{directory}", 7, 16)
    assert torch.equal(found, windows(model, str(txt), 7, 16))


def test_a_data_set_that_cannot_be_had_is_named_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def fail(*_: Any, **__: Any) -> Any:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(InputError, match=r"data set 'some/set' cannot be read: no route$"):
        list(documents("hf:some/set"))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: iter([{"body": "x"}]))
    with pytest.raises(InputError, match="data set 'some/set' has no 'text' column"):
        list(documents("hf:some/set"))


# ---------------------------------------------------------------------------------------------------------
# Text that the model writes itself


@pytest.fixture
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PRUNELLA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_self_is_sampled_once_and_then_comes_from_the_cache(
    model: Model, fresh_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = windows(model, "self", 3, 12)
    assert first.shape == (3, 12)
    assert (first[:, 0] == model.tokenizer.bos_token_id).all()
    monkeypatch.setattr(type(model.network), "generate", lambda *_, **__: pytest.fail("sampled again"))
    assert torch.equal(windows(model, "self", 3, 12), first)
    assert torch.equal(windows(model, "self", 2, 12, skip=1), first[1:])


def test_a_cache_that_cannot_be_written_costs_no_sampled_text(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("no directory")
    monkeypatch.setenv("PRUNELLA_CACHE", str(tmp_path / "file"))
    assert sample_self(model, 2, 16, 0, batch=2).shape == (2, 16)
    assert "is not kept for another run" in capsys.readouterr().err


def test_self_depends_on_the_seed_and_on_nothing_else(model: Model, fresh_cache: Path, tmp_path: Path) -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first = sample_self(model, 3, 12, seed=0)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not torch.equal(sample_self(model, 3, 12, seed=1), first)
    for path in fresh_cache.rglob("*.safetensors"):
        path.unlink()
    torch.rand(7)
    assert torch.equal(sample_self(model, 3, 12, seed=0), first)


def test_more_windows_of_self_begin_with_the_same_ones(model: Model, fresh_cache: Path) -> None:
    few = sample_self(model, 3, 12, seed=0, batch=2)
    assert torch.equal(sample_self(model, 7, 12, seed=0, batch=2)[:3], few)


def test_self_follows_the_models_own_distribution(fresh_cache: Path) -> None:
    """A model that can only count: token n is followed by n + 1."""
    network = tiny.build("llama", num_hidden_layers=1, hidden_size=tiny.VOCABULARY, num_attention_heads=4)
    with torch.no_grad():
        for parameter in network.model.layers.parameters():
            parameter.zero_()
        network.model.norm.weight.fill_(1)
        network.model.embed_tokens.weight.copy_(torch.eye(tiny.VOCABULARY))
        network.lm_head.weight.copy_(100 * torch.eye(tiny.VOCABULARY).roll(1, 0))
    network.generation_config.eos_token_id = None
    found = sample_self(wrap_model(network), 4, 10, seed=0)
    assert torch.equal(found, (found[:, :1] + torch.arange(10)) % tiny.VOCABULARY)
    assert len(set(found[:, 0].tolist())) > 1  # without a tokenizer the first token is random


# ---------------------------------------------------------------------------------------------------------
# Windows to evaluate on


def rows(ids_NL: Tensor) -> set[tuple[int, ...]]:
    return {tuple(row.tolist()) for row in ids_NL}


@pytest.mark.parametrize("length", [None, 16, 24, 50])
def test_evaluation_never_sees_a_calibration_window(model: Model, txt: Path, length: int | None) -> None:
    recipe = Recipe.of(
        {
            "calibration": {"source": str(txt), "samples": 5, "length": 32},
            "evaluate": {"source": str(txt), "windows": 3, "length": length},
        }
    )
    ids_NL = windows(model, str(txt), 5, 32)
    held_out = held_out_windows(model, recipe, ids_NL.numel())
    assert held_out is not None
    assert held_out.shape == (3, length or 128)
    tokens = ids_of(model, "\n\n".join(TEXTS))
    flat = held_out.flatten().tolist()
    start = next(i for i in range(len(tokens)) if tokens[i : i + len(flat)] == flat)
    assert start >= ids_NL.numel()


def test_the_same_file_under_another_name_is_still_held_out(
    model: Model, txt: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(txt.parent)
    recipe = Recipe.of(
        {
            "calibration": {"source": str(txt), "samples": 5, "length": 32},
            "evaluate": {"source": f"./{txt.name}", "windows": 3, "length": 32},
        }
    )
    ids_NL = windows(model, str(txt), 5, 32)
    held_out = held_out_windows(model, recipe, ids_NL.numel())
    assert held_out is not None
    assert not rows(held_out) & rows(ids_NL)


def test_another_text_is_evaluated_from_its_beginning(model: Model, txt: Path) -> None:
    recipe = Recipe.of(
        {"evaluate": {"source": "pydoc", "windows": 2}, "calibration": {"source": str(txt), "length": 32}}
    )
    held_out = held_out_windows(model, recipe, 64)
    assert held_out is not None
    assert torch.equal(held_out, windows(model, "pydoc", 2, 128))  # all of its context, whatever the calibration's


def test_windows_of_self_are_held_out_too(model: Model, fresh_cache: Path) -> None:
    recipe = Recipe.of({"calibration": {"source": "self"}, "evaluate": {"source": "self", "windows": 2, "length": 12}})
    ids_NL = windows(model, "self", 3, 12)
    held_out = held_out_windows(model, recipe, ids_NL.numel())
    assert held_out is not None
    assert not rows(held_out) & rows(ids_NL)


def test_calibration_text_decides_the_masks(llama: Path, txt: Path, tmp_path: Path) -> None:
    masks = []
    for source in (str(txt), "pydoc"):
        recipe = {
            "steps": ["wanda"],
            "calibration": {"source": source, "samples": 4, "length": 16},
            "evaluate": {"source": None},
        }
        out = tmp_path / f"out{len(masks)}"
        report = prunella.prune(llama, recipe, output=out)
        assert report.dense["perplexity"] is None
        masks.append(read_masks(out))
    assert any(not torch.equal(masks[0][name], masks[1][name]) for name in masks[0])
