"""Calibration text as it comes: in any encoding, of one word, of a hundred megabytes."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

Run = Callable[..., Any]
WORDS = "the quick brown fox jumps over the lazy dog and runs away "
LONG = WORDS * 200


def prune(run: Run, llama: Path, tmp_path: Path, name: str, content: bytes | str) -> Any:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    short = ("--samples", 4, "--length", 32, "--evaluate", "none")
    return run("prune", llama, "-o", tmp_path / "out", "--calibration", path, *short)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("marked.txt", LONG.encode("utf-8-sig")),
        ("windows.txt", LONG.replace(" ", "\r\n")),
        ("line.txt", LONG),
        ("controls.txt", LONG.replace("fox", "f\x00\x07\x1b[31mx")),
        ("emoji.txt", LONG.replace("dog", "🐕‍🦺\u202e\ufdfd")),
        ("special.txt", LONG.replace("fox", "<|endoftext|></s><s>[INST]")),
        ("lines.jsonl", "".join(json.dumps({"text": WORDS, "more": [1, {"a": None}]}) + "\n" for _ in range(99))),
        ("gaps.jsonl", "".join(json.dumps({"text": text}) + "\n\n" for text in ["", WORDS] * 99)),
    ],
)
def test_text_that_is_fine(name: str, content: bytes | str, llama: Path, tmp_path: Path, run: Run) -> None:
    done = prune(run, llama, tmp_path, name, content)
    assert done.code == 0, done.err


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", "", "empty"),
        ("blank.txt", " \n\t\n", ""),
        ("word.txt", "word", "tokens"),
        ("latin.txt", LONG.replace("fox", "fück").encode("latin-1"), "UTF-8"),
        ("wide.txt", LONG.encode("utf-16"), "UTF-8"),
        ("image.txt", bytes(range(256)) * 99, "UTF-8"),
        ("empty.jsonl", "", "empty"),
        ("prose.jsonl", LONG, "JSON"),
        ("torn.jsonl", (json.dumps({"text": WORDS}) + "\n") * 3 + '{"text": "the qui', "JSON"),
        ("other.jsonl", '{"content": "words"}\n' * 99, "text"),
        ("number.jsonl", '{"text": 5}\n' * 99, "text"),
        ("list.jsonl", "[1, 2]\n" * 99, "text"),
        ("deep.jsonl", "[" * 100_000 + "\n", "JSON"),
        ("words.csv", LONG, ""),
    ],
)
def test_text_that_is_not(name: str, content: bytes | str, message: str, llama: Path, tmp_path: Path, run: Run) -> None:
    done = prune(run, llama, tmp_path, name, content)
    assert done.code == 2, (done.out, done.err)
    assert name in done.err
    assert message in done.err
    assert "Traceback" not in done.err
    assert sorted(path.name for path in tmp_path.iterdir()) == [name]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["huge.txt", "huge.jsonl"])
def test_a_hundred_megabytes(name: str, llama: Path, tmp_path: Path, run: Run) -> None:
    """Only as much is read as is needed; one line or many."""
    path, size = tmp_path / name, 100_000_000
    line = WORDS * 50 if name.endswith("txt") else json.dumps({"text": WORDS * 50}) + "\n"
    path.write_text(line * (size // len(line)))
    before, began = psutil.Process().memory_info().rss, time.monotonic()
    short = ("--samples", 4, "--length", 32, "--evaluate", "none")
    done = run("prune", llama, "-o", tmp_path / "out", "--calibration", path, *short)
    assert done.code == 0, done.err
    assert time.monotonic() - began < 60
    assert psutil.Process().memory_info().rss - before < 1e9
    path.unlink()
