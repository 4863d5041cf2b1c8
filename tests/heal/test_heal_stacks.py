"""Healing of networks with two stacks, and of networks of one's own without labels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import test_seq2seq as two
from safetensors.torch import load_file

import prunella
from prunella import InputError


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    rows = [{"text": text, "target": f"{answer} {n % 5}"} for n, (text, answer) in enumerate(two.PAIRS * 2)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.mark.parametrize(
    "heal",
    [
        {"train": ["all"], "distill": 0.5, "teacher": "stream", "batch": 4, "micro": 4, "held_out": 2, "epochs": 2},
        {"train": ["norms", "mask-lora"], "way": "reconstruct", "epochs": 2},
    ],
    ids=str,
)
def test_both_stacks_are_healed(heal: dict[str, Any], pairs: Path, tmp_path: Path) -> None:
    dense = two.saved("t5", tmp_path / "dense")
    recipe = {
        "steps": ["magnitude"],
        "calibration": {"source": str(pairs), "samples": 6, "min_tokens": 1},
        "evaluate": {"source": str(pairs), "windows": 4},
    }
    pruned = prunella.prune(str(dense), recipe, output=tmp_path / "pruned")
    report = prunella.heal(tmp_path / "pruned", {**recipe, "heal": heal}, output=tmp_path / "out")
    assert report.recipe["task"].keys() == pruned.recipe["task"].keys() == {"seq2seq"}
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("pruned", "out"))
    masks = prunella.read_masks(tmp_path / "out")
    assert all(not after[f"{name}.weight"][~mask].any() for name, mask in masks.items())
    moved = {name.partition(".")[0] for name in before if not before[name].equal(after[name])}
    assert {"encoder", "decoder"} <= moved
    prunella.open_model(str(tmp_path / "out"))


NETWORK = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x):
        hidden = self.norm(self.first(x)).relu()
        return {"maps": self.second(hidden), "means": [hidden.mean((2, 3))]}


def factory():
    torch.manual_seed(0)
    network = Net()
    for _ in range(30):  # statistics of its norms
        network(calibration[0])
    return network


calibration = [torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(n)) for n in range(4)]
evaluate = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(9))
"""


def test_a_module_of_ones_own_is_distilled_without_labels(tmp_path: Path) -> None:
    """It puts out a tree of maps, which its dense form teaches; statistics of its norms follow."""
    file = tmp_path / "net.py"
    file.write_text(NETWORK)
    name = f"{file}:factory"
    recipe = {"steps": ["magnitude"], "calibration": {"samples": 16}, "evaluate": {"windows": 8}, "sparsity": 0.7}
    heal = {"train": ["all"], "distill": 1.0, "rate": 1e-2, "epochs": 6, "batch": 8, "micro": 8, "held_out": 8}
    report = prunella.prune(name, {**recipe, "heal": heal}, output=tmp_path / "out")
    loss = report.healing["before"]["figure"]
    assert report.healing["after"][loss] < 0.8 * report.healing["before"][loss]
    masks, state = prunella.read_masks(tmp_path / "out"), load_file(tmp_path / "out" / "model.safetensors")
    assert set(masks) == {"first", "second"}
    assert report.sparsity == pytest.approx(0.7, abs=0.01)
    assert int((state["second.weight"] == 0).sum()) >= int((~masks["second"]).sum())
    model = prunella.open_model(str(tmp_path / "out"))
    assert model.task.name == "module"
    with pytest.raises(InputError, match=r"has no loss here to train by: .* --distill 1"):
        prunella.prune(name, {**recipe, "heal": {**heal, "distill": 0.5}}, output=tmp_path / "no")
    assert not (tmp_path / "no.rounds").exists()
