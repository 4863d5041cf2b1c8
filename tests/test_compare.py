from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import prunella
from prunella import ModelError, Report
from prunella.report.compare import Comparison


@pytest.fixture(scope="module")
def pruned(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("compare")
    base = {"calibration": {"samples": 4, "length": 32}, "evaluate": {"windows": 2, "length": 32}}
    for name, steps in (("a", ["magnitude"]), ("b", ["wanda", "update"])):
        prunella.prune(str(llama), {**base, "steps": steps}, output=root / name)
    return [root / "a", root / "b"]


def test_runs_stand_side_by_side_with_what_they_measured(pruned: list[Path]) -> None:
    found = Comparison.read(pruned)
    rows = {what: values for what, *values in found.rows()}
    one, other = (Report.read(path) for path in pruned)
    assert rows["steps"] == ["", "magnitude", "wanda + update"]
    assert rows["calibration"] == ["", "pydoc, 4 x 32", "pydoc, 4 x 32"]
    assert rows["perplexity (pydoc, 2 windows of 32, without BOS)"] == [
        f"{one.dense['perplexity']:.2f}",
        f"{one.pruned['perplexity']:.2f}",
        f"{other.pruned['perplexity']:.2f}",
    ]
    worst = max(other.layers, key=lambda la: la.error or 0)
    assert rows["layer that lost most"][2] == f"{worst.name}: {worst.error:.4f}"


def test_what_was_measured_differently_is_not_put_into_one_row(pruned: list[Path]) -> None:
    one, other = (Report.read(path) for path in pruned)
    changed = replace(other, dense={**other.dense, "windows": 3}, pruned={**other.pruned, "windows": 3})
    rows = Comparison(("a", "b"), (one, changed)).rows()
    by_name = {what: values for what, *values in rows}
    assert by_name["perplexity (pydoc, 2 windows of 32, without BOS)"][2] == ""
    assert by_name["perplexity (pydoc, 3 windows of 32, without BOS)"][1] == ""
    worse = replace(other, dense={**other.dense, "perplexity": 5.0})
    (row,) = (row for row in Comparison(("a", "b"), (one, worse)).rows() if row[0].startswith("perplexity"))
    assert row[1] == ""
    assert row[3] == f"{other.pruned['perplexity']:.2f} (dense 5.00)"


def test_healed_figures_are_shown_as_healed(pruned: list[Path]) -> None:
    one, other = (Report.read(path) for path in pruned)
    before = other.pruned
    did = {
        "recipe": {"train": [{"norms": {}}]},
        "tokens": 4096,
        "before": before,
        "after": {**before, "perplexity": 9.5},
    }
    label = "perplexity (pydoc, 2 windows of 32, without BOS)"

    def rows(**changes: Any) -> dict[str, tuple[str, ...]]:
        reports = one, replace(other, healing={**did, **changes})
        return {what: tuple(values) for what, *values in Comparison(("a", "b"), reports).rows()}

    was = f"{before['perplexity']:.2f}"
    assert rows()["healing"] == ("", "", "norms, 4,096 tokens")
    assert rows()[label][1:] == (f"{one.pruned['perplexity']:.2f}", f"9.50, healed ({was} before)")
    assert rows(apart=["norms"])[label][2] == f"9.50 with the adapter, healed ({was} before)"
    longer = {"after": {**did["after"], "windows": 3}, "before": {**before, "windows": 3, "perplexity": 12.0}}
    assert rows(**longer)[label][2] == f"{was} before healing"
    assert rows(**longer)[label.replace("2 windows", "3 windows")] == ("", "", "9.50, healed (12.00 before)")
    unknown = {"perplexity": None, "sample": None}
    assert rows(before=unknown, after=unknown)[label][2] == f"{was} before healing, not measured since"


def test_directories_of_one_name_go_by_their_paths(pruned: list[Path]) -> None:
    assert Comparison.read(pruned).names == ("a", "b")
    assert Comparison.read([pruned[0], pruned[0]]).names == (str(pruned[0]), str(pruned[0]))


def test_the_command_prints_a_table_or_json_and_writes_a_page(
    pruned: list[Path], tmp_path: Path, run: Callable[..., Any]
) -> None:
    outcome = run("compare", *pruned, "--html", tmp_path / "page.html")
    assert outcome.code == 0
    assert "wanda + update" in outcome.out
    assert '<th scope="row">layer that lost most</th>' in (tmp_path / "page.html").read_text()
    data = json.loads(run("compare", *pruned, "--json").out)
    assert [item["name"] for item in data] == ["a", "b"]
    assert data[1]["pruned"]["perplexity"] == Report.read(pruned[1]).pruned["perplexity"]
    assert "layers" not in data[0]


def test_a_directory_that_was_not_pruned_is_named(pruned: list[Path], llama: Path, run: Callable[..., Any]) -> None:
    with pytest.raises(ModelError, match="was not pruned by Prunella"):
        Comparison.read([pruned[0], llama])
    assert run("compare", pruned[0], llama).code == 2
