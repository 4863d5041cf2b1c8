"""From a name to a task, and any network from the files of its state dict."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import prunella
from prunella import InputError, Model, ModelError, Task, register_task
from prunella.model.open import open_plain
from prunella.samples import Batch, Samples
from prunella.tasks import open_model, task_of


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.conv(x)).relu()
        return out


def net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 1), *(Block(8) for _ in range(4)), nn.Flatten(), nn.Linear(8 * 16, 5))


@register_task("squares")
class Squares(Task):
    """A network in a directory of its state dict, on random pictures."""

    source = "random"
    argument = "input"

    @classmethod
    def claims(cls, name: str, config: Any) -> bool:
        return bool(config.get("squares"))

    def open(self, name: str, **options: Any) -> Model:
        return open_plain(net, Path(name), self, name=name, dtype=options["dtype"], device=options["device"])

    def samples(self, model: Model, source: str, count: int, **options: Any) -> Samples:
        return Samples.of({"input": torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(1))})

    def example(self, network: nn.Module) -> Batch:
        return {"input": torch.zeros(1, 3, 4, 4)}

    def losses(self, outputs: Tensor, batch: Batch) -> Tensor:
        return outputs.square().mean(1)


@pytest.fixture
def made(tmp_path: Path, registries: None) -> tuple[nn.Module, Path]:
    """A network, and the directory where it lies."""
    register_task("squares")(Squares)
    torch.manual_seed(0)
    network = net()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)  # type: ignore[arg-type]
    folder = tmp_path / "squares"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"squares": 1}), encoding="utf-8")
    save_file(network.state_dict(), folder / "model.safetensors")
    return network.eval(), folder


RECIPE: dict[str, Any] = {"steps": ["sparsegpt"], "calibration": {"samples": 6, "min_tokens": 1}}


def test_a_network_is_streamed_from_the_files_of_its_state_dict(made: tuple[nn.Module, Path], tmp_path: Path) -> None:
    network, folder = made
    model = open_model(str(folder))
    assert (model.task.name, len(model.blocks), model.blocks[1]) == ("squares", 7, "1")
    assert all(parameter.is_meta for parameter in model.network.parameters())
    x = torch.randn(2, 3, 4, 4)
    with model.whole() as whole:
        assert torch.equal(whole(x), network(x))
    report = prunella.prune(str(folder), RECIPE, output=tmp_path / "out")
    assert report.recipe["task"] == {"squares": {}}
    assert report.recipe["calibration"]["source"] == "random"
    weights = load_file(tmp_path / "out/model.safetensors")
    before = network.state_dict()
    assert weights.keys() == before.keys()
    prunella.prune(network, {**RECIPE, "task": "squares"})  # all of it in memory
    for name, weight in network.state_dict().items():
        assert torch.equal(weights[name], weight), name
    assert (weights["1.conv.weight"] == 0).float().mean() == 0.5
    assert torch.equal(weights["1.norm.running_mean"], before["1.norm.running_mean"])


def test_the_report_says_for_what_a_pruned_directory_is(made: tuple[nn.Module, Path], tmp_path: Path) -> None:
    _, folder = made
    prunella.prune(str(folder), RECIPE, output=tmp_path / "out")
    (tmp_path / "out/config.json").unlink()  # the report says enough
    assert task_of(tmp_path / "out") == {"squares": {}}
    assert task_of(str(folder)) == {"squares": {}}
    assert task_of("nobody/knows-it") == task_of(folder / "model.gguf") == task_of("smollm2-135m") == {"text": {}}
    assert task_of(open_model(str(folder))) == {"squares": {}}


@pytest.mark.parametrize("wrong", ["missing", "shape"])
def test_a_file_that_lacks_a_tensor_or_has_another_shape_is_refused(made: tuple[nn.Module, Path], wrong: str) -> None:
    _, folder = made
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensor = tensors.pop("2.conv.weight")
    save_file(tensors if wrong == "missing" else {**tensors, "2.conv.weight": tensor[:4]}, file)
    said = "'2.conv.weight' is missing" if wrong == "missing" else r"'2.conv.weight'.*shape \(4, 8, 3, 3\)"
    with pytest.raises(ModelError, match=said), open_model(str(folder)).whole():
        pass


def test_a_network_that_needs_its_numbers_to_be_built_is_refused(made: tuple[nn.Module, Path]) -> None:
    _, folder = made

    def build() -> nn.Module:
        network = net()
        assert float(next(network.parameters()).detach().sum()) != 0.5
        return network

    with pytest.raises(ModelError, match="cannot be built without its weights"):
        open_plain(build, folder, Squares())


def test_there_is_no_such_task(made: tuple[nn.Module, Path]) -> None:
    with pytest.raises(InputError, match="unknown task 'sqares'"):
        open_model(str(made[1]), "sqares")
