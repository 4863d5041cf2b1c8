"""`prunella eval` for tasks other than text."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_answers import Clusters, network
from torch.nn import functional

import prunella
from prunella import InputError
from prunella.evaluate.difference import paired
from prunella.evaluate.score import score
from prunella.evaluate.task import judge
from prunella.samples import TARGET

TOY = Path(__file__).parent / "extensions" / "toy_task.py"


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A network of a third party's task, dense and pruned."""
    import test_extensions_task

    root = tmp_path_factory.mktemp("toys")
    dense, pruned = root / "dense", root / "pruned"
    recipe = {"task": f"{TOY}:toy", "steps": ["sparsegpt"], "evaluate": {"windows": 4}}
    prunella.prune(test_extensions_task.network(), {**recipe, "sparsity": 0.01}, output=dense)
    prunella.prune(str(dense), {**recipe, "sparsity": 0.7}, output=pruned)
    return dense, pruned


def test_the_interval_of_answers_is_mcnemars() -> None:
    one = [1] * 50 + [1] * 12 + [0] * 5 + [0] * 33
    other = [1] * 50 + [0] * 12 + [1] * 5 + [0] * 33
    found = paired(one, other)
    assert found.difference == pytest.approx(0.07)
    spread = math.sqrt((12 + 5 - 7**2 / 100) / 99)  # n s² = b + c - (b - c)² / n
    assert found.high - found.low == pytest.approx(2 * 1.96 * spread / 10)
    assert paired([1, 0, 1], [1, 0, 1]) == paired([0.5, 2.0], [0.5, 2.0])


def test_the_paired_interval_covers_the_truth_as_often_as_it_says() -> None:
    draw, hits = np.random.default_rng(0), 0
    for _ in range(300):
        hard = draw.normal(0, 1, 200)
        found = paired(list(hard + 0.1 + draw.normal(0, 0.2, 200)), list(hard))
        hits += found.low <= 0.1 <= found.high
        assert found.high - found.low < 0.08  # unpaired 0.28
    assert 0.91 <= hits / 300 <= 0.99


def test_two_networks_on_the_same_samples() -> None:
    task = Clusters()
    one, other = network(), network()
    with torch.no_grad():
        other[0].weight[::2] = 0
    models = [task.wrap(net, name=name) for net, name in ((one, "one"), (other, "other"))]
    (found,) = judge(models[1], ["drawn"], beside=models[0], count=128)
    samples = task.samples(models[0], "drawn", 128).groups[0]
    with torch.no_grad():
        classes = [net(samples["x"]).argmax(1) for net in (one, other)]
    right = [(c == samples["labels"]).double() for c in classes]
    assert found["accuracy"] == right[1].mean().item()
    assert found["beside"]["accuracy"] == right[0].mean().item()
    assert found["difference"]["difference"] == pytest.approx((right[1] - right[0]).mean().item())
    assert found["changed"] == int((classes[0] != classes[1]).sum()) > 0
    assert found["lost"] == int((right[0] > right[1]).sum())
    assert "changed" not in found["beside"]
    (alone,) = judge(models[1], [])
    assert (alone["source"], alone["samples"]) == ("", Clusters.many)
    same = judge(models[0], [], beside=models[0])[0]
    assert (same["changed"], same["difference"]) == (0, {"difference": 0, "low": 0, "high": 0})


def test_samples_that_differ_are_not_compared() -> None:
    one, other = Clusters().wrap(network(), name="one"), Clusters(labelled=False).wrap(network(), name="other")
    with pytest.raises(InputError, match=r"'one' and 'other' make different samples of 'drawn'"):
        judge(one, ["drawn"], beside=other, count=4)


def test_the_command_prints_what_the_task_says(toys: tuple[Path, Path], run: Callable[..., Any]) -> None:
    dense, pruned = toys
    done = run("eval", pruned, "--windows", 64, "--beside", dense)
    assert (done.code, done.err) == (0, "")
    first, second = done.out.splitlines()
    found = score(str(pruned), None, windows=64, beside=str(dense))
    assert first == f"loss {found['loss']:.4g}  (random, 64 samples, float32)"
    apart = found["difference"]
    assert second.startswith(
        f"     {found['sources'][0]['beside']['loss']:.4g}  {dense}: {apart['difference']:+.4g}, 95%"
    )
    assert apart["low"] < apart["difference"] < apart["high"]
    plain = json.loads(run("eval", pruned, "--windows", 64, "--json").out)
    assert (plain["task"], plain["loss"]) == (f"{TOY}:toy", found["loss"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--text", "pydoc"), "toys are run on 'random' numbers, not on 'pydoc'"),
        (("--length", 32), "takes no length: that is of causal language models"),
        (("--no-bos",), "takes no --no-bos"),
        (("--tasks", "piqa"), "takes no questions"),
        (("--task", "text"), "is of task"),
        (("--task", "nothing"), "unknown task 'nothing'"),
    ],
)
def test_what_the_task_does_not_take_is_one_line(
    toys: tuple[Path, Path], run: Callable[..., Any], words: tuple[Any, ...], message: str
) -> None:
    done = run("eval", toys[1], *words)
    assert done.code == 2
    (line,) = done.err.splitlines()
    assert message in line


def test_a_language_model_is_not_set_beside_another_task(
    toys: tuple[Path, Path], llama: Path, run: Callable[..., Any]
) -> None:
    for one, other in ((toys[0], llama), (llama, toys[0])):
        done = run("eval", one, "--beside", other, "--windows", 2)
        assert done.code == 2
        assert "causal language model" in done.err or "they answer different questions" in done.err


def test_samples_without_labels_are_measured_by_what_another_network_answers() -> None:
    """Losses and answers are those of the network beside; alone nothing can be said."""

    class Blind(Clusters):
        def lacks(self, group: Any) -> bool:
            return TARGET not in group

        def target(self, outputs: torch.Tensor, batch: Any) -> torch.Tensor:
            return outputs.softmax(1)

        def losses(self, outputs: torch.Tensor, batch: Any) -> torch.Tensor:
            return functional.cross_entropy(outputs, batch[TARGET], reduction="none")

    task = Blind(labelled=False)
    one, other = network(), network()
    with torch.no_grad():
        other[0].weight[::2] = 0
    dense, pruned = task.wrap(one, name="one"), task.wrap(other, name="other")
    with pytest.raises(InputError, match="have no labels: give --beside DENSE"):
        judge(pruned, ["drawn"], count=32)
    (found,) = judge(pruned, ["drawn"], beside=dense, count=32)
    x = task.samples(dense, "drawn", 32).groups[0]["x"]
    with torch.no_grad():
        loss = functional.cross_entropy(other(x), one(x).softmax(1))
        same = (one(x).argmax(1) == other(x).argmax(1)).double().mean()
    assert found["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert (found["figure"], found["agreement"]) == ("agreement", same.item())
    assert found["beside"]["agreement"] == 1


def test_a_sweep_compares_what_the_task_measures(
    toys: tuple[Path, Path], tmp_path: Path, run: Callable[..., Any]
) -> None:
    words = (
        "--task",
        f"{TOY}:toy",
        "--step",
        "magnitude",
        "--step",
        "sparsegpt",
        "--sparsity",
        0.5,
        "--sparsity",
        0.75,
    )
    asked = ("sweep", toys[0], "-o", tmp_path / "out", *words, "--windows", 16, "--samples", 8)
    done = run(*asked)
    assert done.code == 0, done.err
    assert "loss on random, dense" in done.out
    rows = [json.loads(line) for line in (tmp_path / "out" / "cells.jsonl").read_text().splitlines()]
    assert [row["method"] for row in rows] == ["dense", "magnitude", "sparsegpt", "magnitude", "sparsegpt"]
    cell = next(row for row in rows if row["cell"] == "75%" and row["method"] == "sparsegpt")
    recipe = {"task": f"{TOY}:toy", "steps": ["sparsegpt"], "sparsity": 0.75, "evaluate": {"windows": 16}}
    report = prunella.prune(str(toys[0]), {**recipe, "calibration": {"samples": 8}}, output=tmp_path / "one")
    assert cell["scores"]["random"]["loss"] == pytest.approx(report.pruned["loss"], rel=1e-5)
    assert cell["scores"]["random"]["loss"] != rows[0]["scores"]["random"]["loss"]
    page = (tmp_path / "out" / "sweep.html").read_text()
    assert "Loss on random" in page
    assert "erplexity" not in page
    head = (tmp_path / "out" / "table.csv").read_text().splitlines()[0]
    assert head.startswith("method,cell,loss random,sparsity")
    before = (tmp_path / "out" / "cells.jsonl").read_bytes()
    assert run(*asked).code == 0
    assert (tmp_path / "out" / "cells.jsonl").read_bytes() == before
    line = run(*asked, "--speed").err
    assert "how fast text is decoded is of language models only" in line


def test_more_is_better_where_the_figure_says_so() -> None:
    from prunella.report.charts import Mark, front
    from prunella.report.results import Results

    marks = [Mark("a", "a", 1, 70.0), Mark("b", "b", 2, 80.0), Mark("c", "c", 3, 75.0)]
    assert [mark.label for mark in front(marks, higher=True)] == ["a", "b"]
    assert [mark.label for mark in front(marks)] == ["a"]
    score = {"figure": "top-1", "higher": True, "unit": "%"}
    rows = [
        {"method": method, "cell": cell, "size": size, "scores": {"pictures": {**score, "top-1": value, "error": 0.01}}}
        for method, cell, size, value in (("dense", "", 100, 0.9), ("wanda", "50%", 60, 0.8), ("ria", "50%", 60, 0.7))
    ]
    results = Results({"text": ["pictures"], "model": "x", "task": "images"}, tuple(rows))
    assert results.matrix("pictures")[1] == [["wanda", "80.0 ± 1.0 %"], ["ria", "70.0 ± 1.0 %"]]
    ((drawing, marks, best),) = results.plots()
    assert drawing.title == "pictures: top-1 against MB of weights"
    assert {mark.label for mark in best} == {"dense", "wanda, 50%"}
    assert [mark.y for mark in marks] == [90.0, 80.0, 70.0]
