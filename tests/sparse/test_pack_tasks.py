"""Directories of timm's and of one's own modules, packed and opened again by their tasks."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import prunella
from prunella import ModelError
from prunella.inspect import inspect
from prunella.model.timm_models import save_timm
from prunella.packing import load_packed, pack_model, unpack_model
from prunella.sparse.conv import SparseConv
from prunella.sparse.linear import SparseLinear
from prunella.tensors import MASKS, save_tensors

FACTORY = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, stride=2), nn.ReLU(), nn.Conv2d(32, 64, 1), nn.ReLU(), nn.Flatten(), nn.Linear(64 * 9, 32)
    )

def calibration():
    return [torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))]
"""


def outputs(network: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        out: Tensor = network(x)
    return out


def weights(directory: Path) -> dict[str, Tensor]:
    return {k: v for path in directory.glob("*.safetensors") for k, v in load_file(path).items()}


@pytest.fixture(scope="module", params=["test_efficientnet", "test_vit"])
def pruned(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny network of timm's, pruned."""
    import timm

    root = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    (root / "dense").mkdir()
    save_timm(timm.create_model(request.param, num_classes=10).eval(), root / "dense")
    file = root / "dense" / "model.safetensors"  # not sorted, as timm's own files are not
    save_tensors(file, dict(reversed(load_file(file).items())))
    recipe = {"steps": ["magnitude"], "calibration": {"samples": 2}, "evaluate": {"windows": 3}}
    prunella.prune(str(root / "dense"), recipe, output=root / "pruned")
    return root / "pruned"


def test_a_directory_of_timm_is_packed_and_opened_by_its_task(
    pruned: Path, tmp_path: Path, run: Callable[..., Any]
) -> None:
    import timm

    pack_model(str(pruned), tmp_path / "packed")
    opened = load_packed(tmp_path / "packed", device="cpu")
    plain: Any = timm.create_model(f"local-dir:{pruned}", pretrained=True).eval()
    assert any(
        isinstance(module, SparseConv if "efficientnet" in str(pruned) else SparseLinear) for module in opened.modules()
    )
    for count in (1, 3):
        x = torch.randn(count, *plain.pretrained_cfg["input_size"])
        torch.testing.assert_close(outputs(opened, x), outputs(plain, x), rtol=1e-4, atol=1e-4)
    unpack_model(str(tmp_path / "packed"), tmp_path / "plain")
    assert sorted(p.name for p in (tmp_path / "plain").iterdir()) == sorted(p.name for p in pruned.iterdir())
    before, after = weights(pruned), weights(tmp_path / "plain")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    for name in ("config.json", "model.safetensors", "prunella.json", "README.md"):
        assert (pruned / name).read_bytes() == (tmp_path / "plain" / name).read_bytes(), name
    masks, unpacked = prunella.read_masks(pruned), prunella.read_masks(tmp_path / "plain")
    assert masks.keys() == unpacked.keys()
    assert all(torch.equal(mask_OI, unpacked[name]) for name, mask_OI in masks.items())
    plain_rows, packed_rows = ({row.name: row for row in inspect(str(d))} for d in (pruned, tmp_path / "packed"))
    assert plain_rows.keys() == packed_rows.keys()
    assert all(packed_rows[name].zeros == row.zeros for name, row in plain_rows.items())
    again: Any = timm.create_model(f"local-dir:{tmp_path / 'plain'}", pretrained=True).eval()
    assert torch.equal(outputs(again, x), outputs(plain, x))
    with pytest.raises(RuntimeError):  # timm does not know the format, and says so in place of random weights
        timm.create_model(f"local-dir:{tmp_path / 'packed'}", pretrained=True)
    one, other = (
        json.loads(run("eval", d, "--beside", pruned, "--windows", 4, "--json").out)
        for d in (pruned, tmp_path / "packed")
    )
    assert one["agreement"] == other["agreement"] == 1
    done = run("generate", tmp_path / "packed", "Hello")
    assert done.code == 2
    (line,) = done.err.splitlines()
    assert "is of task 'images'" in line


def test_it_is_pruned_into_the_packed_format(pruned: Path, tmp_path: Path) -> None:
    dense = str(pruned.parent / "dense")
    recipe = {"steps": ["magnitude"], "calibration": {"samples": 2}, "evaluate": {"source": None}, "format": "packed"}
    prunella.prune(dense, recipe, output=tmp_path / "packed")
    unpack_model(str(tmp_path / "packed"), tmp_path / "plain")
    before, after = weights(pruned), weights(tmp_path / "plain")
    statistics = [key for key in before if "running" in key]
    assert all(torch.equal(before[key], after[key]) for key in before.keys() - statistics)


def test_another_network_is_not_filled_with_it(pruned: Path, tmp_path: Path) -> None:
    pack_model(str(pruned), tmp_path / "packed")
    path = tmp_path / "packed" / "config.json"
    config = json.loads(path.read_text())
    config["architecture"] = "test_resnet"
    path.write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"missing|another network|the model wants|cannot build"):
        load_packed(tmp_path / "packed")


def test_a_module_of_ones_own_is_packed_and_opened_by_its_factory(tmp_path: Path) -> None:
    factory = tmp_path / "mine.py"
    factory.write_text(FACTORY)
    recipe = {"steps": ["wanda"], "calibration": {"samples": 4}}
    prunella.prune(f"{factory}:build", recipe, output=tmp_path / "pruned")
    pack_model(str(tmp_path / "pruned"), tmp_path / "packed")
    opened = load_packed(tmp_path / "packed", device="cpu")
    plain = prunella.open_model(str(tmp_path / "pruned"), device="cpu")
    x = torch.randn(5, 3, 8, 8)
    with plain.whole() as network:
        torch.testing.assert_close(outputs(opened, x), outputs(network, x), rtol=1e-4, atol=1e-5)
    assert [type(module) for module in opened][::2] == [SparseConv, SparseConv, nn.Flatten]
    unpack_model(str(tmp_path / "packed"), tmp_path / "plain")
    assert sorted(p.name for p in (tmp_path / "plain").iterdir()) == sorted(
        p.name for p in (tmp_path / "pruned").iterdir()
    )
    before, after = weights(tmp_path / "pruned"), weights(tmp_path / "plain")
    assert all(torch.equal(before[key], after[key]) for key in before)
    with pytest.raises(ModelError, match=r"is packed: `?prunella unpack"):
        prunella.open_model(str(tmp_path / "packed"))
    prunella.prune(f"{factory}:build", {**recipe, "format": "packed"}, output=tmp_path / "straight")
    assert weights(tmp_path / "straight").keys() == weights(tmp_path / "packed").keys()
    shutil.copytree(tmp_path / "packed", tmp_path / "other")
    (tmp_path / "wider.py").write_text(FACTORY.replace("64, 1)", "96, 1)").replace("64 * 9", "96 * 9"))
    said = tmp_path / "other" / "prunella.json"
    said.write_text(said.read_text().replace("mine.py", "wider.py"))
    with pytest.raises(ModelError, match="shape"):
        load_packed(tmp_path / "other")


def test_negative_zeros_without_a_mask_are_zeros(tmp_path: Path) -> None:
    factory = tmp_path / "mine.py"
    factory.write_text(FACTORY)
    recipe = {"steps": ["wanda"], "calibration": {"samples": 4}}
    prunella.prune(f"{factory}:build", recipe, output=tmp_path / "pruned")
    (tmp_path / "pruned" / MASKS).unlink()
    sizes = []
    for zero in (0.0, -0.0):
        for path in (tmp_path / "pruned").glob("*.safetensors"):
            changed = {key: torch.where(tensor == 0, zero, tensor) for key, tensor in load_file(path).items()}
            save_tensors(path, changed)
        made = pack_model(str(tmp_path / "pruned"), tmp_path / f"packed{zero}")
        sizes.append((made.layers, made.packed))
        unpack_model(str(tmp_path / f"packed{zero}"), tmp_path / f"plain{zero}")
        before, after = weights(tmp_path / "pruned"), weights(tmp_path / f"plain{zero}")
        assert all(torch.equal(before[key], after[key]) for key in before)
    assert sizes[0] == sizes[1]
