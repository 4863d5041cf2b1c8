"""Thousands of damaged files: each is refused with an error that names it, or is read as what it says.

Never another exception, a hang or a crash; and never a tensor that differs where no byte of it was touched.
Some 3,000 with PRUNELLA_FAULTS=1 (`make faults`), a fifth of them without.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from processes import times
from torch import Tensor

import prunella
from prunella import PrunellaError, Recipe, Report
from prunella.calibrate import windows
from prunella.model.network import Model
from prunella.packing import pack_model
from prunella.tasks.text import load_model
from prunella.tensors import GRIDS, MASKS, read_grids, read_masks

Edit = tuple[str, float, bytes]


@st.composite
def edits(draw: st.DrawFn) -> list[Edit]:
    """What happens to a file: (how, where as a share of its length, with which bytes). Half of them near the start,
    where headers are."""
    near = st.floats(0, 0.02)
    place = st.one_of(near, st.floats(0, 1, exclude_max=True))
    how = st.sampled_from(["flip", "flip", "overwrite", "cut", "insert", "remove", "swap"])
    return draw(st.lists(st.tuples(how, place, st.binary(min_size=1, max_size=12)), min_size=1, max_size=3))


def damage(content: bytes, changes: list[Edit]) -> bytes:
    """The file after it: flipped bits, trash in its place or between, bytes missing, cut off, or moved."""
    data = bytearray(content)
    for how, share, trash in changes:
        at = int(share * len(data))
        if not data:
            break
        match how:
            case "flip":
                data[at] ^= 1 << trash[0] % 8
            case "overwrite":
                data[at : at + len(trash)] = trash[: len(data) - at]
            case "cut":
                del data[at:]
            case "insert":
                data[at:at] = trash
            case "remove":
                del data[at : at + len(trash)]
            case "swap":
                there = trash[0] * len(data) // 256
                data[at], data[there] = data[there], data[at]
    return bytes(data)


def many(count: int) -> Callable[[Any], Any]:
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(
        max_examples=times(count),
        deadline=timedelta(seconds=20),
        suppress_health_check=checks,
        derandomize=True,
        database=None,
    )


@contextlib.contextmanager
def damaged(path: Path, changes: list[Edit]) -> Iterator[int]:
    """The file is damaged while the context lasts; yields in how many bytes at most, where it kept its length."""
    content = path.read_bytes()
    after = damage(content, changes)
    path.write_bytes(after)
    try:
        same = len(after) == len(content)
        yield sum(a != b for a, b in zip(content, after, strict=True)) if same else len(content)
    finally:
        path.write_bytes(content)


def read(action: Callable[[], Any], names: str | None = None) -> Any:
    """What it returns, or None where it refuses with an error that users are told."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            return action()
        except PrunellaError as error:
            said = str(error)
    assert said.strip()
    assert names is None or names in said, said
    return None


def tensors_of(model: Model) -> dict[str, Tensor]:
    with model.whole() as network:
        return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def differ(one: dict[str, Tensor], other: dict[str, Tensor]) -> int:
    """In how many bytes; all tensors must be there, in their shapes and dtypes."""
    assert one.keys() == other.keys()
    total = 0
    for name, tensor in one.items():
        assert (tensor.shape, tensor.dtype) == (other[name].shape, other[name].dtype), name
        total += int((tensor.contiguous().view(torch.uint8) != other[name].contiguous().view(torch.uint8)).sum())
    return total


@pytest.fixture(scope="module")
def dense(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shutil.copytree(llama, tmp_path_factory.mktemp("dense") / "model")


@pytest.fixture(scope="module")
def pruned(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pruned and quantized: with masks, grids and a report."""
    out = tmp_path_factory.mktemp("pruned") / "model"
    recipe = {"steps": ["wanda", "gptq"], "calibration": {"samples": 4, "length": 32}, "evaluate": {"windows": 1}}
    prunella.prune(llama, recipe, output=out)
    return out


@pytest.fixture(scope="module")
def packed(pruned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "model"
    pack_model(str(pruned), out)
    return out


@pytest.mark.slow
@many(400)
@given(changes=edits())
def test_weights(changes: list[Edit], dense: Path) -> None:
    path = sorted(dense.glob("*.safetensors"))[1]
    whole = tensors_of(load_model(str(dense), device="cpu"))
    with damaged(path, changes) as touched:
        found = read(lambda: tensors_of(load_model(str(dense), device="cpu")))
    if found is not None:
        assert differ(whole, found) <= touched


@pytest.mark.slow
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "generation_config.json"])
@many(150)
@given(changes=edits())
def test_companions_of_weights(name: str, changes: list[Edit], dense: Path) -> None:
    with damaged(dense / name, changes):
        read(lambda: tensors_of(load_model(str(dense), device="cpu")))


@pytest.mark.slow
@many(100)
@given(changes=edits())
def test_tokenizer(changes: list[Edit], dense: Path) -> None:
    with damaged(dense / "tokenizer.json", changes):
        read(lambda: windows(load_model(str(dense), device="cpu"), "pydoc", 1, 32))


@pytest.mark.slow
@many(400)
@given(changes=edits())
def test_packed_weights(changes: list[Edit], packed: Path) -> None:
    path = sorted(packed.glob("*.safetensors"))[0]
    whole = tensors_of(load_model(str(packed), device="cpu", packed=True))
    with damaged(path, changes) as touched:
        found = read(lambda: tensors_of(load_model(str(packed), device="cpu", packed=True)))
        if found is not None:
            assert differ(whole, found) <= touched
            logits = load_model(str(packed), device="cpu", packed=True).network(torch.arange(8)[None]).logits
            assert logits.shape[:2] == (1, 8)


@pytest.mark.slow
@many(150)
@given(changes=edits())
def test_packed_config(changes: list[Edit], packed: Path) -> None:
    with damaged(packed / "config.json", changes):
        read(lambda: tensors_of(load_model(str(packed), device="cpu", packed=True)))


@many(500)
@given(changes=edits())
def test_masks(changes: list[Edit], pruned: Path) -> None:
    whole = read_masks(pruned)
    with damaged(pruned / MASKS, changes) as touched:
        found = read(lambda: read_masks(pruned), MASKS)
    if found is not None:
        assert found.keys() == whole.keys()
        assert sum(int((found[name] != mask).sum()) for name, mask in whole.items()) <= 8 * touched


@many(300)
@given(changes=edits())
def test_grids(changes: list[Edit], pruned: Path) -> None:
    with damaged(pruned / GRIDS, changes):
        read(lambda: read_grids(pruned), GRIDS)


@many(300)
@given(changes=edits())
def test_report(changes: list[Edit], pruned: Path) -> None:
    with damaged(pruned / "prunella.json", changes):
        read(lambda: Report.read(pruned), "prunella.json")


@many(500)
@given(changes=edits())
def test_recipe(changes: list[Edit], tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    whole = {**Recipe.read("best"), "sparsity": {"*": 0.6, "down_proj": 0.5}, "heal": {"train": ["mask-lora", "norms"]}}
    path.write_text(json.dumps(whole, indent=1))
    with damaged(path, changes):
        values = read(lambda: Recipe.read(str(path)))
        if values is not None:
            recipe = read(lambda: Recipe.of(values))
            if recipe is not None:
                read(recipe.make_steps)


@pytest.mark.slow
@many(100)
@given(changes=edits())
def test_gguf(changes: list[Edit], llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRUNELLA_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "tiny.gguf"
    if not path.exists():
        tiny.write_gguf(path, llama)
    with damaged(path, changes):
        read(lambda: tensors_of(load_model(str(path), device="cpu")), "tiny.gguf")
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
