from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import prunella
from prunella import ModelError
from prunella.inspect import inspect
from prunella.packing import pack_model

LAYERS = 3 * 7


def test_a_dense_model_is_dense_all_over(llama: Path) -> None:
    found = inspect(str(llama))
    assert len(found) == LAYERS
    assert {row.pattern for row in found} == {"dense"}
    assert {row.zeros for row in found} == {0}
    assert all(row.error is None and row.notes == () for row in found)


@pytest.mark.parametrize("pattern", ["unstructured", "1:4", "2:4", "4:8", "3:4", "2:8"])
def test_patterns_are_recognized_from_the_files_alone(llama: Path, tmp_path: Path, ids: Tensor, pattern: str) -> None:
    out = tmp_path / "out"
    report = prunella.prune(llama, {"steps": ["wanda"], "pattern": pattern}, output=out, calibration=ids)
    (out / "prunella.json").unlink()
    found = inspect(str(out))
    assert {row.pattern for row in found} == {pattern}
    network = AutoModelForCausalLM.from_pretrained(out)
    for row, layer in zip(found, report.layers, strict=True):
        weight_OI = network.get_submodule(row.name).weight
        assert row.name == layer.name
        assert row.shape == tuple(weight_OI.shape)
        assert row.zeros == int((weight_OI == 0).sum())
        assert row.nbytes == weight_OI.numel() * 4
        assert row.plain()["sparsity"] == layer.sparsity


def test_errors_and_notes_come_from_the_report(llama: Path, tmp_path: Path, ids: Tensor) -> None:
    recipe = {"steps": ["wanda"], "skip": ["q_proj"], "calibration": {"min_tokens": 10**6}}
    report = prunella.prune(llama, recipe, output=tmp_path / "out", calibration=ids)
    found = inspect(str(tmp_path / "out"))
    assert [row.error for row in found] == [la.error for la in report.layers]
    assert [row.notes for row in found] == [la.notes for la in report.layers]
    assert {row.pattern for row in found if row.name.endswith("q_proj")} == {"dense"}
    assert any("pruned by magnitude" in row.cells()[-1] for row in found)


@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_of_a_packed_model_what_is_left_out_counts_as_zero(architecture: str, tmp_path: Path, ids: Tensor) -> None:
    source, plain, packed = tmp_path / "source", tmp_path / "plain", tmp_path / "packed"
    tiny.build(architecture).save_pretrained(source)
    prunella.prune(source, {"steps": ["wanda"], "pattern": "2:4", "skip": ["o_proj"]}, output=plain, calibration=ids)
    pack_model(str(plain), packed)
    one, other = ({row.name: row for row in inspect(str(path))} for path in (plain, packed))
    assert one.keys() == other.keys()
    for name, row in other.items():
        assert (row.shape, row.zeros, row.pattern) == (one[name].shape, one[name].zeros, one[name].pattern)
        assert row.error == one[name].error
        assert row.nbytes == one[name].nbytes if row.pattern == "dense" else row.nbytes < one[name].nbytes


def test_what_is_no_model_directory_is_refused(tmp_path: Path, llama: Path) -> None:
    with pytest.raises(ModelError, match="is not a directory"):
        inspect("smollm2-135m")
    with pytest.raises(ModelError, match=r"config\.json is missing"):
        inspect(str(tmp_path))


def test_memory_is_one_block(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks are read one after the other, never two at once."""
    from prunella.model.network import Model

    most = 0
    load = Model.load

    def watched(self: Model, *arguments: object) -> None:
        nonlocal most
        load(self, *arguments)  # type: ignore[arg-type]
        most = max(most, sum(p.numel() for p in self.network.parameters() if not p.is_meta))

    monkeypatch.setattr(Model, "load", watched)
    inspect(str(llama))
    block = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).model.layers[0]
    assert most == sum(p.numel() for p in block.parameters())
