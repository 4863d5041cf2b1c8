"""A task from a file outside the package: what is there for text works with it, or says that it does not."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import prunella
from prunella import InputError, Layer, ModelError, Report, keep, read_masks, register
from prunella.allocate import allocations
from prunella.registry import steps
from prunella.samples import Samples

FILE = Path(__file__).parent / "extensions" / "toy_task.py"
TASK = f"{FILE}:toy"


def network(seed: int = 0) -> Any:
    """A toy, which the task's file defines."""
    spec = importlib.util.spec_from_file_location("toy_task", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.manual_seed(seed)
    return module.Net()


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """A toy on disk."""
    (tmp_path / "toy").mkdir()
    save_file(network().state_dict(), tmp_path / "toy" / "model.safetensors")
    return tmp_path / "toy"


@pytest.mark.parametrize("order", ["layer", "block"])
@pytest.mark.parametrize("name", sorted(steps))
def test_every_step_prunes_a_toy(name: str, order: str) -> None:
    method = steps[name]
    if order == "layer" and not method.per_layer:
        pytest.skip("works on whole blocks")
    before = [] if method.prunes else ["wanda"]
    net = network()
    recipe = {"task": TASK, "steps": [*before, name], "order": order}
    report = prunella.prune(net, recipe)
    assert [layer.name for layer in report.layers] == ["first.0", "second"]
    assert report.sparsity == pytest.approx(0.5, abs=0.02 if name == "besa" else 0)  # which moves it between layers
    assert all((net.get_submodule(la.name).weight == 0).float().mean() >= la.sparsity for la in report.layers)
    assert report.dense["figure"] == "loss"
    assert report.pruned["loss"] > 0
    assert report.pruned["loss"] != report.dense["loss"]
    assert all(layer.tokens for layer in report.layers) or not method.needs


@pytest.mark.parametrize("name", sorted(allocations))
def test_every_allocation_spreads_over_a_toy(name: str) -> None:
    report = prunella.prune(network(), {"task": TASK, "steps": ["wanda"], "allocate": name})
    assert report.sparsity == pytest.approx(0.5, abs=0.05)  # of a row of eight no share is met exactly
    assert list(report.recipe["allocate"]) == [name]


def test_losses_are_those_of_the_network_before_and_after() -> None:
    net = network()
    x = torch.randn(40, 8, generator=torch.Generator().manual_seed(3))[32:]  # what is held out
    with torch.no_grad():
        dense = (net(x) - x.flip(1)).square().mean(1)
        report = prunella.prune(net, {"task": TASK, "steps": ["sparsegpt"], "seed": 3})
        pruned = (net(x) - x.flip(1)).square().mean(1)
    assert report.dense["losses"] == pytest.approx(dense.tolist(), rel=1e-5)
    assert report.pruned["losses"] == pytest.approx(pruned.tolist(), rel=1e-5)
    assert report.pruned["loss"] == pytest.approx(pruned.mean().item(), rel=1e-5)
    assert report.recipe["task"] == {TASK: {}}
    assert report.recipe["calibration"]["source"] == report.recipe["evaluate"]["source"] == "random"
    (label, *_), *_ = report.rows()
    assert label == "loss (random, 8 samples)"


def test_the_command_line_prunes_what_the_task_opens(toy: Path, tmp_path: Path, run: Callable[..., Any]) -> None:
    out = tmp_path / "out"
    done = run("prune", toy, "-o", out, "--task", TASK, "--step", "wanda", "--set", f"{TASK}.noise=0.5")
    assert done.code == 0, done.err
    assert "loss (random, 8 samples)" in done.out
    assert "prunella pack" not in done.out  # the task opens its files by itself
    report = Report.read(out)
    assert report.recipe["task"] == {TASK: {"noise": 0.5}}
    tensors, masks = load_file(out / "model.safetensors"), read_masks(out)
    assert sorted(masks) == ["first.0", "second"]
    assert all((tensors[f"{name}.weight"][~mask] == 0).all() for name, mask in masks.items())
    assert report.pruned["bytes"] == sum(tensor.nbytes for tensor in tensors.values()) == report.dense["bytes"]
    assert "Load it with `prunella.open_model`" in (out / "README.md").read_text()
    refused = run("pack", out, "-o", tmp_path / "packed")
    assert refused.code == 2
    assert "opened by task" in refused.err
    again = prunella.prune(str(toy), report.recipe, output=tmp_path / "again")
    assert again.layers == report.layers
    twice = prunella.prune(str(out), {**report.recipe, "sparsity": 0.75}, output=tmp_path / "twice")
    assert twice.sparsity == 0.75
    evaluated = run("eval", out, "--windows", 8)
    assert evaluated.out.startswith("loss ")
    looked = run("inspect", out)
    assert looked.code == 0, looked.err
    assert "2 layers, " in looked.out
    shown = run("compare", out, tmp_path / "twice")
    assert shown.code == 0, shown.err
    assert "loss (random" in shown.out
    assert "None" not in shown.out
    assert run("report", out).code == 0
    assert "loss (random, 8 samples)" in (out / "report.html").read_text()


def test_a_toy_is_healed_in_memory_and_in_rounds(toy: Path, tmp_path: Path) -> None:
    heal = {"train": ["all"], "samples": 200, "epochs": 8, "rate": 1e-2}
    once = {"task": TASK, "steps": ["magnitude"], "sparsity": 0.5}
    prunella.prune(str(toy), once, output=tmp_path / "pruned")
    reports = [
        prunella.heal(tmp_path / "pruned", {**once, "heal": heal}, output=tmp_path / "healed"),
        prunella.prune(str(toy), {**once, "heal": {**heal, "rounds": 2, "distill": 0.1}}, output=tmp_path / "rounds"),
    ]
    for name, report in zip(("healed", "rounds"), reports, strict=True):
        assert report.healing["after"]["loss"] < 0.8 * report.healing["before"]["loss"]
        tensors, masks = load_file(tmp_path / name / "model.safetensors"), read_masks(tmp_path / name)
        assert all((tensors[f"{key}.weight"] != 0).equal(mask) for key, mask in masks.items())
        assert report.sparsity == 0.5
    with pytest.raises(InputError, match="is opened by its task into memory as a whole"):
        prunella.heal(
            tmp_path / "pruned", {**once, "heal": {"train": ["all"], "way": "reconstruct"}}, output=tmp_path / "no"
        )


def test_samples_and_networks_are_handed_over_as_they_are(tmp_path: Path) -> None:
    x = torch.randn(64, 8)
    calibration = Samples.of({"x": x, "y": x.flip(1)})
    recipe = {"task": TASK, "steps": ["wanda"], "evaluate": {"source": None}}
    nets = []
    for number in range(2):
        nets.append(network(number))
        report = prunella.prune(nets[-1], recipe, calibration=calibration, output=tmp_path / str(number))
        assert report.dense == {"figure": "loss", "loss": None, "sample": None, "bytes": report.dense["bytes"]}
        assert report.recipe["calibration"]["samples"] == 64
        saved = load_file(tmp_path / str(number) / "model.safetensors")
        assert all(torch.equal(saved[name], tensor) for name, tensor in nets[-1].state_dict().items())


@pytest.mark.parametrize("name", ["wanda", "sparsegpt", "besa"])
def test_a_toy_on_another_device_is_pruned_there(name: str, sim: torch.device) -> None:
    here, there = network(), network().to(sim)
    one, other = (prunella.prune(net, {"task": TASK, "steps": [name]}) for net in (here, there))
    assert one.pruned["losses"] == pytest.approx(other.pruned["losses"], rel=1e-4)
    for layer in one.layers:
        weights = [net.get_submodule(layer.name).weight.cpu() for net in (here, there)]
        torch.testing.assert_close(*weights)


def test_a_step_that_reads_gradients_reads_those_of_the_toys_loss() -> None:
    seen = {}

    @register("fisher", needs={"fisher"})
    def fisher(layer: Layer) -> Layer:
        """Prune by w^2 times the squared gradient."""
        seen[layer.name] = layer.stats["fisher"].clone()
        return layer.pruned(layer.weight_OI, keep(layer.weight_OI**2 * seen[layer.name], layer.sparsity, layer.pattern))

    net = network()
    whole = network()
    report = prunella.prune(net, {"task": TASK, "steps": ["fisher"]})
    assert (report.recipe["order"], report.sparsity) == ("back", 0.5)
    x = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
    expected = {name: torch.zeros_like(whole.get_submodule(name).weight) for name in seen}
    for x_1I in x.split(1):
        whole.zero_grad()
        (whole(x_1I) - x_1I.flip(1)).square().mean().backward()
        for name, sum_OI in expected.items():
            sum_OI += whole.get_submodule(name).weight.grad ** 2
    for name, sum_OI in expected.items():
        torch.testing.assert_close(seen[name], sum_OI)


@pytest.mark.parametrize("name", ["magnitude", "wanda", "sparsegpt", "besa", "admm"])
def test_a_network_that_is_no_chain_is_one_block(name: str, tmp_path: Path) -> None:
    net = network()
    net.forward = lambda x: net.second(net.first(x) + net.first(-x))  # both ways through the first layer
    report = prunella.prune(net, {"task": TASK, "steps": [name]}, output=tmp_path / "out")
    assert [layer.name for layer in report.layers] == ["first.0", "second"]
    assert report.sparsity == pytest.approx(0.5, abs=0.02)
    assert sorted(read_masks(tmp_path / "out")) == ["first.0", "second"]
    assert report.pruned["loss"] != report.dense["loss"]


def test_tied_weights_are_saved_once(tmp_path: Path) -> None:
    net = network()
    net.second = nn.Linear(16, 8)
    net.again = net.second  # one module by two names
    prunella.prune(net, {"task": TASK, "steps": ["magnitude"]}, output=tmp_path / "out")
    assert len([name for name in load_file(tmp_path / "out" / "model.safetensors") if name.endswith("weight")]) == 2


def test_what_does_not_fit_a_toy_is_refused_in_one_line(toy: Path, tmp_path: Path) -> None:
    wanda = {"task": TASK, "steps": ["wanda"]}

    def refused(
        message: str, recipe: Any = None, net: Any = None, kind: type[Exception] = InputError, **more: Any
    ) -> None:
        with pytest.raises(kind, match=message) as error:
            prunella.prune(network() if net is None else net, {**wanda, **(recipe or {})}, **more)
        assert "\n" not in str(error.value)
        assert not (tmp_path / "out").exists()
        assert not (tmp_path / "out.partial").exists()

    out = tmp_path / "out"
    wrong = Samples.of({"x": torch.zeros(4, 7), "y": torch.zeros(4, 7)})
    refused(r"Net does not take the samples of task '.*toy', of shapes \{'x': \(7,\), 'y': \(7,\)\}", calibration=wrong)
    refused("Net does not take the samples", calibration=Samples.of({"z": torch.zeros(4, 8)}))
    refused("the defect is in the task", calibration=torch.zeros(4, 8), kind=prunella.PrunellaError)  # and what is y?
    refused("random numbers have no end", {"heal": {"train": ["all"]}}, str(toy), output=out)
    refused("toys are run on 'random' numbers", {"calibration": {"source": "pydoc"}})
    refused("unknown option of task toy 'length'", {"calibration": {"length": 8}})
    refused("cannot be resumed", net=str(toy), output=out, resume=True)
    refused("with dtype float32, not bfloat16: leave --dtype out", {"dtype": "bfloat16"}, str(toy), output=out)
    refused("holds no toy", net=str(tmp_path), output=out, kind=ModelError)
    refused("is opened for task 'text', not for the recipe's", net=prunella.wrap_model(_language()))


def _language() -> Any:
    import tiny

    return tiny.build()


def test_a_defect_of_a_task_is_said_to_be_one(tmp_path: Path, run: Callable[..., Any], toy: Path) -> None:
    lines = {
        "(outputs - batch": "(outputs - bach",
        ".mean(1)": ".mean()",
        "load_model(network, file)": "load_model(network, fil)",
    }
    for number, (good, bad) in enumerate(lines.items()):
        path = tmp_path / f"{number}.py"
        path.write_text(FILE.read_text().replace(good, bad))
        done = run("prune", toy, "-o", tmp_path / "out", "--task", f"{path}:toy", "--step", "wanda")
        assert done.code == 2
        (line,) = done.err.splitlines()
        assert f"task '{path}:toy'" in line
        assert "the defect is in the task" in line


def test_it_shows_up_among_the_methods_once_it_is_imported(run: Callable[..., Any]) -> None:
    prunella.prune(network(), {"task": TASK, "steps": ["magnitude"]})
    (row,) = [row for row in json.loads(run("methods", "--json").out) if row["name"] == "toy"]
    assert (row["kind"], row["summary"]) == ("task", "Turn eight numbers around.")
    assert row["options"] == {"width": 16, "noise": 0.0}
