"""`prunella eval`: several texts, two models, intervals, overlap."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

import prunella
from prunella import InputError, Perplexity, Report
from prunella.evaluate.difference import difference
from prunella.evaluate.score import score
from prunella.overlap import fingerprint, overlap

SHORT: dict[str, Any] = {"steps": ["wanda"], "calibration": {"samples": 8, "length": 64}, "evaluate": {"source": None}}


def measured(nll: np.ndarray) -> Perplexity:
    return Perplexity(float(np.exp(nll.mean())), len(nll), 32, tuple(map(float, nll)))


@pytest.fixture(scope="module")
def pruned(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("score") / "pruned"
    prunella.prune(llama, SHORT, output=path)
    return path


def test_the_interval_is_that_of_the_paired_differences() -> None:
    """Windows differ far more from each other than the two models do on any of them: pairing shows the difference. The
    interval is close to the normal one of the paired log-ratios."""
    draw = np.random.default_rng(0)
    hard_N = 3 + draw.normal(0, 0.5, 400)
    other_N = hard_N + 0.02 + draw.normal(0, 0.01, 400)
    found = difference(measured(other_N), measured(hard_N))
    assert found.low < found.difference < found.high
    assert found.low > 0
    apart_N = other_N * np.exp(other_N.mean()) - hard_N * np.exp(hard_N.mean())  # first order in the two means
    half = 1.96 * apart_N.std() / 20
    assert found.high - found.low == pytest.approx(2 * half, rel=0.1)
    back = difference(measured(hard_N), measured(other_N))
    assert (back.difference, back.low, back.high) == pytest.approx((-found.difference, -found.high, -found.low))


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    draw = np.random.default_rng(1)
    hits = 0
    for seed in range(200):
        one_N = 1 + draw.normal(0, 0.3, 50)
        found = difference(measured(one_N + draw.normal(0.1, 0.05, 50)), measured(one_N), draws=500, seed=seed)
        hits += found.low <= np.exp(1.1) - np.exp(1.0) <= found.high
    assert 0.89 <= hits / 200 <= 0.99


def test_a_model_does_not_differ_from_itself() -> None:
    same = measured(np.random.default_rng(2).normal(3, 1, 20))
    found = difference(same, same)
    assert (found.difference, found.low, found.high) == (0, 0, 0)


def test_overlap_is_the_share_of_runs_that_both_texts_have() -> None:
    known = torch.randint(0, 50_000, (40, 512), generator=torch.Generator().manual_seed(0))
    fresh = torch.randint(0, 50_000, (40, 512), generator=torch.Generator().manual_seed(1))
    grams = fingerprint(known)
    assert overlap(grams, known) == 1
    assert overlap(grams, fresh) == 0
    assert overlap(grams, torch.cat([known[:10], fresh[:30]])) == pytest.approx(0.25, abs=0.08)
    assert (
        overlap(grams, known.view(-1)[777:].unfold(0, 300, 300)) > 0.93
    )  # cut elsewhere: runs across the cuts are not known
    assert overlap(grams, known[:, :12]) is None
    assert len(grams) < known.numel() / 8


@pytest.mark.parametrize("length", [12, 26])
def test_runs_of_thirteen_tokens_are_what_counts(length: int) -> None:
    """Quotations of `length` tokens with a foreign token after each: length - 12 of length + 1 runs are shared."""
    known_RL = torch.arange(200 * length * 10).view(-1, length)
    foreign_R1 = 10**6 + torch.arange(len(known_RL))[:, None]
    quoting = torch.cat([known_RL, foreign_R1], 1).view(1, -1)
    share = overlap(fingerprint(known_RL.view(1, -1)), quoting)
    assert share == pytest.approx((length - 12) / (length + 1), abs=0.06)
    assert (share == 0) == (length == 12)


def test_several_texts_and_two_models(pruned: Path, llama: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("A garden needs water and patience, and now and then a knife. " * 200)
    text = str(tmp_path / "a.txt")
    result = score(str(pruned), [text, "pydoc"], beside=str(llama), windows=4, length=64)
    assert [entry["text"] for entry in result["texts"]] == [text, "pydoc"]
    alone = score(str(llama), ["pydoc"], windows=4, length=64)
    second = result["texts"][1]
    assert second["beside"]["perplexity"] == alone["perplexity"]
    apart = second["difference"]
    assert apart["difference"] == pytest.approx(second["perplexity"] - alone["perplexity"])
    assert apart["low"] <= apart["difference"] <= apart["high"]


def test_a_text_that_was_calibrated_on_is_warned_of(pruned: Path, tmp_path: Path) -> None:
    assert Report.read(pruned).fingerprint
    found = score(str(pruned), ["pydoc"], windows=8, length=64)
    assert found["overlap"] == 1
    assert "100% of the 13-grams of 'pydoc'" in found["warnings"][0]
    (tmp_path / "b.txt").write_text("".join(f"{i * i % 977} " for i in range(3000)))
    fresh = score(str(pruned), [str(tmp_path / "b.txt")], windows=8, length=64)
    assert fresh["overlap"] == 0
    assert not fresh["warnings"]


def test_other_tokens_are_not_compared(pruned: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(pruned, tmp_path / "other")
    tokenizer = json.loads((tmp_path / "other" / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:5]
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(InputError, match="cut 'pydoc' into different tokens"):
        score(str(pruned), ["pydoc"], beside=str(tmp_path / "other"), windows=2, length=32)


def test_the_command_line_always_says_how_many_windows(
    run: Callable[..., Any], pruned: Path, llama: Path, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text("Plain words, plain words, and no end of them. " * 100)
    texts = ("--text", tmp_path / "a.txt", "--text", "pydoc")
    done = run("eval", pruned, *texts, "--windows", 3, "--length", 64, "--beside", llama)
    assert done.code == 0, done.err
    assert done.out.count("3 windows of 64 tokens") == 2
    assert done.out.count("95% between") == 2
    assert "13-grams of 'pydoc'" in done.err
    plain = json.loads(run("eval", pruned, "--windows", 3, "--length", 64, "--json").out)
    assert plain["windows"] == 3
    assert plain["texts"][0]["perplexity"] == plain["perplexity"]


def test_every_figure_says_whether_windows_begin_with_bos(
    run: Callable[..., Any], bos: Path, llama: Path, tmp_path: Path
) -> None:
    asked = ("eval", bos, "--windows", 3, "--length", 64)
    done, without = run(*asked), run(*asked, "--no-bos")
    assert "3 windows of 64 tokens each with BOS, float32" in done.out
    assert "3 windows of 64 tokens without BOS, float32" in without.out
    plain = score(str(llama), ["pydoc"], windows=3, length=64)
    assert not plain["bos"]
    assert score(str(bos), ["pydoc"], windows=3, length=64, bos=False)["nll"] == plain["nll"]
    found = score(str(bos), ["pydoc"], windows=3, length=64)
    assert found["bos"]
    assert found["nll"] != plain["nll"]


def test_bos_on_one_side_only_is_not_compared(bos: Path, llama: Path) -> None:
    with pytest.raises(InputError, match="cut 'pydoc' into different tokens"):
        score(str(bos), ["pydoc"], beside=str(llama), windows=2, length=32)
    both = score(str(bos), ["pydoc"], beside=str(llama), windows=2, length=32, bos=False)
    assert both["difference"]["difference"] == 0


def test_text_that_a_model_was_healed_on_is_warned_of(pruned: Path, tmp_path: Path) -> None:
    text = tmp_path / "healing.txt"
    text.write_text("".join(f"Branch {i} has {i * i % 977} leaves, and {i * 31 % 997} buds.\n" for i in range(400)))
    heal = {"train": ["norms"], "text": [str(text)], "tokens": 1024, "length": 64, "batch": 4, "held_out": 2}
    recipe = {"heal": heal, "evaluate": {"source": None}}
    prunella.heal(pruned, recipe, output=tmp_path / "healed")
    options: dict[str, Any] = {"windows": 16, "length": 64}
    assert not score(str(pruned), [str(text)], **options)["warnings"]
    found = score(str(tmp_path / "healed"), [str(text)], **options)
    assert found["overlap"] > 0.5
    assert "was calibrated or healed on" in found["warnings"][0]
    assert score(str(tmp_path / "healed"), ["pydoc"], windows=8, length=64)["overlap"] == 1
    # and so are those that come of it: healed on something else, pruned once more
    again = {**heal, "text": ["pydoc"], "tokens": 256}
    prunella.heal(tmp_path / "healed", {**recipe, "heal": again}, output=tmp_path / "twice")
    prunella.prune(tmp_path / "healed", {**SHORT, "sparsity": 0.7}, output=tmp_path / "sparser")
    for name in ("twice", "sparser"):
        assert score(str(tmp_path / name), [str(text)], **options)["overlap"] > 0.5


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused_before_anything_is_measured(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.build("llama", vocab_size=64, max_position_embeddings=128).save_pretrained(tmp_path / "small")
    tiny.write_tokenizer(tmp_path / "small")
    (tmp_path / "a.txt").write_text("!!!!" * 500)  # tokens of the small vocabulary alone
    monkeypatch.setattr("prunella.evaluate.score.perplexity", lambda *_, **__: pytest.fail("measured"))
    with pytest.raises(InputError, match=r"token \d+ lies outside the model's vocabulary of 64"):
        score(str(tmp_path / "small"), [str(tmp_path / "a.txt"), "pydoc"], windows=2, length=32)
