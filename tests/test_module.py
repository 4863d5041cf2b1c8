"""Task `module`: any torch module, in memory with its batches, or made by a function in a file."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nets
import pytest
import torch
from safetensors.torch import load_file, load_model
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import prunella
from prunella import InputError, ModelError
from prunella.errors import StepError
from prunella.registry import steps
from prunella.samples import TARGET, Samples
from prunella.tasks.module import Module

WANDA: dict[str, Any] = {"steps": ["wanda"]}
FILE = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU()) for _ in range(3)))
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        return self.head(self.body(x))


def factory():
    torch.manual_seed(0)
    return Net()


def calibration():
    draw = torch.Generator().manual_seed(1)
    return [(torch.randn(n, 16, generator=draw), torch.randint(4, (n,), generator=draw)) for n in (8, 3, 8)]
"""
JUDGES = """

def loss(outputs, batch):
    return nn.functional.cross_entropy(outputs, batch[1])


def score(outputs, batch):
    return (outputs.argmax(1) == batch[1]).float()
"""


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.Sequential(*(Residual() for _ in range(3)))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.blocks(self.stem(x)).mean((2, 3)))
        return out


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + torch.relu(self.norm(self.conv(x)))
        return out


def convolutions() -> Convolutions:
    torch.manual_seed(0)
    return Convolutions()


def pictures(count: int = 12, size: int = 8) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(3))


class Pair(nn.Module):
    """Two arguments and a switch; a dictionary comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 8), nn.Linear(6, 8)

    def forward(self, x: Tensor, y: Tensor, scale: float = 1.0, twice: bool = False) -> dict[str, Any]:
        found = self.one(x) + scale * self.two(y)
        return {"sum": found * (2 if twice else 1), "parts": [self.one(x), self.two(y)]}


# ---------------------------------------------------------------------------------------------------------
# In memory


@pytest.mark.parametrize("name", sorted(steps))
def test_every_step_prunes_a_module_and_what_is_saved_loads_as_plain_tensors(name: str, tmp_path: Path) -> None:
    before = [] if steps[name].prunes else ["wanda"]
    net = convolutions()
    loss = (lambda out, batch: out.square().mean()) if name == "besa" else None
    report = prunella.prune(net, {"steps": [*before, name]}, calibration=pictures(), loss=loss, output=tmp_path / "out")
    assert report.recipe["task"] == {"module": {}}
    assert report.sparsity == pytest.approx(0.5, abs=0.02 if name == "besa" else 0.005)
    assert not net.training or convolutions().training  # its mode is its own
    other = Convolutions()
    load_model(other, tmp_path / "out" / "model.safetensors")
    again = prunella.load_state(Convolutions(), tmp_path / "out")
    for key, tensor in net.state_dict().items():
        assert torch.equal(other.state_dict()[key], tensor)
        assert torch.equal(again.state_dict()[key], tensor)
    assert "blocks.0.norm.num_batches_tracked" in load_file(tmp_path / "out" / "model.safetensors")
    for layer, mask_OI in prunella.read_masks(tmp_path / "out").items():
        weight = net.get_submodule(layer).weight
        matrix = weight.movedim(1, -1).flatten(1) if weight.ndim == 4 else weight
        assert (matrix[~mask_OI] == 0).all()


def test_without_a_loss_it_is_the_divergence_from_the_dense_network_that_is_measured() -> None:
    net, dense, x = convolutions().eval(), convolutions().eval(), pictures()
    report = prunella.prune(net, WANDA, calibration=x)
    assert (report.dense["figure"], report.dense["divergence"]) == ("divergence", 0)
    with torch.no_grad():
        ours, theirs = net(x), dense(x)
    expected = ((ours - theirs).square().sum(1) / theirs.square().sum(1)).mean().item()
    assert report.pruned["divergence"] == pytest.approx(expected, rel=1e-4)
    assert 0 < expected < 1
    task, batch = Module(), {"x": x}
    outputs = {"a": torch.tensor([[[3.0], [0.0]]]), "b": [torch.ones(1, 2)], "c": torch.tensor([1])}
    teacher = {"a": torch.tensor([[[3.0], [4.0]]]), "b": [torch.tensor([[1.0, 2.0]])], "c": torch.tensor([2])}
    assert task.lacks(batch)
    batch = {"x": x[:1], TARGET: task.target(teacher, batch)}
    with torch.no_grad():
        apart = task.losses(outputs, batch).tolist()
    assert apart == pytest.approx([(16 / 25 + 1 / 5) / 2])
    assert task.divergence(outputs, teacher, batch).item() == pytest.approx(apart[0])  # as healing has it


@pytest.mark.parametrize("each", [False, True])
def test_loss_and_score_judge_the_batch_as_it_was_handed_over(each: bool) -> None:
    x, y = pictures(), torch.arange(12) % 5
    seen = []

    def loss(outputs: Tensor, batch: Any) -> Tensor:
        inputs, targets = batch
        seen.append(inputs.shape)
        return functional.cross_entropy(outputs, targets, reduction="none" if each else "mean")

    def score(outputs: Tensor, batch: Any) -> Any:
        right = (outputs.argmax(1) == batch[1]).float()
        return right if each else right.mean().item()

    net = convolutions().eval()
    loader = DataLoader(TensorDataset(x, y), batch_size=5)
    report = prunella.prune(net, WANDA, calibration=loader, loss=loss, score=score)
    with torch.no_grad():
        out = net(x)
    assert report.pruned["loss"] == pytest.approx(functional.cross_entropy(out, y).item(), rel=1e-4)
    assert (report.pruned["figure"], report.pruned["higher"], report.pruned["samples"]) == ("score", True, 12)
    assert report.pruned["score"] == pytest.approx((out.argmax(1) == y).float().mean().item())
    assert all(shape[1:] == (3, 8, 8) for shape in seen)


def test_batches_come_in_every_form_a_network_is_called_with() -> None:
    x, y = torch.randn(2, 12, 6, generator=torch.Generator().manual_seed(0))
    forms: list[Any] = [
        (x, y),
        {"x": x, "y": y},
        [(x[:5], y[:5]), (x[5:], y[5:])],
        [{"y": y[:5], "x": x[:5]}, {"y": y[5:], "x": x[5:]}],
        iter([(x[:1], y[:1]), (x[1:], y[1:])]),
        (x.numpy(), y.numpy()),
        DataLoader([{"x": a, "y": b} for a, b in zip(x, y, strict=True)], batch_size=5),  # type: ignore[arg-type]
        DataLoader([((a, b), 0) for a, b in zip(x, y, strict=True)], batch_size=5),  # type: ignore[arg-type]
    ]
    found = []
    for form in forms:
        torch.manual_seed(0)
        net = Pair()
        prunella.prune(net, {"steps": ["sparsegpt"]}, calibration=form)
        found.append(torch.cat([net.one.weight, net.two.weight]))
    assert (found[0] == 0).float().mean() == 0.5
    for weight in found[1:]:
        assert torch.equal(weight, found[0])


def test_settings_travel_with_the_batches_and_must_be_the_same_in_all() -> None:
    x, y = torch.randn(2, 12, 6)
    net = Pair()
    prunella.prune(net, WANDA, calibration=[(x[:4], y[:4], 0.5), (x[4:], y[4:], 0.5)])
    prunella.prune(net, WANDA, calibration={"x": x, "y": y, "twice": True})
    for strange in ([(x, y, 0.5), (x, y, 0.25)], [(x, y), {"x": x, "y": y}], [(x, y), (x, y, 0.5)]):
        with pytest.raises(InputError, match=r"batch 1 of calibration calls the network in another way"):
            prunella.prune(net, WANDA, calibration=strange)
    with pytest.raises(InputError, match="in another way than the calibration's"):
        prunella.prune(net, WANDA, calibration=(x, y), evaluate=(x, y, 0.5))


def test_pictures_of_several_sizes_are_groups() -> None:
    net = convolutions()
    report = prunella.prune(net, WANDA, calibration=[pictures(4), pictures(3, 6), pictures(2)])
    assert report.recipe["calibration"]["samples"] == 9
    assert report.sparsity == pytest.approx(0.5, abs=0.005)


def test_what_is_evaluated_is_what_was_given_for_it() -> None:
    report = prunella.prune(convolutions(), WANDA, calibration=pictures(), evaluate=pictures(5))
    assert (report.recipe["calibration"]["samples"], report.pruned["samples"]) == (12, 5)
    report = prunella.prune(convolutions(), {**WANDA, "evaluate": {"source": None}}, calibration=pictures())
    assert report.pruned["loss"] is None


def test_gradients_are_those_of_the_loss_and_there_are_none_without() -> None:
    seen: dict[str, Tensor] = {}

    @prunella.register("own-fisher", needs={"fisher"})
    def fisher(layer: prunella.Layer) -> prunella.Layer:
        """Prune by squared gradients."""
        seen[layer.name] = layer.stats["fisher"].clone()
        return layer.pruned(layer.weight_OI, prunella.keep(seen[layer.name], layer.sparsity, layer.pattern))

    x, y = pictures(4), torch.tensor([0, 1, 2, 3])
    whole = convolutions().eval()
    batches = DataLoader(TensorDataset(x, y), batch_size=4)
    try:
        recipe = {"steps": ["own-fisher"], "evaluate": {"source": None}}
        prunella.prune(convolutions(), recipe, calibration=batches, loss=lambda o, b: functional.cross_entropy(o, b[1]))
        expected = torch.zeros(8, 72)
        for n in range(4):
            whole.zero_grad()
            functional.cross_entropy(whole(x[n : n + 1]), y[n : n + 1]).backward()  # type: ignore[no-untyped-call]
            expected += whole.blocks[0].conv.weight.grad.movedim(1, -1).flatten(1).square()  # type: ignore[union-attr]
        torch.testing.assert_close(seen["blocks.0.conv"], expected)
        with pytest.raises(InputError, match="needs a loss"):
            prunella.prune(convolutions(), recipe, calibration=batches)
    finally:
        del steps["own-fisher"]


def test_what_is_no_batch_is_refused_in_one_line() -> None:
    def refused(match: str, calibration: Any = None, kind: type[Exception] = InputError, **more: Any) -> None:
        with pytest.raises(kind, match=match) as error:
            prunella.prune(convolutions(), WANDA, calibration=calibration, **more)
        assert "\n" not in str(error.value)

    x = pictures()
    refused(r"no batches that the network is called with: give some \(calibration=")
    refused("calibration holds no batch", [])
    refused("a str is no batch for a network", "pictures")
    refused(r"batch 0 of calibration does not fit the arguments of Convolutions\.forward\(x", {"y": x})
    refused(r"does not fit the arguments", (x, x, x))
    refused(r"have not a sample a row", DataLoader([(x, x[:3])], batch_size=None))  # type: ignore[arg-type]
    refused("Convolutions does not run on the example of its task", torch.randn(3, 4, 8, 8), ModelError)
    strange = torch.randn(3, 4, 8, 8)
    refused(r"does not take these batches, of shapes \{'x': \(4, 8, 8\)\}", x, evaluate=strange)
    refused(r"loss gives \(7,\) for 1 samples", x, loss=lambda out, batch: torch.zeros(7))
    refused(r"loss '<lambda>': ZeroDivisionError: .*the defect is in the loss", x, StepError, loss=lambda out, b: 1 / 0)
    with pytest.raises(InputError, match="evaluate, loss and score are of a module in memory"):
        prunella.prune("smollm2-135m", WANDA, loss=lambda out, batch: out, output="nowhere")
    with pytest.raises(InputError, match="reads no source 'pydoc'"):
        prunella.prune(convolutions(), {**WANDA, "evaluate": {"source": "pydoc"}}, calibration=x)


# ---------------------------------------------------------------------------------------------------------
# What cannot be pruned


class Odd(nn.Module):
    """A chain in which something is odd."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what, self.passes = what, 0
        self.one, self.two, self.last = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 3)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.what == "value":
            hidden = self.one(x) if x.sum() > 0 else self.two(x)  # another way
        elif self.what == "batch":
            hidden = self.one(x - x.mean(0)) + self.two(x)
        elif self.what == "random":
            hidden = self.one(x) + self.two(x) * torch.rand(())
        elif self.what == "buffer":
            self.count.add_(1)
            hidden = self.one(x) + self.two(x)
        elif self.what == "state":
            self.passes += 1
            hidden = self.one(x) + self.two(x) * self.passes
        elif self.what == "length":
            hidden = self.one(x) + self.two(x) * float(x.abs().max())
        else:
            assert x.abs().max() < 1e6  # which is true of all of them
            hidden = self.one(x) + self.two(x)
        out: Tensor = self.last(hidden)
        return out


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("value", r"takes another way for another sample: .* in test_module\.py, line \d+ \(hidden = .*x\.sum\(\) > 0"),
        ("batch", r"depends on the others of its batch; first in 'one' \(Linear\)"),
        ("random", r"draws random numbers.*; first in 'last' \(Linear\)"),
        ("buffer", "keeps state: a forward pass changes 'count'"),
        ("state", "keeps state from one pass to the next; first in 'last'"),
        ("length", r"depends on the others of its batch; first in 'last' .*asks for a number in test_module\.py, line"),
        ("nothing", None),
    ],
)
def test_a_forward_pass_that_is_not_the_same_each_time_is_refused_with_its_place(what: str, said: str | None) -> None:
    x = torch.cat([torch.rand(3, 6), -torch.rand(3, 6)])[[0, 3, 1, 4, 2, 5]]
    net = Odd(what)
    before = {name: tensor.clone() for name, tensor in net.named_parameters()}
    if said is None:
        assert prunella.prune(net, WANDA, calibration=x).sparsity == 0.5
        return
    with pytest.raises(ModelError, match=said):
        prunella.prune(net, WANDA, calibration=x)
    assert all(torch.equal(before[name], tensor) for name, tensor in net.named_parameters())


def test_dropout_and_batch_norm_in_training_mode_are_not_odd() -> None:
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 3)).train()
    before = net[1].running_mean.clone()
    prunella.prune(net, WANDA, calibration=torch.randn(20, 6))
    assert net.training
    assert torch.equal(net[1].running_mean, before)


# ---------------------------------------------------------------------------------------------------------
# From a file


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "net.py"
    path.write_text(FILE)
    return path


def test_a_factory_is_pruned_measured_saved_and_pruned_again(file: Path, run: Callable[..., Any]) -> None:
    file.write_text(FILE + JUDGES)
    out, second = file.parent / "out", file.parent / "second"
    done = run("prune", f"{file}:factory", "-o", out, "--step", "wanda")
    assert done.code == 0, done.err
    said = json.loads((out / "prunella.json").read_text())
    assert said["recipe"]["task"]["module"]["factory"] == f"{file}:factory"
    assert len(said["recipe"]["task"]["module"]["sha256"]) == 64
    assert said["pruned"]["figure"] == "score"
    assert said["pruned"]["samples"] == 19
    assert said["model"]["class"] == "Net"
    model = prunella.open_model(str(out))  # streamed from the files, by the factory's architecture
    assert model.checkpoint is not None
    assert model.network.head.weight.is_meta
    with model.whole() as network:
        for layer, mask_OI in prunella.read_masks(out).items():
            assert torch.equal(network.get_submodule(layer).weight == 0, ~mask_OI)
    done = run("prune", out, "-o", second, "--step", "wanda", "--sparsity", 0.7, "--set", "keep_zeros=true")
    assert done.code == 0, done.err
    assert json.loads((second / "prunella.json").read_text())["sparsity"] == pytest.approx(0.7, abs=0.01)
    old, new = load_file(out / "model.safetensors"), load_file(second / "model.safetensors")
    assert old.keys() == new.keys()
    assert all((new[name][old[name] == 0] == 0).all() for name in old if old[name].ndim > 1)


def test_a_factory_that_loads_its_weights_is_opened_without_a_warning(file: Path, run: Callable[..., Any]) -> None:
    """They are lost where the network is built without weights, and read from the directory."""
    file.write_text(
        FILE.replace(
            "return Net()", "net, other = Net(), Net()\n    net.load_state_dict(other.state_dict())\n    return net"
        )
    )
    out = file.parent / "out"
    assert run("prune", f"{file}:factory", "-o", out, "--step", "wanda").code == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = prunella.open_model(str(out))
    assert model.checkpoint is not None
    assert model.network.head.weight.is_meta


def test_a_directory_of_a_factory_is_resumed(file: Path, run: Callable[..., Any], monkeypatch: Any) -> None:
    out, second, whole = (file.parent / name for name in ("out", "second", "whole"))
    assert run("prune", f"{file}:factory", "-o", out, "--step", "magnitude", "--sparsity", 0.2).code == 0
    again = ("--step", "wanda", "--sparsity", 0.6)
    assert run("prune", out, "-o", whole, *again).code == 0
    from prunella.stream import Stream

    prune, count = Stream.prune, 0

    def interrupted(self: Any, *args: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        if count == 3:
            raise KeyboardInterrupt
        return prune(self, *args, **options)

    monkeypatch.setattr(Stream, "prune", interrupted)
    assert run("prune", out, "-o", second, *again).code != 0
    monkeypatch.undo()
    assert run("prune", out, "-o", second, *again, "--resume").code == 0
    assert (second / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert json.loads((second / "prunella.json").read_text())["run"]["resumed_after_blocks"] > 0
    refused = run("prune", f"{file}:factory", "-o", file.parent / "third", "--resume")
    assert refused.code == 2
    assert "pruned in memory, and cannot be resumed" in refused.err


def test_a_factory_that_needs_numbers_is_read_into_memory_and_this_is_said(file: Path, run: Callable[..., Any]) -> None:
    file.write_text(
        FILE.replace(
            "    return Net()", "    net = Net()\n    assert float(net.head.weight[0, 0]) != 2\n    return net"
        )
    )
    out = file.parent / "out"
    assert run("prune", f"{file}:factory", "-o", out, "--step", "magnitude").code == 0
    done = run("prune", out, "-o", file.parent / "second", "--step", "magnitude", "--sparsity", 0.6)
    assert done.code == 0, done.err
    assert "is read into memory as a whole: its factory does not build it without weights" in done.err


def test_a_factory_whose_file_changed_is_warned_of_and_one_that_is_gone_is_named(
    file: Path, capsys: pytest.CaptureFixture[str], run: Callable[..., Any]
) -> None:
    out = file.parent / "out"
    assert run("prune", f"{file}:factory", "-o", out, "--step", "magnitude").code == 0
    prunella.open_model(str(out))
    assert "SHA-256" not in capsys.readouterr().err
    file.write_text(FILE + "# another line\n")
    prunella.open_model(str(out))
    assert "is not the file any more with which" in capsys.readouterr().err
    file.rename(out / "net.py")  # beside the weights it is found
    prunella.open_model(str(out))
    (out / "net.py").unlink()
    with pytest.raises(ModelError, match=r"which builds '.*', does not exist: name its factory where it is now"):
        prunella.open_model(str(out))


def test_the_divergence_of_a_directory_is_that_from_what_its_factory_makes(file: Path, run: Callable[..., Any]) -> None:
    from prunella.evaluate.measure import measure
    from prunella.progress import no_track

    out, second = file.parent / "out", file.parent / "second"
    assert run("prune", f"{file}:factory", "-o", out, "--step", "wanda").code == 0
    assert run("prune", out, "-o", second, "--step", "wanda", "--sparsity", 0.7).code == 0
    reports = [json.loads((path / "prunella.json").read_text()) for path in (out, second)]
    assert reports[1]["dense"]["divergence"] == pytest.approx(reports[0]["pruned"]["divergence"], rel=1e-4)
    model = prunella.open_model(str(second))
    samples = model.task.samples(model, "own", 1, test=True)
    model.task.check(model, samples)
    found, _ = measure(model, "own", samples, None, no_track)
    assert found["divergence"] == pytest.approx(reports[1]["pruned"]["divergence"], rel=1e-4)


def test_weights_of_a_file_are_pruned_by_the_name_of_a_factory(file: Path, run: Callable[..., Any]) -> None:
    namespace: dict[str, Any] = {}
    exec(FILE, namespace)
    net = namespace["factory"]()
    with torch.no_grad():
        net.head.weight.fill_(2.0)
    torch.save({"state_dict": {f"module.{k}": v for k, v in net.state_dict().items()}}, file.parent / "weights.pt")
    done = run(
        *("prune", file.parent / "weights.pt", "-o", file.parent / "out", "--step", "magnitude"),
        *("--task", "module", "--set", f"module.factory={file}:factory"),
    )
    assert done.code == 0, done.err
    head = load_file(file.parent / "out" / "model.safetensors")["head.weight"]
    assert set(head.unique().tolist()) == {0.0, 2.0}


def test_what_is_wrong_with_a_factory_is_said_in_one_line(file: Path, run: Callable[..., Any]) -> None:
    def refused(said: str, name: str, *more: object) -> None:
        done = run("prune", name, "-o", file.parent / "nothing", "--step", "wanda", *more)
        assert done.code == 2, done.err
        assert said in done.err.splitlines()[-1]
        assert not (file.parent / "nothing").exists()

    refused("unknown function of", f"{file}:factori")
    refused("Did you mean 'factory'?", f"{file}:factori")
    refused("does not exist", f"{file.parent / 'none.py'}:factory")
    for number, (old, new, said) in enumerate(
        [
            ("return Net()", "return 3", "returned a int, no torch module"),
            ("return Net()", "return Nett()", "the defect is in the factory, line"),
            ("def calibration", "def calibrations", "write a function calibration() into"),
            ("import torch\n", "import torch, nonesuch\n", "cannot be imported: ModuleNotFoundError"),
        ]
    ):
        path = file.parent / f"wrong{number}.py"
        path.write_text(FILE.replace(old, new, 1))
        refused(said, f"{path}:factory")


def test_a_module_in_memory_that_was_saved_says_who_could_build_it(tmp_path: Path) -> None:
    prunella.prune(convolutions(), WANDA, calibration=pictures(), output=tmp_path / "out")
    with pytest.raises(ModelError, match=r"who builds '.*' is not known: name its factory \(--set module\.factory="):
        prunella.open_model(str(tmp_path / "out"))


def test_a_state_that_is_no_tensor_is_refused() -> None:
    class Extra(nn.Linear):
        def get_extra_state(self) -> Any:
            return {"a": 1}

    with pytest.raises(ModelError, match="the state of this Extra is more than tensors"):
        prunella.prune(Extra(6, 4), WANDA, calibration=torch.randn(8, 6))


def test_the_task_of_a_module_is_found_without_being_said() -> None:
    from prunella.tasks import task_of

    assert task_of(nn.Linear(3, 3)) == {"module": {}}
    assert task_of("somewhere/net.py:factory") == {"module": {}}
    assert not Module.claims("net.py", {})


@pytest.mark.parametrize("name", ["resnet", "vit"])
@pytest.mark.parametrize("step", ["magnitude", "sparsegpt"])
def test_a_classifier_gets_the_masks_that_it_gets_through_its_own_task(name: str, step: str) -> None:
    pixels = torch.randn(12, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    recipe = {"steps": [step], "evaluate": {"source": None}, "batch_norm": "keep"}
    found = []
    for task, calibration in (("images", {"pixel_values": pixels}), ("module", {"pixel_values": pixels})):
        network = nets.build(name)
        given: Any = Samples.of(calibration) if task == "images" else calibration
        report = prunella.prune(network, {**recipe, "task": task}, calibration=given)
        found.append(([layer.name for layer in report.layers], network.state_dict()))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(tensor, found[1][1][key]) for key, tensor in found[0][1].items())
