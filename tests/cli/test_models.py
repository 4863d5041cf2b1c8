"""Flags that say which model it is: a revision, another tokenizer; and how its windows begin."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]
SHORT = ("--samples", 2, "--length", 16, "--windows", 1)


@pytest.fixture
def mute(llama: Path, tmp_path: Path) -> Path:
    """The tiny LLaMA without its tokenizer."""
    shutil.copytree(llama, tmp_path / "mute", ignore=shutil.ignore_patterns("token*", "chat*"))
    return tmp_path / "mute"


@pytest.mark.parametrize("command", ["prune", "eval", "generate", "sweep"])
def test_a_directory_has_no_revision(run: Run, llama: Path, tmp_path: Path, command: str) -> None:
    more = {"prune": ("-o", tmp_path / "out"), "sweep": ("-o", tmp_path / "out"), "generate": ("x",), "eval": ()}
    said = run(command, llama, *more[command], "--revision", "v2")
    assert said.code == 2
    assert said.err == f"prunella: error: '{llama}' is no model of the hub: it has no revision 'v2'.\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["prune", "eval", "generate"])
def test_the_tokenizer_that_is_given_reads_and_writes_for_a_model_without_one(
    run: Run, llama: Path, mute: Path, tmp_path: Path, command: str
) -> None:
    def result(model: Path, *more: object) -> str:
        out = tmp_path / f"of-{model.name}"
        words = {
            "prune": ("-o", out, "--step", "wanda", "--json", *SHORT),
            "eval": ("--length", 32, "--windows", 1, "--json"),
            "generate": ("Trees grow", "--tokens", 4),
        }
        done = run(command, model, *words[command], *more)
        assert done.code == 0, done.err
        if command == "prune":
            assert (out / "tokenizer.json").read_bytes() == (llama / "tokenizer.json").read_bytes()
        if command == "generate":
            return str(done.out)
        told = json.loads(done.out)
        return str(told["pruned"]["perplexity"] if command == "prune" else told["perplexity"])

    assert result(mute, "--tokenizer", llama) == result(llama)


def test_a_sweep_hands_tokenizer_and_bos_to_its_cells(run: Run, bos: Path, mute: Path, tmp_path: Path) -> None:
    found = {}
    for flag in ("--bos", "--no-bos"):
        words = ("--step", "wanda", "--tokenizer", bos, "--format", "packed", "--bits", 8, "--json", flag, *SHORT)
        done = run("sweep", mute, "-o", tmp_path / flag, *words)
        assert done.code == 0, done.err
        dense, row = json.loads(done.out)
        found[flag] = dense["perplexity"]["pydoc"], row["perplexity"]["pydoc"]
        assert row["recipe"]["bos"] == (flag == "--bos")
        assert ("without BOS" in (tmp_path / flag / "sweep.html").read_text()) == (flag == "--no-bos")
    assert not {*found["--bos"]} & {*found["--no-bos"]}
