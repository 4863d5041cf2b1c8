"""State dicts of all kinds come into a network whole, or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file, save_model
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

import prunella
from prunella import ModelError


class Net(nn.Module):
    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.one, self.norm, self.two = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 4)
        self.again = self.one if tied else nn.Linear(4, 6)


def state() -> dict[str, Tensor]:
    net = Net()
    net.norm.num_batches_tracked += 7
    net.norm.running_mean += 1  # type: ignore[operator]
    return {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}


def same(net: nn.Module, wanted: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, wanted[name]) for name, tensor in net.state_dict().items())


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
@pytest.mark.parametrize("nested", [(), ("state_dict",), ("checkpoint", "model")])
def test_what_training_scripts_save_is_found(prefix: str, nested: tuple[str, ...], tmp_path: Path) -> None:
    wanted = state()
    saved: Any = {f"{prefix}{name}": tensor for name, tensor in wanted.items()}
    for key in reversed(nested):
        saved = {key: saved, "epoch": 3}
    torch.save(saved, tmp_path / "w.pt")
    if nested[:1] == ("checkpoint",):  # a name that nobody knows is not guessed at
        with pytest.raises(ModelError, match="holds no state dict: checkpoint, epoch"):
            prunella.load_state(Net(), tmp_path / "w.pt")
        return
    assert same(prunella.load_state(Net(), tmp_path / "w.pt"), wanted)


def test_an_average_of_the_weights_is_taken_only_if_it_is_asked_for(tmp_path: Path) -> None:
    wanted, average = state(), state()
    torch.save({"model": wanted, "ema": {f"module.{k}": v for k, v in average.items()}}, tmp_path / "w.pth")
    assert same(prunella.load_state(Net(), tmp_path / "w.pth"), wanted)
    assert same(prunella.load_state(Net(), tmp_path / "w.pth", ema=True), average)
    torch.save(wanted, tmp_path / "w.pth")
    with pytest.raises(ModelError, match="holds no average of the weights"):
        prunella.load_state(Net(), tmp_path / "w.pth", ema=True)


def test_safetensors_and_directories_are_read_and_tied_tensors_are_one(tmp_path: Path) -> None:
    wanted = state()
    save_file(wanted, tmp_path / "model.safetensors")
    assert same(prunella.load_state(Net(), tmp_path / "model.safetensors"), wanted)
    assert same(prunella.load_state(Net(), tmp_path), wanted)
    tied = Net(tied=True)
    save_model(tied, str(tmp_path / "model.safetensors"))
    other = prunella.load_state(Net(tied=True), tmp_path)
    assert torch.equal(other.one.weight, tied.one.weight)
    assert other.again is other.one


def test_a_state_under_torch_nn_utils_prune_is_put_together(tmp_path: Path) -> None:
    net = Net()
    torch_prune.l1_unstructured(net.one, "weight", amount=0.5)  # type: ignore[no-untyped-call]
    torch.save(net.state_dict(), tmp_path / "w.pt")
    found = prunella.load_state(Net(), tmp_path / "w.pt")
    assert torch.equal(found.one.weight, net.one.weight)
    assert (found.one.weight == 0).sum() == 12


class Code:
    pass


def test_what_is_no_state_of_this_network_is_refused_and_the_network_stays_as_it_was(tmp_path: Path) -> None:
    net = Net()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}

    def refused(match: str, saved: Any, name: str = "w.pt") -> None:
        torch.save(saved, tmp_path / name)
        with pytest.raises(ModelError, match=match) as error:
            prunella.load_state(net, tmp_path / name)
        assert "\n" not in str(error.value)
        assert same(net, before)

    some = state()
    refused("it lacks 'two.bias'", {k: v for k, v in some.items() if k != "two.bias"})
    refused("it holds 'three.bias', which this network has not", {**some, "three.bias": torch.zeros(3)})
    refused(r"tensor 'two.bias' in '.*' has shape \(3,\), but in this Net \(4,\)", {**some, "two.bias": torch.zeros(3)})
    refused("it holds more than tensors, which can run code", Code())
    refused("it holds more than tensors, which can run code", {"model": Code()})
    refused(r"it lacks 'one.weight' \(and 2[0-9] more names differ\)", {f"net.{k}": v for k, v in some.items()})
    (tmp_path / "w.pt").write_bytes(b"no file of torch")
    with pytest.raises(ModelError, match="cannot be read as a state dict"):
        prunella.load_state(net, tmp_path / "w.pt")
    with pytest.raises(ModelError, match="does not exist"):
        prunella.load_state(net, tmp_path / "none.pt")
