import runpy
import sys
from pathlib import Path

import torch

import prunella
from prunella import registry

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_pruning_and_generating_prints_a_table_and_text(llama, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["prune_and_generate.py", str(llama), str(tmp_path / "out")])
    runpy.run_path(str(EXAMPLES / "prune_and_generate.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert "perplexity" in printed
    assert "A garden is" in printed
    assert (tmp_path / "out" / "prunella.json").is_file()


def test_a_step_of_ones_own_prunes_a_model_in_memory(llama, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["own_step.py", str(llama)])
    monkeypatch.setattr(registry, "steps", dict(registry.steps))
    runpy.run_path(str(EXAMPLES / "own_step.py"), run_name="__main__")
    assert "50.0% of the block weights are zero" in capsys.readouterr().out


def test_a_detector_is_pruned_in_rounds(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["detector.py", str(tmp_path / "out")])
    names = runpy.run_path(str(EXAMPLES / "detector.py"), run_name="__main__")
    assert "70.0% pruned" in capsys.readouterr().out
    levels = names["levels"]
    assert all(level.kept and level.score > level.scores[0] for level in levels)  # training helps at every level
    masks = prunella.read_masks(tmp_path / "out")
    assert sum(int((~mask).sum()) for mask in masks.values()) == levels[-1].zeros
    saved = prunella.load_state(names["Detector"](), tmp_path / "out")
    assert all(torch.equal(a, b) for a, b in zip(saved.parameters(), names["detector"].parameters(), strict=True))


def test_every_example_is_run_here():
    named = Path(__file__).read_text()
    for path in EXAMPLES.glob("*.py"):
        assert path.name in named, f"{path.name} has no test"
