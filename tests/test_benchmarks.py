"""The benchmarks of methods and of healing run, resume and print, on a tiny model."""

from __future__ import annotations

import io
import json
import runpy
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import encoders
import numpy as np
import pytest
import torch

PHASES = ["load", "forward", "statistics", "solve", "write", "other"]
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


def called(name: str, *arguments: object) -> None:
    """Run it in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        patch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(FOLDER / name), run_name="__main__")


@pytest.mark.skipif(not hasattr(torch._C, "_acc"), reason="this PyTorch takes no device that is written in Python")
def test_whole_runs_on_a_device_that_is_simulated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All parts run, each row is on disk at once, and what is done is not done again."""
    asked = ("gpu.py", "--simulate", "--folder", tmp_path, "--json", tmp_path / "rows.jsonl", "--minutes")
    called(*asked, 0)
    assert "run: wanda, many: for another call" in capsys.readouterr().out
    assert not (tmp_path / "rows.jsonl").exists()
    called(*asked, 8)
    found = rows(tmp_path / "rows.jsonl")
    said = capsys.readouterr().out
    assert not [row for row in found if row.get("ok") is False]
    assert all(f"run: {row['what']}: {row['value']}" in said for row in found if "what" in row)
    done = [row["done"] for row in found if "done" in row]
    assert done[:3] == ["sparsegpt, many", "wanda, many", "heal"]
    assert {"packed", "best, few", "best, many", "pack", "sparsegpt, few", "wanda, few"} <= set(done)
    spent = [
        row["what"].rpartition(": ")[2] for row in found if row.get("what", "").startswith("sparsegpt, 4 x 32 tok")
    ]
    assert spent == ["sparsegpt, 4 x 32 tokens", *PHASES, "all phases"]
    assert [path.name for path in tmp_path.iterdir() if path.is_dir() and "dense" not in path.name] == []
    lines = (tmp_path / "rows.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "rows.jsonl").write_text("".join(lines[:-1]))  # as if it had been killed before the last part was done
    called(*asked, 8)
    again = rows(tmp_path / "rows.jsonl")
    assert again[: len(found) - 1] == found[:-1]
    assert {row.get("part", row.get("done")) for row in again[len(found) - 1 :]} == {"pack"}


def test_estimates_need_no_device(capsys: pytest.CaptureFixture[str]) -> None:
    called("gpu.py", "--estimate", "H100")
    assert "sparsegpt, 128 windows" in capsys.readouterr().out


@pytest.mark.slow
def test_gpu_in_the_interpreter(tmp_path: Path) -> None:
    said = bench("gpu.py", "--interpret", "--json", tmp_path / "rows.jsonl")
    found = rows(tmp_path / "rows.jsonl")
    assert {row["section"] for row in found if "section" in row} == {"check", "run"}
    assert "FAILED" not in said


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


@pytest.mark.slow
def test_encoders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A dense classifier is made by heal, and pruned; what is done is not done again."""
    texts = [{"text": f"{word} film number {n}", "label": n % 2} for n in range(24) for word in ("good", "bad")]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    dense = encoders.write(tmp_path / "bare", encoders.build("bert", ""))
    data = ("--train", tmp_path / "x.jsonl", "--test", tmp_path / "x.jsonl", "--out", tmp_path, "--model", dense)
    asked = (*data, "--length", 32, "--samples", 8, "--share", 1, "--sparsities", 0.5, "--healing", 16)
    called("encoders.py", *asked)
    found = rows(tmp_path / "encoders.jsonl")
    assert [row["method"] for row in found] == [
        *("dense", "magnitude", "wanda", "sparsegpt", "admm + update", "best", "best, healed")
    ]
    said = capsys.readouterr().out
    assert all(f"{row['accuracy']:.2%}" in said for row in found)
    called("encoders.py", *asked)
    assert rows(tmp_path / "encoders.jsonl") == found


@pytest.mark.slow
def test_detector(tmp_path: Path) -> None:
    pytest.importorskip("pycocotools")
    from PIL import Image
    from safetensors.torch import save_file

    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        network = runpy.run_path(str(FOLDER / "detector.py"))["Yolo"]()
    save_file(network.state_dict(), tmp_path / "w.safetensors")
    draw = np.random.default_rng(0)
    with zipfile.ZipFile(tmp_path / "coco.zip", "w") as archive:
        for folder in ("train2017", "val2017"):
            for number in range(9):
                data = io.BytesIO()
                Image.fromarray(draw.integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(data, "JPEG")
                archive.writestr(f"images/{folder}/{number}.jpg", data.getvalue())
                if number:  # the first shows nothing
                    archive.writestr(f"object_detection/labels/{folder}/{number}.txt", "3 0.5 0.5 0.4 0.4\n")
    files = ("--weights", tmp_path / "w.safetensors", "--pictures", tmp_path / "coco.zip")
    short = ("--size", 64, "--epochs", 1, "--rounds", 2, "--sparsity", 0.5, "--json", tmp_path / "rows.jsonl")
    bench("detector.py", *files, *short)
    found = rows(tmp_path / "rows.jsonl")
    assert [row["what"] for row in found] == ["dense", "one shot 50%", "2 rounds 50%"]
    assert found[1]["sparsity"] == pytest.approx(found[2]["sparsity"], abs=1e-3)
    bench("detector.py", *files, *short)
    assert rows(tmp_path / "rows.jsonl") == found
