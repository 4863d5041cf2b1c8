from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

import prunella
from prunella import ModelError, Report
from prunella.report import layer_table, peak_memory


@pytest.fixture(scope="module")
def pruned(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    out = tmp_path_factory.mktemp("report") / "out"
    recipe = {
        "steps": ["wanda", "sparsegpt"],
        "sparsity": {"*": 0.5, "down_proj": 0.25},
        "skip": ["q_proj"],
        "calibration": {"samples": 4, "length": 32},
        "evaluate": {"windows": 2, "length": 32},
    }
    return out, prunella.prune(llama, recipe, output=out)


def test_the_saved_report_is_the_one_that_was_returned(pruned: tuple[Path, Report]) -> None:
    out, report = pruned
    assert Report.read(out).plain() == report.plain()
    assert json.loads((out / "prunella.json").read_text()) == json.loads(json.dumps(report.plain()))


def test_it_holds_everything_that_is_worth_knowing(pruned: tuple[Path, Report], llama: Path) -> None:
    _, report = pruned
    assert report.model["name"] == str(llama)
    assert report.model["class"] == "LlamaForCausalLM"
    assert report.model["dtype"] == "float32"
    for side in (report.dense, report.pruned):
        assert side["perplexity"] > 1
        assert (side["windows"], side["length"], side["source"]) == (2, 32, "pydoc")
        assert side["sample"].startswith("The most important thing")
    assert report.run["seconds"]["all"] >= report.run["seconds"]["prune"] > 0
    assert report.run["cpu_seconds"] > 0
    assert report.run["peak_memory"] > 10**7
    assert {"prunella", "torch", "transformers", "python"} <= report.versions.keys()


def test_the_recipe_in_it_is_resolved(pruned: tuple[Path, Report]) -> None:
    _, report = pruned
    recipe = prunella.Recipe.of(report.recipe)
    assert recipe.plain() == report.recipe
    assert recipe.order in ("layer", "block")
    assert recipe.dtype == "float32"
    assert recipe.device == "cpu"


def test_the_sparsity_of_the_whole_is_weighted_by_size(pruned: tuple[Path, Report]) -> None:
    _, report = pruned
    for layer in report.layers:
        expected = 0.0 if layer.name.endswith("q_proj") else 0.25 if layer.name.endswith("down_proj") else 0.5
        assert layer.sparsity == layer.target == expected
    zeros = sum(la.sparsity * la.shape[0] * la.shape[1] for la in report.layers)
    assert report.sparsity == pytest.approx(zeros / report.model["prunable"])
    assert report.plain()["sparsity"] == report.sparsity


def test_the_table_puts_dense_beside_pruned(pruned: tuple[Path, Report]) -> None:
    _, report = pruned
    rows = {name: (dense, after) for name, dense, after in report.rows()}
    assert rows["perplexity (pydoc, 2 windows of 32, without BOS)"] == (
        f"{report.dense['perplexity']:.2f}",
        f"{report.pruned['perplexity']:.2f}",
    )
    assert rows["sparsity of all block weights"][1] == f"{report.sparsity:.1%}"
    assert rows["peak memory"][1].endswith(" GB")


def test_the_card_is_readable_by_the_hub_and_says_what_was_done(pruned: tuple[Path, Report]) -> None:
    out, report = pruned
    card = (out / "README.md").read_text()
    _, front, text = card.split("---\n", 2)
    assert yaml.safe_load(front)["library_name"] == "transformers"
    assert "`wanda + sparsegpt`" in text
    assert f"{report.sparsity:.1%}" in text
    assert f"{report.pruned['perplexity']:.2f}" in text
    assert "4 windows of\n32 tokens" in text
    assert str(out.parent) not in card  # a card is published: no paths of this machine


def test_the_table_of_layers_has_a_row_for_each(pruned: tuple[Path, Report]) -> None:
    _, report = pruned
    rows = layer_table(report.layers)
    assert [row[0] for row in rows] == [la.name for la in report.layers]
    assert {row[3] for row in rows if "q_proj" in row[0]} == {"dense"}


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"sparsity": 1, "layers": [{}]}'])
def test_a_damaged_report_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "prunella.json").write_text(content)
    with pytest.raises(ModelError, match=r"prunella\.json' is damaged"):
        Report.read(tmp_path)


def test_a_directory_without_a_report_was_not_pruned_here(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no prunella\.json"):
        Report.read(tmp_path)


def test_peak_memory_only_grows() -> None:
    before = peak_memory()
    assert peak_memory() >= before > 10**7


def test_a_report_with_half_of_an_evaluation_is_damaged(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    recipe = {"steps": ["magnitude"], "calibration": {"samples": 2, "length": 32}, "evaluate": {"source": None}}
    prunella.prune(str(llama), recipe, output=out)
    said = json.loads((out / "prunella.json").read_text())
    said["pruned"]["perplexity"] = 42.0
    (out / "prunella.json").write_text(json.dumps(said))
    with pytest.raises(prunella.ModelError, match="damaged: 'source'"):
        prunella.Report.read(out)
