from __future__ import annotations

import csv
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from processes import Command

import prunella
from prunella import InputError, Layer, Pattern, keep, registry
from prunella.allocate import budget
from prunella.calibrate import windows
from prunella.cells import cells_of, complete_plan, packed_bytes, sweep
from prunella.model.checkpoint import Checkpoint
from prunella.packing import pack_model
from prunella.report.results import Results
from prunella.rows import Rows
from prunella.tasks.text import load_model

BASE: dict[str, Any] = {"calibration": {"samples": 4, "length": 32}, "evaluate": {"windows": 2, "length": 32}}
PLAN = {**BASE, "grid": {"steps": ["magnitude", "wanda"], "sparsity": [0.5, 0.7]}}


@pytest.fixture
def breaking() -> Iterator[dict[str, Any]]:
    """A step that does as it is told: `fail`."""
    orders: dict[str, Any] = {"fail": None, "runs": 0}

    def brittle(layer: Layer) -> Layer:
        """Magnitude, if it likes."""
        orders["runs"] += 1
        if orders["fail"] is not None:
            raise orders["fail"]
        return layer.pruned(layer.weight_OI, keep(layer.weight_OI.abs(), layer.sparsity, layer.pattern, group="layer"))

    prunella.register("brittle")(brittle)
    yield orders
    del registry.steps["brittle"]


def lines(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "cells.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------------------------------------------------
# The grid


def labels(base: dict[str, Any], grid: dict[str, Any]) -> list[str]:
    return [cell.label for cell in cells_of(base, grid)]


def test_a_grid_is_every_combination_once() -> None:
    grid = {"steps": ["wanda", ["wanda", "update"]], "sparsity": [0.5, 0.625], "allocate": ["uniform", "owl"]}
    assert labels({}, grid) == [
        f"{spread}{steps}, {share}"
        for share in ("50%", "62.5%")
        for steps in ("wanda", "wanda + update")
        for spread in ("", "owl, ")
    ]


def test_patterns_that_fix_sparsity_are_one_cell_whatever_else_the_grid_says_of_it() -> None:
    grid = {"pattern": ["unstructured", "2:4", "4x1"], "sparsity": [0.5, 0.6], "allocate": ["uniform", "owl"]}
    found = labels({"steps": ["wanda"]}, grid)
    assert found == [
        "wanda, 50%",
        "owl, wanda, 50%",
        "wanda, 60%",
        "owl, wanda, 60%",
        "wanda, 2:4",
        *("wanda, 4x1 50%", "owl, wanda, 4x1 50%", "wanda, 4x1 60%", "owl, wanda, 4x1 60%"),
    ]


def test_names_of_cells_say_all_that_differs() -> None:
    grid = {"steps": [[{"besa": {"per": "layer"}}], "besa"], "seed": [0, 1], "skip": [[], ["q_proj"]]}
    found = labels({"sparsity": {"*": 0.5, "down_proj": 0.4}}, grid)
    assert len(set(found)) == 8
    assert 'besa(per=layer), skip=["q_proj"], seed=1, 50% down_proj 40%' in found


def test_exceptions_in_the_base_stay_when_the_grid_sets_the_sparsity() -> None:
    (cell,) = cells_of({"sparsity": {"*": 0.5, "down_proj": 0.4}}, {"sparsity": [0.6]})
    assert cell.recipe["sparsity"] == {"*": 0.6, "down_proj": 0.4}


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({"step": ["wanda"]}, "unknown key of the grid 'step'. Did you mean 'steps'"),
        ({"model": ["a", "b"]}, "unknown key of the grid 'model'"),
        ({"steps": "wanda"}, "grid key 'steps': 'wanda' should be a list"),
        ({"sparsity": []}, "should be a list"),
        ({"steps": ["wand"]}, "unknown step 'wand'. Did you mean 'wanda'"),
        ({"sparsity": [1.0]}, "out of range"),
    ],
)
def test_grids_that_mean_nothing_are_refused(grid: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        cells_of({}, grid)
    assert message in str(error.value)


def test_flags_go_before_the_file_and_settings_into_every_cell() -> None:
    plan = complete_plan(
        {"seed": 3, "grid": {"sparsity": [0.1]}}, {"sparsity": [0.5]}, ["order=[block, layer]"], ["seed=4"]
    )
    assert plan["grid"] == {"sparsity": [0.5], "order": ["block", "layer"]}
    assert plan["seed"] == 4
    with pytest.raises(InputError, match="is not a YAML list"):
        complete_plan({}, {}, ["order=[block"], [])


# ---------------------------------------------------------------------------------------------------------
# The file


def test_rows_of_other_settings_damaged_lines_and_half_a_line_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "cells.jsonl"
    good = {"settings": {"a": 1}, "method": "m", "cell": "c", "n": 1}
    text = [json.dumps(good), json.dumps({**good, "settings": {"a": 2}, "cell": "d"}), "[]", "3", "", "{}", "\xff"]
    path.write_bytes("\n".join(text).encode("latin-1") + b'\n{"settings": {"a": 1}, "meth')
    rows = Rows(path, {"a": 1})
    assert rows.rows == {("m", "c"): good}
    with rows.open():
        rows.add(("m", "e"), {"n": 2})
    again = Rows(path, {"a": 1})
    assert again.rows.keys() == {("m", "c"), ("m", "e")}
    with again.open():
        again.add(("m", "c"), {"n": 3})
    assert Rows(path, {"a": 1}).rows["m", "c"]["n"] == 3
    assert Rows(path, {"a": 2}).rows.keys() == {("m", "d")}


def test_cells_of_a_model_count_by_any_of_its_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("model", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to("model")
    rows = Rows(tmp_path / "x", {"model": str(tmp_path / "model")})
    with rows.open():
        rows.add(("m", "c"), {"n": 1})
    monkeypatch.chdir(tmp_path)
    assert Rows(tmp_path / "x", {"model": "link"}).rows.keys() == {("m", "c")}
    assert not Rows(tmp_path / "x", {"model": "other"}).rows


def test_two_sweeps_do_not_write_to_one_file(tmp_path: Path) -> None:
    first, second = Rows(tmp_path / "x", {}), Rows(tmp_path / "x", {})
    with first.open(), pytest.raises(InputError, match="another sweep is writing"), second.open():
        pass
    with second.open():
        pass


# ---------------------------------------------------------------------------------------------------------
# The sweep


def test_cells_are_what_prune_makes_of_their_recipes(llama: Path, tmp_path: Path) -> None:
    plan = {**BASE, "grid": {"steps": ["magnitude", "wanda", ["wanda", "update"]], "allocate": ["uniform", "owl"]}}
    results = sweep(str(llama), plan, tmp_path / "out")
    assert not results.failed
    assert len(results.done) == 6
    for number, row in enumerate(results.done):
        recipe = {**row["recipe"], "evaluate": BASE["evaluate"]}
        report = prunella.prune(str(llama), recipe, output=tmp_path / str(number))
        assert row["perplexity"] == {"pydoc": report.pruned["perplexity"]}
        assert row["sparsity"] == report.sparsity
        assert row["recipe"] == {**report.recipe, "evaluate": row["recipe"]["evaluate"]}
    assert results.rows[0]["perplexity"] == {"pydoc": report.dense["perplexity"]}


def test_a_model_that_does_not_fit_twice_gives_the_same_numbers(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = {**BASE, "order": "block", "grid": {"steps": ["wanda", "sparsegpt"], "allocate": ["uniform", "owl"]}}
    roomy = sweep(str(llama), plan, tmp_path / "roomy")
    size = roomy.rows[0]["size"]
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("M", (), {"available": 4 * size - 2})())
    tight = sweep(str(llama), plan, tmp_path / "tight")
    for one, other in zip(roomy.rows, tight.rows, strict=True):
        assert (one["method"], one["perplexity"], one.get("error")) == (
            other["method"],
            other["perplexity"],
            other.get("error"),
        )
        assert one["size"] == other["size"]
    assert not list((tmp_path / "tight").glob(".sweep-*"))


def test_statistics_of_the_dense_model_are_made_once(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams = 0

    class Counted(budget.Stream):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            nonlocal streams
            streams += 1
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(budget, "Stream", Counted)
    plan = {**BASE, "grid": {"steps": ["wanda"], "allocate": ["owl", "dlp"], "sparsity": [0.4, 0.5, 0.6]}}
    results = sweep(str(llama), plan, tmp_path / "out")
    assert len(results.done) == 6
    assert streams == 1


def test_finished_cells_are_not_made_again(llama: Path, tmp_path: Path, breaking: dict[str, Any]) -> None:
    plan = {**BASE, "grid": {"steps": ["brittle"], "sparsity": [0.5]}}
    sweep(str(llama), plan, tmp_path)
    runs = breaking["runs"]
    told: list[str] = []
    more = {**plan, "grid": {"steps": ["brittle", "magnitude"], "sparsity": [0.5]}}
    results = sweep(str(llama), more, tmp_path, say=told.append)
    assert breaking["runs"] == runs
    assert [message.split(":")[1] for message in told] == [" magnitude, 50%"]
    assert results.done[0]["perplexity"] == results.done[1]["perplexity"]
    assert len(lines(tmp_path)) == 3
    other = {**plan, "calibration": {"samples": 3, "length": 32}}
    sweep(str(llama), other, tmp_path)  # other windows: nothing of it is taken over
    assert breaking["runs"] > runs
    assert len(lines(tmp_path)) == 5


@pytest.mark.parametrize("error", [InputError("not like this"), ValueError("a <b>defect</b>")])
def test_a_cell_that_fails_is_reported_and_the_rest_goes_on(
    llama: Path, tmp_path: Path, breaking: dict[str, Any], error: Exception
) -> None:
    plan = {**BASE, "grid": {"steps": ["brittle", "magnitude"], "sparsity": [0.5, 0.6]}}
    breaking["fail"] = error
    told: list[str] = []
    results = sweep(str(llama), plan, tmp_path, say=told.append)
    assert [row["method"] for row in results.failed] == ["brittle", "brittle"]
    assert [row["method"] for row in results.done] == ["magnitude", "magnitude"]
    assert sum(str(error) in message for message in told) == 2
    page = (tmp_path / "sweep.html").read_text()
    assert "2 failed" in page
    assert "<b>" not in page
    assert results.matrix("pydoc")[1][0] == ["brittle", "failed", "failed"]
    breaking["fail"] = None
    results = sweep(str(llama), plan, tmp_path)
    assert not results.failed
    assert "failed" not in (tmp_path / "sweep.html").read_text()


def test_a_sweep_that_was_killed_goes_on_after_the_last_whole_line(llama: Path, tmp_path: Path) -> None:
    slow, hold = tmp_path / "slow.py", tmp_path / "hold"
    hold.touch()
    slow.write_text(
        "import pathlib, time\n"
        "from prunella import Layer, keep, register\n"
        "@register('slow')\n"
        "def slow(layer: Layer) -> Layer:\n"
        f"    while layer.sparsity > 0.55 and pathlib.Path({str(hold)!r}).exists():\n"
        "        time.sleep(0.01)\n"
        "    return layer.pruned(layer.weight_OI, keep(layer.weight_OI.abs(), layer.sparsity, layer.pattern))\n"
    )
    shares = [0.3, 0.4, 0.5, 0.6]
    recipe = tmp_path / "grid.yaml"
    recipe.write_text(yaml.safe_dump({**BASE, "grid": {"steps": [f"{slow}:slow"], "sparsity": shares}}))
    out = tmp_path / "out"
    command = Command.start(tmp_path / "log", "sweep", llama, "-o", out, "--recipe", recipe)
    deadline = time.monotonic() + 120
    while not (out / "cells.jsonl").exists() or len((out / "cells.jsonl").read_text().split("\n")) < 4:
        assert command.process.exitcode is None, command.said()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert command.kill_after(0)
    hold.unlink()
    before = [line for line in (out / "cells.jsonl").read_text().split("\n") if line]
    with (out / "cells.jsonl").open("a") as file:
        file.write(before[-1][:40])  # as if it had been killed in the middle of a line
    told: list[str] = []
    plan = {**BASE, "grid": {"steps": [f"{slow}:slow"], "sparsity": shares}}
    results = sweep(str(llama), plan, out, say=told.append)
    assert len(told) == len(shares) - (len(before) - 1) < len(shares)
    assert [row["cell"] for row in results.done] == ["30%", "40%", "50%", "60%"]
    assert (out / "cells.jsonl").read_text().startswith("\n".join(before))


def test_several_texts_are_measured_on(llama: Path, tmp_path: Path) -> None:
    text = tmp_path / "other.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 200)
    results = sweep(str(llama), PLAN, tmp_path / "out", texts=["pydoc", str(text)])
    for row in results.rows:
        assert row["perplexity"].keys() == {"pydoc", "other.txt"}
        assert row["perplexity"]["pydoc"] != row["perplexity"]["other.txt"]
    page = (tmp_path / "out" / "sweep.html").read_text()
    assert "Perplexity on other.txt" in page
    with pytest.raises(InputError, match="it needs a text"):
        sweep(str(llama), {**PLAN, "evaluate": {"source": None}}, tmp_path / "none")


def test_sizes_are_those_that_pack_writes(llama: Path, tmp_path: Path) -> None:
    recipe = {**BASE, "steps": ["magnitude"], "sparsity": {"*": 0.7, "up_proj": 0.01}, "skip": ["q_proj"]}
    report = prunella.prune(str(llama), recipe, output=tmp_path / "pruned")
    pack_model(str(tmp_path / "pruned"), tmp_path / "packed")
    packed = sum(packed_bytes(layer, 4) for layer in report.layers)
    rest = report.model["parameters"] - sum(rows * columns for rows, columns in (la.shape for la in report.layers))
    assert Checkpoint(tmp_path / "packed").nbytes == packed + 4 * rest


# ---------------------------------------------------------------------------------------------------------
# Tables, plots, the command line


def row(method: str, cell: str, perplexity: float, size: int, decode: float = 0.0) -> dict[str, Any]:
    out: dict[str, Any] = {"method": method, "cell": cell, "perplexity": {"t": perplexity}, "size": size}
    out |= {"sparsity": 0.5, "error": 0.1, "seconds": 1.0, "cpu_seconds": 2.0}
    return out | ({"speed": {"packed": {"decode": decode}, "dense": {"decode": 10.0}}} if decode else {})


SETTINGS = {
    "model": "m",
    "text": ["t"],
    "samples": 1,
    "length": 2,
    "calibration": "c",
    "windows": 1,
    "dtype": "float32",
}


def test_tables_and_plots_hold_every_cell(tmp_path: Path) -> None:
    dense = {"method": "dense", "cell": "", "perplexity": {"t": 5.0}, "size": 2_000_000}
    failed = {"method": "b", "cell": "70%", "failed": 'no, "never"'}
    rows = (
        dense,
        row("a", "50%", 7, 1_000_000, 15),
        row("b", "50%", 8, 1_000_000, 15),
        row("a", "70%", 20, 600_000, 20),
    )
    results = Results(SETTINGS, (*rows, failed))
    results.write(tmp_path)
    with (tmp_path / "table.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [line["method"] for line in table] == ["dense", "a", "b", "a", "b"]
    assert [line["perplexity t"] for line in table] == ["5.0", "7", "8", "20", ""]
    assert table[1]["decode_tokens_per_second"] == "15"
    assert table[-1]["failed"] == failed["failed"]
    assert results.matrix("t") == (["method", "50%", "70%"], [["a", "7.00", "20.00"], ["b", "8.00", "failed"]])
    (_, marks, best), (_, fast, fastest) = results.plots()
    assert [(m.x, m.y) for m in marks] == [(2.0, 5.0), (1.0, 7), (1.0, 8), (0.6, 20)]
    assert [m.label for m in best] == ["a, 70%", "a, 50%", "dense"]
    assert [m.x for m in fast] == [10.0, 15, 15, 20]
    assert [m.label for m in fastest] == ["dense", "a, 50%", "a, 70%"][::-1]
    for name in ("pareto", "pareto1"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (tmp_path / f"{name}.svg").read_text()


def test_rows_without_sizes_have_tables_and_no_plot(tmp_path: Path) -> None:
    old = {"method": "a", "cell": "50%", "perplexity": {"t": 7.0}, "seconds": 1.0, "cpu_seconds": 2.0, "error": 0.1}
    results = Results(SETTINGS, ({"method": "dense", "cell": "", "perplexity": {"t": 5.0}}, old))
    assert results.plots() == []
    results.write(tmp_path)
    assert "7.00" in (tmp_path / "sweep.html").read_text()


FLAGS = [
    part for key in ("calibration.samples=4", "calibration.length=32", "evaluate.windows=2") for part in ("--set", key)
]


def test_the_command_prints_a_table_and_writes_everything(llama: Path, tmp_path: Path, run: Callable[..., Any]) -> None:
    axes = [
        "--step",
        "magnitude",
        "--step",
        "wanda+update",
        "--sparsity",
        0.5,
        "--pattern",
        "unstructured",
        "--pattern",
        "2:4",
    ]
    outcome = run("sweep", llama, "-o", tmp_path / "out", *axes, *FLAGS, "--grid", "seed=[1, 2]")
    assert outcome.code == 0, outcome.err
    assert outcome.err.count("prunella: ") == 8
    assert "wanda + update, seed=2" in outcome.out
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"cells.jsonl", "table.csv", "sweep.html", "pareto.png", "pareto.svg"}
    again = run("sweep", llama, "-o", tmp_path / "out", *axes, *FLAGS, "--grid", "seed=[1, 2]", "--json")
    assert len(json.loads(again.out)) == 9
    assert again.err == ""


def test_the_command_measures_speed_where_asked(llama: Path, tmp_path: Path, run: Callable[..., Any]) -> None:
    arguments = ("sweep", llama, "-o", tmp_path, "--step", "magnitude", *FLAGS)
    run(*arguments)
    outcome = run(*arguments, "--speed", "--json")
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out)[1]["speed"]["packed"]["decode"] > 0
    assert "tokens decoded" in (tmp_path / "sweep.html").read_text()


def test_the_command_ends_with_2_where_a_cell_failed(
    llama: Path, tmp_path: Path, run: Callable[..., Any], breaking: dict[str, Any]
) -> None:
    breaking["fail"] = InputError("no")
    outcome = run("sweep", llama, "-o", tmp_path, "--step", "brittle", "--step", "magnitude", *FLAGS)
    assert outcome.code == 2
    assert "1 of 2: brittle, 50%: failed: no" in outcome.err
    assert "1 cells failed" in outcome.err


def test_patterns_that_do_not_divide_fail_alone(llama: Path, tmp_path: Path) -> None:
    plan = {**BASE, "grid": {"steps": ["magnitude"], "pattern": ["5x7", "2:4"]}}
    results = sweep(str(llama), plan, tmp_path)
    assert "does not divide layer" in results.failed[0]["failed"]
    assert Pattern.parse(results.done[0]["cell"]).sparsity == 0.5


def test_cells_are_healed_on_other_windows_than_they_are_measured_on(llama: Path, tmp_path: Path) -> None:
    heal = {"train": ["norms"], "tokens": 512, "length": 32}
    plan = {**BASE, "grid": {"steps": ["magnitude"], "heal": [{}, heal]}}
    results = sweep(str(llama), plan, tmp_path / "out")
    assert not results.failed
    plain, healed = results.done
    assert plain["method"] == "magnitude"
    assert healed["method"] == "magnitude, healed by norms (tokens=512, length=32)"
    assert healed["perplexity"] != plain["perplexity"]
    recipe = {**BASE, "steps": ["magnitude"], "heal": heal}
    prunella.prune(str(llama), recipe, output=tmp_path / "alone")
    alone = load_model(str(tmp_path / "alone"))
    ids_NL = windows(alone, "pydoc", 2, 32, skip=4)
    assert healed["perplexity"]["pydoc"] == prunella.perplexity(alone, ids_NL).perplexity
    assert not list((tmp_path / "out").glob(".sweep-*"))
    (tmp_path / "other.txt").write_text("A garden is green and a forest is greener. " * 100)
    texts = ["pydoc", str(tmp_path / "other.txt")]
    both = {**BASE, "grid": {"steps": ["magnitude"], "heal": [{**heal, "text": texts}]}}
    apart = {**BASE, "grid": {"steps": ["magnitude"], "heal": [{**heal, "train": ["lora"]}]}}
    with pytest.raises(InputError, match="stays in an adapter"):
        sweep(str(llama), apart, tmp_path / "adapter", texts=["pydoc"])
    assert not (tmp_path / "adapter").exists()
    with pytest.raises(InputError, match="would train on more than one"):
        sweep(str(llama), both, tmp_path / "two", texts=texts)
    with pytest.raises(InputError, match="two texts are called 'pydoc'"):
        sweep(str(llama), plan, tmp_path / "two", texts=["pydoc", "pydoc"])


def test_layers_that_stay_dense_do_so_under_every_pattern() -> None:
    cells = cells_of({"sparsity": {"down_proj": 0, "up_proj": 0.3}}, {"pattern": ["2:4", "unstructured"]})
    assert [cell.recipe["sparsity"]["down_proj"] for cell in cells] == [0, 0]
    assert ["up_proj" in cell.recipe["sparsity"] for cell in cells] == [False, True]


def test_packed_cells_are_measured_as_their_files_have_them(llama: Path, tmp_path: Path) -> None:
    base = {**BASE, "steps": ["magnitude"], "format": "packed", "bits": 4}
    results = sweep(str(llama), {**base, "grid": {"round_head": [False, True]}}, tmp_path / "out")
    dense = results.rows[0]["perplexity"]["pydoc"]
    for row, head in zip(results.done, (False, True), strict=True):
        one = prunella.prune(str(llama), {**base, "round_head": head}, output=tmp_path / str(head))
        packed = load_model(str(tmp_path / str(head)), packed=True)
        held_out = windows(packed, "pydoc", 6, 32)[4:]  # after those of the calibration
        assert row["perplexity"]["pydoc"] == prunella.perplexity(packed, held_out).perplexity != dense
        assert row["size"] == one.pruned["bytes"]
