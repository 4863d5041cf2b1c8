"""How good a network is, in words, whatever its task measures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_answers import network

import prunella
from prunella import Report
from prunella.report.compare import Comparison
from prunella.report.figure import Figure, label, more_of
from prunella.report.page import by_block, facts, page, sentence

TOP: dict[str, Any] = {"figure": "top-1", "higher": True, "unit": "%", "source": "/home/me/pictures", "samples": 500}


@pytest.mark.parametrize(
    ("side", "words"),
    [
        ({"perplexity": 20.973}, "20.97"),
        ({"perplexity": None}, "not measured"),
        ({**TOP, "top-1": 0.88, "error": 0.0145}, "88.0 ± 1.5 %"),
        ({**TOP, "top-1": 0.88}, "88.0 %"),
        ({"figure": "loss", "loss": 0.123456, "error": 0.00123}, "0.1235 ± 0.0012"),
        ({"figure": "mAP", "mAP": None}, "not measured"),
    ],
)
def test_a_figure_is_said_in_its_own_unit(side: dict[str, Any], words: str) -> None:
    assert str(Figure.of(side)) == words


def test_a_share_changes_by_points_and_anything_else_by_a_part_of_itself() -> None:
    one, other = (Figure.of({**TOP, "top-1": value, "error": 0.01}) for value in (0.88, 0.762))
    assert other.beside(one) == "76.2 ± 1.0 % (-11.8 points)"
    assert one.better(other)
    assert not other.better(one)
    one, other = (Figure.of({"figure": "loss", "loss": value}) for value in (0.5, 0.75))
    assert other.beside(one) == "0.75 (+50.0%)"
    assert one.better(other)
    one, other = (Figure.of({"perplexity": value}) for value in (20.0, 30.0))
    assert other.beside(one) == "30.00"
    assert Figure.of({"figure": "loss", "loss": 0.0}).change(Figure.of({"figure": "loss", "loss": 0.0})) == ""


def test_the_label_says_on_what_it_was_measured() -> None:
    assert label({**TOP, "top-1": 0.88}) == "top-1 (pictures, 500 samples)"
    assert label({**TOP, "top-1": None}) == "top-1"
    assert label({"perplexity": 3.0, "source": "pydoc", "windows": 2, "length": 32, "bos": False}) == (
        "perplexity (pydoc, 2 windows of 32, without BOS)"
    )
    with pytest.raises(KeyError, match="source"):
        label({"perplexity": 3.0})


def test_more_scores_stand_below_with_their_units() -> None:
    side = {**TOP, "top-1": 0.88, "top-5": 0.97, "changed": 12, "more": {"top-5": "%", "changed": "", "agreement": "%"}}
    assert more_of(side) == {"top-5": "97.0 %", "changed": "12"}


@pytest.fixture(scope="module")
def report() -> Report:
    recipe = {"task": "clusters", "steps": ["magnitude"], "sparsity": 0.8, "evaluate": {"windows": 64}}
    return prunella.prune(network(), recipe)


def test_tables_card_and_page_of_a_classifier(report: Report) -> None:
    rows = {what: both for what, *both in report.rows()}
    assert report.rows()[0][0] == "accuracy (64 samples)"
    dense, pruned = rows["accuracy (64 samples)"]
    assert dense == f"{100 * report.dense['accuracy']:.1f} ± {100 * report.dense['error']:.1f} %"
    assert pruned.endswith("points)")
    assert rows["agreement"] == ["", f"{100 * report.pruned['agreement']:.1f} %"]
    assert rows["changed"] == ["", str(report.pruned["changed"])]
    card = report.card()
    assert "calibrated on 32 samples" in card
    assert "Load it with `prunella.open_model`" in card
    assert "library_name" not in card
    assert f"{100 * report.pruned['accuracy']:.1f}" in card
    text = page(report)
    assert f"from {Figure.of(report.dense)} to {Figure.of(report.pruned)} (" in sentence(report)
    assert facts(report)[0][:2] == ("accuracy", str(Figure.of(report.pruned)))
    for word in ("erplexity", "tokens", "windows"):
        assert word not in text.split("Do it again")[0]


def test_healed_figures_stand_beside_pruned_ones(report: Report) -> None:
    after = {**report.pruned, "accuracy": 0.5, "agreement": 0.75}
    did = {
        "recipe": {"train": [{"norms": {}}]},
        "tokens": 640,
        "trained": 0.01,
        "seconds": 1.0,
        "peak_memory": 1e9,
        "before": report.pruned,
        "after": after,
    }
    healed = replace(report, healing=did)
    rows = {what: both for what, *both in healed.healing_rows()}
    first = next(iter(rows.values()))
    assert first[1].startswith("50.0 ± ")
    assert first[1].endswith("points)")
    assert rows["agreement"][1] == "75.0 %"
    last = {what: both for what, *both in healed.outcome()}
    assert ", healed (" in next(iter(last.values()))[1]
    assert last["agreement"][1] == "75.0 %"
    found = Comparison(("a", "b"), (report, healed)).rows()
    assert any(row[0].startswith("accuracy") and "healed" in row[3] for row in found)


def test_layers_of_a_network_whose_blocks_are_known_stand_in_them() -> None:
    from test_page import layer

    names = ["stages.0.0.conv1", "stages.0.1.conv1", "stages.1.0.down.0", "stages.1.0.down.1"]
    found = by_block([layer(name) for name in names], ["stages.0.0", "stages.0.1", "stages.1.0"])
    assert {key: len(layers) for key, layers in found.items()} == {
        ("0", "conv1"): 1,
        ("1", "conv1"): 1,
        ("2", "down"): 2,
    }
    assert list(by_block([layer(name) for name in names], [""])) == [(str(n), "layers in order") for n in range(4)]


def test_the_card_names_what_loads_a_directory(report: Report) -> None:
    made = replace(report, model={**report.model, "library": "transformers", "class": "ViTForImageClassification"})
    assert "Load it with `transformers.ViTForImageClassification.from_pretrained`" in made.card()
    assert "library_name: transformers" in made.card()
    timm = replace(report, model={**report.model, "library": "timm", "class": "EfficientNet"})
    assert '`timm.create_model("local-dir:DIRECTORY", pretrained=True)`' in timm.card()
    packed = replace(timm, recipe={**report.recipe, "format": "packed"})
    assert "`prunella.open_model` loads it where Prunella is installed" in packed.card()


def test_a_report_survives_the_disk(report: Report, tmp_path: Path) -> None:
    import json

    (tmp_path / "prunella.json").write_text(json.dumps(report.plain()))
    assert Report.read(tmp_path).rows() == report.rows()
    assert torch.tensor(Report.read(tmp_path).pruned["each"]).shape == (64,)
