from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
from tokenizers.processors import TemplateProcessing
from torch import Tensor

import prunella
from prunella import InputError, Model, load_model, read_masks
from prunella.calibrate import all_windows, check_windows, positions, sample_self, up_to, windows, with_bos
from prunella.pruning import held_out
from prunella.recipe import Recipe
from prunella.tasks.text import wrap_model

TEXTS = [f"Document {n} tells of {n} pruned branches.\nThey grew back." for n in range(60)]


@pytest.fixture(scope="module")
def model(llama: Path) -> Model:
    return load_model(str(llama))


def held_out_windows(model: Model, recipe: Recipe, used: int) -> Tensor | None:
    found = held_out(model, recipe, used)
    return None if found is None else found.groups[0]["input_ids"]


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


def test_a_model_without_a_tokenizer_says_so() -> None:
    model = wrap_model(tiny.build())
    for call in (lambda: windows(model, "pydoc", 1, 8), lambda: all_windows(model, "pydoc", 8)):
        with pytest.raises(InputError, match="has no tokenizer"):
            call()


# ---------------------------------------------------------------------------------------------------------
# The BOS


def test_every_window_begins_with_the_bos_that_the_tokenizer_puts_before_a_text(bos: Path, model: Model) -> None:
    """And the text goes on behind it: no token of it is lost, none stands twice."""
    found = windows(load_model(str(bos)), "pydoc", 5, 32)
    assert found[:, 0].tolist() == [1] * 5
    assert found[:, 1:].flatten().tolist() == windows(model, "pydoc", 5, 31).flatten().tolist()


def test_without_bos_and_with_a_tokenizer_that_puts_none_windows_are_text_alone(bos: Path, model: Model) -> None:
    expected = windows(model, "pydoc", 5, 32)
    assert torch.equal(windows(load_model(str(bos)), "pydoc", 5, 32, bos=False), expected)
    assert torch.equal(windows(model, "pydoc", 5, 32, bos=False), expected)


def test_windows_with_bos_follow_each_other(bos: Path, txt: Path) -> None:
    model = load_model(str(bos))
    every = all_windows(model, str(txt), 16)
    assert torch.equal(windows(model, str(txt), len(every) - 3, 16, skip=3), every[3:])
    assert torch.equal(up_to(model, str(txt), 10**6, 16), every)
    with pytest.raises(InputError, match=rf"but {len(every) + 1} windows of 16 take {15 * (len(every) + 1):,}\."):
        windows(model, str(txt), len(every) + 1, 16)


def test_all_that_the_tokenizer_puts_before_a_text_counts_and_what_it_puts_behind_does_not(bos: Path) -> None:
    model = load_model(str(bos))
    model.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<pad> <s> $A </s>", special_tokens=[("<pad>", 0), ("<s>", 1), ("</s>", 2)]
    )
    found = windows(model, "pydoc", 4, 16)
    assert found[:, :2].tolist() == [[0, 1]] * 4
    assert found[:, 2:].flatten().tolist() == windows(model, "pydoc", 4, 14, bos=False).flatten().tolist()
    assert with_bos(model, found)
    with pytest.raises(InputError, match="windows of 2 tokens have no room for text"):
        windows(model, "pydoc", 4, 2)


def test_whether_windows_begin_with_bos_is_read_from_them(bos: Path, model: Model) -> None:
    opened = load_model(str(bos))
    assert with_bos(opened, windows(opened, "pydoc", 3, 16))
    assert not with_bos(opened, windows(opened, "pydoc", 3, 16, bos=False))
    assert not with_bos(model, windows(model, "pydoc", 3, 16))
    assert not with_bos(wrap_model(tiny.build()), tiny.token_windows())


@pytest.mark.parametrize("length", [16, 24, 50])
def test_evaluation_with_bos_sees_no_calibrated_text_and_little_is_left_out(bos: Path, txt: Path, length: int) -> None:
    model = load_model(str(bos))
    recipe = Recipe.of(
        {
            "calibration": {"source": str(txt), "samples": 5, "length": 32},
            "evaluate": {"source": str(txt), "windows": 3, "length": length},
        }
    )
    held_out = held_out_windows(model, recipe, 5 * 32)
    assert held_out is not None
    assert held_out[:, 0].tolist() == [1] * 3
    text = ids_of(load_model(str(bos.with_name("llama"))), "\n\n".join(TEXTS))
    flat = held_out[:, 1:].flatten().tolist()
    start = next(i for i in range(len(text)) if text[i : i + len(flat)] == flat)
    assert 5 * 31 <= start <= 5 * 32 + length


def test_pruning_calibrates_and_measures_with_bos_unless_told_otherwise(bos: Path, tmp_path: Path) -> None:
    masks = []
    for name, more in (("with", {}), ("without", {"bos": False})):
        recipe = {"steps": ["wanda"], "calibration": {"samples": 4, "length": 16}, "evaluate": {"windows": 2}, **more}
        report = prunella.prune(bos, recipe, output=tmp_path / name)
        assert report.dense["bos"] == report.pruned["bos"] == (name == "with")
        assert f"2 windows of 128, {'each with' if name == 'with' else 'without'} BOS" in report.rows()[0][0]
        masks.append(read_masks(tmp_path / name))
    assert any(not torch.equal(masks[0][name], masks[1][name]) for name in masks[0])


# ---------------------------------------------------------------------------------------------------------
# Tokens and positions that the model lacks


def test_token_ids_that_the_model_lacks_are_refused_by_whatever_reads_them(ids: Tensor) -> None:
    model = wrap_model(tiny.build())
    for wrong in (tiny.VOCABULARY, -1):
        ids[2, 5] = wrong
        for call in (check_windows, prunella.perplexity):
            with pytest.raises(InputError, match=f"token {wrong} lies outside the model's vocabulary of 320"):
                call(model, ids)


@pytest.mark.parametrize(("architecture", "learned"), [("gpt2", 64), ("opt", 64), ("llama", None), ("bloom", None)])
def test_positions_that_are_learned_are_told_from_others(architecture: str, learned: int | None) -> None:
    model = wrap_model(tiny.build(architecture))
    assert positions(model) == learned
    longer = tiny.token_windows(1, 65)
    if learned is None:
        check_windows(model, longer)
    else:
        with pytest.raises(InputError, match="65 tokens are longer than the 64 positions that the model has learned"):
            check_windows(model, longer)
        check_windows(model, longer[:, 1:])


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


def test_self_begins_with_no_bos_if_there_is_to_be_none(bos: Path, fresh_cache: Path) -> None:
    model = load_model(str(bos))
    plain = windows(model, "self", 16, 8, bos=False)
    assert len(set(plain[:, 0].tolist())) > 1
    assert windows(model, "self", 16, 8)[:, 0].tolist() == [1] * 16


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
