"""Healing of classifiers of pictures: timm's and transformers', from the directory to the directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pictures as drawn
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification

import prunella
from prunella import InputError

timm = pytest.importorskip("timm")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures")
    drawn.folder(path / "train", 8)
    drawn.folder(path / "test", 4, start=200)
    return path


@pytest.fixture(scope="module")
def convolutions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "timm"
    network = drawn.tiny_timm(label_names=tuple(drawn.CLASSES))
    drawn.train(network, drawn.prepared(network))
    timm.models.save_for_hf(network, str(path), safe_serialization=True)
    return path


def recipe(photos: Path, **heal: Any) -> dict[str, Any]:
    return {
        "steps": ["magnitude"],
        "sparsity": 0.6,
        "calibration": {"source": str(photos), "samples": 8, "min_tokens": 1},
        "evaluate": {"source": str(photos), "windows": 12},
        "heal": {"train": ["all"], "epochs": 2, "batch": 8, "micro": 8, "held_out": 0, **heal},
    }


def zeros_hold(directory: Path) -> bool:
    state, masks = load_file(directory / "model.safetensors"), prunella.read_masks(directory)
    shapes = {name: state[f"{name}.weight"] for name in masks if f"{name}.weight" in state}
    assert shapes
    model = prunella.open_model(str(directory))
    with model.whole() as network, torch.no_grad():
        return all(
            not slot.read()[~masks[slot.name]].any()
            for block in model.blocks
            for slot in prunella.layers.find_layers(network.get_submodule(block), block)  # type: ignore[attr-defined]
            if slot.name in masks
        )


@pytest.mark.parametrize(
    "heal",
    [
        {"augment": True, "distill": 0.5, "rounds": 2},
        {"train": ["head", "mask-lora", "norms"]},
        {"train": ["norms", "mask-lora"], "way": "reconstruct"},
    ],
    ids=str,
)
def test_a_classifier_of_timm_is_pruned_and_healed(
    heal: dict[str, Any], convolutions: Path, photos: Path, tmp_path: Path
) -> None:
    wanted = recipe(photos, **heal)
    if heal.get("way") == "reconstruct":
        wanted["heal"] = {key: value for key, value in wanted["heal"].items() if key in ("train", "way", "epochs")}
    report = prunella.prune(str(convolutions), wanted, output=tmp_path / "out")
    assert zeros_hold(tmp_path / "out")
    assert report.healing["after"]["figure"] == "top-1"
    network = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    state = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())


def test_a_vision_transformer_is_healed_without_labels(photos: Path, tmp_path: Path) -> None:
    network, processor = drawn.tiny_vit(), drawn.processor()
    network.save_pretrained(tmp_path / "vit")
    processor.save_pretrained(tmp_path / "vit")
    bare = tmp_path / "bare" / "all"
    bare.mkdir(parents=True)
    for number, file in enumerate(sorted((photos / "train").rglob("*.*"))[:16]):
        (bare / f"{number}{file.suffix}").write_bytes(file.read_bytes())
    wanted = recipe(photos, train=["biases", "lora-prune"], rate=3e-3)
    report = prunella.prune(str(tmp_path / "vit"), wanted, output=tmp_path / "out")
    assert zeros_hold(tmp_path / "out")
    assert report.healing["samples"] > 0
    AutoModelForImageClassification.from_pretrained(tmp_path / "out")


def test_what_no_picture_says_is_refused(convolutions: Path, photos: Path, tmp_path: Path) -> None:
    prunella.prune(str(convolutions), recipe(photos) | {"heal": {}}, output=tmp_path / "pruned")
    for heal, message in (({"tokens": 100}, "trains in passes"), ({"text": [str(tmp_path / "nothing")]}, "nothing")):
        with pytest.raises(InputError, match=message):
            prunella.heal(tmp_path / "pruned", recipe(photos, **heal), output=tmp_path / "out")
