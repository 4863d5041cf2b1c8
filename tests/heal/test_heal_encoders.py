"""Healing of encoders: classifiers, and those that have no task yet."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import encoders
import pytest
from safetensors.torch import load_file

import prunella


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sentences of several lengths, whose first word is their label."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    words = ["list", "string", "name", "value", "object", "class", "function", "module"]
    lines = [
        {"text": " ".join([("true", "false")[n % 2], *words[: 1 + n % 3], words[n % 8]]), "label": n % 2}
        for n in range(60)
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def bert(rows: Path, **heal: Any) -> dict[str, Any]:
    sources = {"calibration": {"source": str(rows), "samples": 12}, "evaluate": {"source": str(rows), "windows": 12}}
    own = {"train": ["all"], "epochs": 3, "batch": 8, "micro": 4, "rate": 3e-3, "held_out": 8, **heal}
    return {**sources, "steps": ["magnitude"], "heal": own}


@pytest.mark.parametrize(
    "train", [["all"], ["mask-lora", "biases"], ["head", "norms"], ["embeddings", "lora"]], ids=str
)
def test_a_classifier_of_texts_is_healed(train: list[str], rows: Path, tmp_path: Path) -> None:
    dense = encoders.write(tmp_path / "dense", encoders.build("bert", num_hidden_layers=2))
    report = prunella.prune(str(dense), bert(rows, train=train, distill=0.3), output=tmp_path / "out")
    assert report.recipe["task"] == {"classify": {}}
    assert report.healing["samples"] > 0
    assert 0 <= report.healing["after"]["accuracy"] <= 1
    assert report.healing["after"]["agreement"] >= 0  # beside the dense network
    masks = prunella.read_masks(tmp_path / "out")
    state = load_file(tmp_path / "out" / "model.safetensors")
    assert all(not state[f"{name}.weight"][~mask].any() for name, mask in masks.items())
    prunella.open_model(str(tmp_path / "out"))
    assert (tmp_path / "out" / "adapter").is_dir() == ("lora" in train)


def test_an_encoder_gets_a_head_for_its_task_and_trains(rows: Path, tmp_path: Path) -> None:
    dense = encoders.write(tmp_path / "dense", encoders.build("bert", "", num_hidden_layers=2))
    wanted = bert(rows, epochs=8) | {"task": "classify"}
    report = prunella.heal(dense, wanted, output=tmp_path / "out")
    assert report.healing["after"]["accuracy"] > 0.9
    assert report.model["name"] == str(dense)
    assert prunella.open_model(str(tmp_path / "out")).task.name == "classify"
    again = prunella.heal(dense, wanted, output=tmp_path / "again")
    assert again.healing["losses"] == report.healing["losses"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "dense", "out"]


def test_an_encoder_without_labels_keeps_its_embeddings(rows: Path, tmp_path: Path) -> None:
    dense = encoders.write(tmp_path / "dense", encoders.build("bert", "", num_hidden_layers=2))
    wanted = bert(rows, distill=0.5, rate=1e-3) | {"sparsity": 0.8}
    report = prunella.prune(str(dense), wanted, output=tmp_path / "out")
    assert report.recipe["task"] == {"masked": {}}
    assert report.healing["after"]["cosine"] > report.healing["before"]["cosine"]
