"""A store in one file of a third party's own, and nothing else touched."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

import prunella
from prunella import InputError, ModelError, load_model, perplexity
from prunella.registry import find, steps
from prunella.save import Output
from prunella.store import find_store, stores

find("magnitude")  # with which all others are registered
FORMAT = f"{Path(__file__).parent / 'extensions' / 'toy_store.py'}:toy"
SHORT = ("--calibration", "pydoc", "--samples", 2, "--length", 32, "--windows", 1)


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    yield
    for name in ("toy", "mine"):
        stores.pop(name, None)


def read(directory: Path) -> Any:
    kind: Any = find_store(FORMAT).function
    return kind.read(directory)


def weights(directory: Path, source: Any = None) -> dict[str, Tensor]:
    with load_model(str(directory)).whole(source) as network:
        return {name: parameter.detach().clone() for name, parameter in network.named_parameters()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("step", sorted(name for name, method in steps.items() if method.prunes))
def test_every_step_writes_into_it(step: str, llama: Path, tmp_path: Path, ids: Tensor) -> None:
    for format_ in ("dense", FORMAT):
        recipe = {"steps": [step], "format": format_, "skip": ["layers.2"], "evaluate": {"source": None}}
        prunella.prune(llama, recipe, output=tmp_path / format_[-3:], calibration=ids[:2])
    assert same(weights(tmp_path / "nse"), weights(llama, read(tmp_path / "toy")))
    assert not list((tmp_path / "toy").glob("*.safetensors"))
    with pytest.raises(ModelError, match=r"was written by the store '.*toy_store\.py:toy', whose files are its own"):
        load_model(str(tmp_path / "toy"))


@pytest.mark.parametrize("architecture", ["gpt2", "mixtral"])
def test_a_network_whose_files_say_it_otherwise_is_read_back(architecture: str, tmp_path: Path, ids: Tensor) -> None:
    tiny.build(architecture, tie_word_embeddings=True).save_pretrained(tmp_path / "source")
    for format_ in ("dense", FORMAT):
        recipe = {"steps": ["wanda"], "format": format_}
        prunella.prune(tmp_path / "source", recipe, output=tmp_path / format_[-3:], calibration=ids)
    model, dense = load_model(str(tmp_path / "source")), load_model(str(tmp_path / "nse"))
    found = perplexity(model, ids, checkpoint=read(tmp_path / "toy"))
    assert found == perplexity(dense, ids)
    assert found != perplexity(model, ids)


def test_the_command_line_takes_it_and_an_interrupted_run_goes_on(
    run: Callable[..., Any], llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("--step", "sparsegpt", "--format", FORMAT, *SHORT)
    whole = run("prune", llama, "-o", tmp_path / "whole", *words)
    assert whole.code == 0, whole.err
    assert "prunella pack" not in whole.out
    write, calls = Output.write, 0

    def dying(self: Output, result: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        write(self, result)

    with monkeypatch.context() as patch:
        patch.setattr(Output, "write", dying)
        assert run("prune", llama, "-o", tmp_path / "out", *words).code != 0
    done = run("prune", llama, "-o", tmp_path / "out", *words, "--resume")
    assert done.code == 0, done.err
    assert prunella.Report.read(tmp_path / "out").run["resumed_after_blocks"] == 2
    assert same(weights(llama, read(tmp_path / "out")), weights(llama, read(tmp_path / "whole")))
    names = [{path.name for path in (tmp_path / name).iterdir()} for name in ("out", "whole")]
    assert names[0] == names[1]
    assert "in the format `toy_store.py:toy`" in (tmp_path / "out" / "README.md").read_text()


def test_what_it_cannot_do_is_said(llama: Path, tmp_path: Path, run: Callable[..., Any]) -> None:
    with pytest.raises(InputError, match="bits: 8 is of packed weights"):
        prunella.Recipe.of({"format": FORMAT, "bits": 8})
    with pytest.raises(InputError, match=r"unknown format 'pact'\. Did you mean 'packed'\? Available: dense, packed"):
        prunella.Recipe.of({"format": "pact"})
    with pytest.raises(InputError, match=r"format file 'nowhere\.py' does not exist"):
        prunella.Recipe.of({"format": "nowhere.py:toy"})
    said = run("prune", llama, "-o", tmp_path / "out", "--heal", "lora", "--format", FORMAT, *SHORT)
    assert said.code == 2
    assert "healing writes dense checkpoints" in said.err


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("1 / 0", r"ZeroDivisionError: division by zero; the defect is in the store, line 9 of .*mine\.py"),
        ("return {1: b'2'}", "TypeError: .*not JSON serializable; the defect is in the store"),
        ("raise OSError(28, 'No space left on device')", "no space left on the disk"),
    ],
)
def test_a_store_that_fails_is_named(body: str, message: str, llama: Path, tmp_path: Path, ids: Tensor) -> None:
    lines = ["from prunella.store import Store, register_store", "", "", "@register_store('mine')"]
    lines += ["class Mine(Store):", "    'Mine.'", "", "    def write(self, result):", f"        {body}"]
    (tmp_path / "mine.py").write_text("\n".join(lines))
    recipe = {"steps": ["magnitude"], "format": f"{tmp_path}/mine.py:mine"}
    with pytest.raises(prunella.PrunellaError, match=message):
        prunella.prune(llama, recipe, output=tmp_path / "out", calibration=ids[:2])
