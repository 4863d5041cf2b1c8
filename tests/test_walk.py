"""Blocks one after the other, with the weights of a source, whatever was done with them before."""

from __future__ import annotations

import contextlib
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

import prunella
from prunella import load_model, make, wrap_model
from prunella.errors import ReadError
from prunella.layers import find_layers
from prunella.model.checkpoint import Checkpoint
from prunella.model.network import Model
from prunella.model.walk import LoadedBlock, ReadAhead
from prunella.stream import Stream


def from_files(folder: Path, kind: str = "llama") -> Model:
    tiny.build(kind, num_hidden_layers=3).save_pretrained(folder, max_shard_size="60KB")
    return load_model(str(folder))


def in_memory(folder: Path, kind: str = "llama") -> Model:
    return wrap_model(tiny.build(kind, num_hidden_layers=3))


OPENED = pytest.mark.parametrize("opened", [from_files, in_memory])


def weights(model: Model, **options: Any) -> list[dict[str, Tensor]]:
    return [{name: t.clone() for name, t in block.tensors().items()} for _, block in model.walk(**options)]


def same(one: Iterable[dict[str, Tensor]], other: Iterable[dict[str, Tensor]]) -> bool:
    return all(
        a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        for a, b in zip(one, other, strict=True)
    )


@OPENED
def test_a_walk_gives_the_weights_anew_whatever_was_done_with_them(
    opened: Callable[[Path], Model], tmp_path: Path, ids: Tensor
) -> None:
    model = opened(tmp_path)
    dense = weights(model)
    for order in ("layer", "block"):
        stream = Stream(model, ids, order=order)  # type: ignore[arg-type]
        for index, block in model.walk():
            slots = [replace(slot, sparsity=0.5) for slot in find_layers(block.module, block.name)]
            result = stream.prune(block, slots, [make("sparsegpt")])
            assert same([block.tensors()], [dense[index]])
            with block.use(result.changed):
                assert all((slot.read() == 0).any() for slot in slots)
        assert same(weights(model), dense)


@OPENED
def test_from_the_last_to_the_first(opened: Callable[[Path], Model], tmp_path: Path) -> None:
    model = opened(tmp_path)
    assert [index for index, _ in model.walk(back=True)] == [2, 1, 0]
    assert same(weights(model, back=True)[::-1], weights(model))


def test_only_a_writer_makes_weights_last() -> None:
    model = wrap_model(tiny.build("llama"))
    addresses = [parameter.data_ptr() for parameter in model.network.parameters()]
    _, block = next(iter(model.walk()))
    new = {name: torch.zeros_like(tensor) for name, tensor in block.tensors().items() if name.endswith("q_proj.weight")}
    block.keep(new)
    assert not model.network.model.layers[0].self_attn.q_proj.weight.any()
    assert model.network.model.layers[0].self_attn.k_proj.weight.any()
    assert [parameter.data_ptr() for parameter in model.network.parameters()] == addresses


class Tied(nn.Module):
    """Two names of one weight, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(3, 3)
        self.two = nn.Linear(3, 3)
        self.two.weight = self.one.weight
        self.norm = nn.BatchNorm1d(3)


@pytest.mark.parametrize("name", ["block.one.weight", "block.two.weight", "block.norm.running_var"])
def test_weights_are_lent_by_any_name_and_given_back(name: str) -> None:
    module = Tied()
    block = LoadedBlock(0, "block", module, pytest.fail)
    own, key = module.get_submodule(name.split(".")[1]), name.split(".")[2]
    before = getattr(own, key)
    with contextlib.suppress(ZeroDivisionError), block.use({name: torch.full(before.shape, 7.0)}):
        assert (getattr(own, key) == 7).all()
        assert module.one.weight is module.two.weight
        raise ZeroDivisionError
    assert getattr(own, key) is before
    with block.use({name: torch.full(before.shape, 7.0)}, only=()):
        assert getattr(own, key) is before


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_another_checkpoint_is_lent_whole_or_in_part(kind: str, tmp_path: Path) -> None:
    """Of a mixture too, whose experts are several tensors in the files."""
    model = from_files(tmp_path / "one", kind)
    torch.manual_seed(1)
    network = tiny.build(kind, num_hidden_layers=3)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.uniform_()
    network.save_pretrained(tmp_path / "other")
    other = Checkpoint(tmp_path / "other")
    mine, theirs = weights(model), weights(model, source=other)
    assert not same(mine, theirs)
    for index, block in model.walk():
        assert same([block.read(other)], [theirs[index]])
        for name in mine[index]:
            with block.use(other, only={name}):
                assert same([block.tensors()], [mine[index] | {name: theirs[index][name]}])
        assert same([block.tensors()], [mine[index]])
    assert all(parameter.is_meta for parameter in model.network.parameters())


def test_the_next_block_is_read_by_a_thread_and_each_tensor_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = from_files(tmp_path)
    real, read = Checkpoint.open, Counter[str]()
    by: dict[str, str] = {}

    def spy(self: Checkpoint, names: Iterable[str]) -> Any:
        names = list(names)
        read.update(names)
        by.update(dict.fromkeys(names, threading.current_thread().name))
        return real(self, names)

    monkeypatch.setattr(Checkpoint, "open", spy)
    for index, block in model.walk():
        assert not any(tensor.is_meta for tensor in block.tensors().values()), index
    assert read == Counter(name for name in model.plan() if model.block_of(model.plan()[name][0]))
    threads = {name.split(".")[2]: thread for name, thread in by.items()}
    assert threads["0"] == threading.current_thread().name
    assert threads["1"].startswith("prunella-read")
    assert threads["2"].startswith("prunella-read")
    assert not any(thread.name.startswith("prunella-read") for thread in threading.enumerate())


def test_what_cannot_be_read_is_said_at_its_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = from_files(tmp_path)
    real = ReadAhead._read

    def broken(self: ReadAhead, names: list[str]) -> dict[str, Tensor]:
        if any(".layers.2." in name for name in names):
            raise ReadError("gone")
        return real(self, names)

    monkeypatch.setattr(ReadAhead, "_read", broken)
    walk = model.walk()
    assert [next(walk)[0], next(walk)[0]] == [0, 1]
    with pytest.raises(ReadError, match="gone"):
        next(walk)
    assert all(parameter.is_meta for parameter in model.network.parameters())


def test_where_memory_is_short_nothing_is_read_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = from_files(tmp_path)
    monkeypatch.setattr("prunella.model.walk.free_memory", lambda device: 1000)
    monkeypatch.setattr(ReadAhead, "_read", pytest.fail)
    assert len(weights(model)) == 3


def test_probe_reads_each_block_once(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All damaged models ride along."""
    recipe: dict[str, Any] = {
        "steps": ["magnitude"],
        "calibration": {"samples": 8, "length": 32},
        "evaluate": {"source": None},
    }
    real, read = Checkpoint.open, Counter[str]()

    def spy(self: Checkpoint, names: Iterable[str]) -> Any:
        names = list(names)
        read.update(names)
        return real(self, names)

    monkeypatch.setattr(Checkpoint, "open", spy)

    def count(allocation: str) -> int:
        read.clear()
        prunella.prune(llama, {**recipe, "allocate": allocation}, output=tmp_path / allocation)
        return max(times for name, times in read.items() if ".layers." in name)

    assert count("probe") == count("uniform") + 1


def test_nothing_else_goes_over_blocks() -> None:
    """`model.block` is for one block: the walk, and the check of how blocks are called at the start of a run."""
    source = Path(prunella.__file__).parent
    found = {
        path.relative_to(source).as_posix()
        for path in source.rglob("*.py")
        if re.search(r"\b(model|opened|dense|self)\.block\(", path.read_text(encoding="utf-8"))
    }
    assert found == {"examine.py", "standins.py", "model/network.py"}
