"""The benchmarks of methods and of healing run, resume and print, on a tiny model."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks"


@pytest.mark.parametrize("name", sorted(path.name for path in FOLDER.glob("[!_]*.py")))
def test_every_benchmark_says_what_it_takes(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    monkeypatch.syspath_prepend(str(FOLDER))
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(FOLDER / name), run_name="__main__")
    assert stop.value.code == 0
    assert "usage: " in capsys.readouterr().out


def bench(name: str, *arguments: object) -> str:
    command = [sys.executable, str(FOLDER / name), *map(str, arguments)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert "failed" not in ran.stderr
    return ran.stdout + ran.stderr


def rows(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_methods(llama: Path, tmp_path: Path) -> None:
    short = ("--model", llama, "--samples", 4, "--length", 64, "--windows", 2, "--json", tmp_path / "rows.jsonl")
    chosen = ("--methods", "wanda", "besa, rows", "recipe best", "--cells", "50%", "2:4")
    said = bench("methods.py", *short, *chosen, "--plot", tmp_path / "plot.png")
    found = rows(tmp_path / "rows.jsonl")
    assert [(row["method"], row["cell"]) for row in found[1:]] == [
        ("wanda", "50%"),
        ("besa, rows", "50%"),
        ("recipe best", "50%"),
        ("wanda", "2:4"),
        ("recipe best", "2:4"),
    ]
    assert all(f"{row['perplexity']['pydoc']:.2f}" in said for row in found)
    assert (tmp_path / "plot.png").stat().st_size > 1000
    bench("methods.py", *short, *chosen)
    assert rows(tmp_path / "rows.jsonl") == found


@pytest.mark.slow
def test_heal(llama: Path, tmp_path: Path) -> None:
    short = ("--model", llama, "--samples", 4, "--calibration-length", 32, "--windows", 1, "--tokens", 512)
    where = ("--length", 32, "--folder", tmp_path / "models", "--json", tmp_path / "rows.jsonl")
    chosen = ("--steps", "magnitude", "--cells", "50%", "--methods", "norms", "reconstruct", "all")
    said = bench("heal.py", *short, *where, *chosen)
    found = rows(tmp_path / "rows.jsonl")
    assert [row["method"] for row in found] == ["nothing", "norms", "reconstruct", "all"]
    assert all(f"{row['perplexity']:.2f}" in said for row in found)
    bench("heal.py", *short, *where, *chosen)
    assert rows(tmp_path / "rows.jsonl") == found
