"""Killed at any moment and started again: nothing lost, nothing half, the same bytes in the end.

More than a hundred SIGKILLs with PRUNELLA_FAULTS=1 (`make faults`), a fifth of them without.
"""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from processes import SHORT, Command, times

pytestmark = pytest.mark.slow
TIMES = {"seconds", "cpu_seconds", "seconds in all", "peak_memory", "resumed_after_blocks", "run", "source", "speed"}


def without_times(value: Any) -> Any:
    """What two runs of one command agree on."""
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items() if key not in TIMES}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def contents(path: Path) -> dict[str, Any]:
    """Everything below a directory, reports without their times."""
    out: dict[str, Any] = {}
    for file in sorted(path.rglob("*")):
        if file.is_file():
            name = str(file.relative_to(path))
            if file.suffix == ".json":
                out[name] = without_times(json.loads(file.read_text()))
            elif file.name != "README.md":  # says seconds
                out[name] = file.read_bytes()
    return out


def kill_again_and_again(tmp_path: Path, kills: int, start: Callable[[Path, bool], tuple[Any, ...]]) -> None:
    """Run `start(output, resume)`, a command line, killed at random moments until it ends well; as often as it takes
    for `kills` kills. Every end must be that of a run that nothing interrupted."""
    log, whole = tmp_path / "log", tmp_path / "whole"
    began = time.monotonic()
    assert Command.start(log, *start(whole, False)).finish() == 0, log.read_text()
    duration = time.monotonic() - began
    expected = contents(whole)
    chance, done = random.Random(kills), 0
    while done < kills:
        folder = tmp_path / f"after-{done}"
        folder.mkdir()
        out, partial = folder / "out", folder / "out.partial"
        while not out.exists() or partial.exists():
            log.unlink(missing_ok=True)
            begun, whole_already = partial.exists(), out.exists()
            command = Command.start(log, *start(out, begun))
            if command.kill_after(chance.uniform(0, 1.05 * duration)):
                done += 1
                continue
            code = command.finish()
            assert code == 0 or whole_already, f"after {done} kills: {command.said()}"
        found = contents(out)
        assert found.keys() == expected.keys()
        for name, content in expected.items():
            assert found[name] == content, f"{name} after {done} kills"
        assert [path.name for path in folder.iterdir()] == ["out"], f"after {done} kills"
        shutil.rmtree(folder)


@pytest.mark.parametrize("flags", [("--step", "sparsegpt"), ("--step", "wanda", "--format", "packed", "--bits", 8)])
def test_prune(flags: tuple[Any, ...], llama: Path, tmp_path: Path) -> None:
    def start(out: Path, resume: bool) -> tuple[Any, ...]:
        return ("prune", llama, "-o", out, *SHORT, *flags, *(["--resume"] if resume else []))

    kill_again_and_again(tmp_path, times(20), start)


@pytest.mark.parametrize(
    "flags",
    [
        ("--train", "mask-lora", "--train", "norms", "--tokens", 2048, "--length", 32, "--set", "heal.held_out=4"),
        ("--train", "all", "--way", "reconstruct", "--samples", 4, "--set", "calibration.length=32"),
    ],
)
def test_heal(flags: tuple[Any, ...], pruned: Path, tmp_path: Path) -> None:
    def start(out: Path, resume: bool) -> tuple[Any, ...]:
        return ("heal", pruned, "-o", out, "--windows", 1, *flags, *(["--resume"] if resume else []))

    kill_again_and_again(tmp_path, times(20), start)


def test_pack(pruned: Path, tmp_path: Path) -> None:
    kill_again_and_again(tmp_path, times(15), lambda out, resume: ("pack", pruned, "-o", out, "--bits", 4))


def test_sweep(llama: Path, tmp_path: Path) -> None:
    """A sweep appends: killed anywhere, it makes what is missing and no cell twice."""
    grid = tmp_path / "grid.yaml"
    grid.write_text(
        "calibration: {samples: 4, length: 32}\nevaluate: {windows: 1}\n"
        "grid: {steps: [magnitude, wanda, sparsegpt], sparsity: [0.4, 0.5, 0.6]}\n"
    )
    log, whole = tmp_path / "log", tmp_path / "whole"

    def rows(out: Path) -> list[Any]:
        return [without_times(json.loads(line)) for line in (out / "cells.jsonl").read_text().splitlines()]

    began = time.monotonic()
    assert Command.start(log, "sweep", llama, "-o", whole, "--recipe", grid).finish() == 0, log.read_text()
    duration, expected = time.monotonic() - began, rows(whole)
    chance, done, kills = random.Random(0), 0, times(20)
    while done < kills:
        out = tmp_path / "out"
        before: list[Any] = []
        while True:
            command = Command.start(log, "sweep", llama, "-o", out, "--recipe", grid)
            killed = command.kill_after(chance.uniform(0, 1.05 * duration))
            text = (out / "cells.jsonl").read_text() if (out / "cells.jsonl").exists() else ""
            now = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
            assert now[: len(before)] == before  # a finished cell is never made again
            before = now
            if not killed:
                break
            done += 1
        assert command.finish() == 0, command.said()
        assert rows(out) == expected
        assert not list(out.glob(".sweep-*"))
        shutil.rmtree(out)
