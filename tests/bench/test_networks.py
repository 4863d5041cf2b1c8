"""How fast networks of any task are, dense beside packed and beside other engines."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import encoders
import pytest
import torch
from torch import nn

import prunella
from prunella import InputError, ModelError
from prunella.bench import engines, shapes
from prunella.bench.engines import ENGINES, Case, Engine, check_engines, open_engines
from prunella.bench.memory import resident_bytes
from prunella.bench.run import bench_network, difference
from prunella.bench.sides import open_sides, random_batch
from prunella.bench.turns import in_turns
from prunella.cli.run import SHAPES
from prunella.packing import pack_model
from prunella.sparse import bench as language
from prunella.tasks import open_model

QUICK: dict[str, Any] = {"rounds": 1, "seconds": 0.0}


def tiny_bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    network: nn.Module = BertModel(BertConfig(vocab_size=99, max_position_embeddings=40, **sizes))
    return network


def tiny_efficientnet() -> nn.Module:
    import timm

    network: nn.Module = timm.create_model("test_efficientnet", num_classes=10)
    return network


@pytest.fixture(autouse=True)
def tiny_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(shapes.SHAPES, "bert-base", ("masked", tiny_bert))
    monkeypatch.setitem(shapes.SHAPES, "resnet-50", ("images", tiny_efficientnet))


def pruned(folder: Path, shape: str = "bert-base", sparsity: float = 0.75) -> Path:
    folder.mkdir(parents=True)
    shapes.random_directory(shape, sparsity, folder)
    return folder


# --- shapes


def test_every_shape_is_named_on_the_command_line() -> None:
    assert {*SHAPES} == {*shapes.SHAPES, *language.SHAPES}


@pytest.mark.parametrize(
    ("shape", "parameters"), [("minilm-l6", 22_713_216), ("efficientnet-lite0", 4_652_008)]
)  # as the models' cards count them
def test_shapes_are_the_true_ones(shape: str, parameters: int) -> None:
    _, build = shapes.SHAPES[shape]
    with torch.device("meta"):
        assert sum(p.numel() for p in build().parameters()) == parameters


@pytest.mark.parametrize("shape", ["bert-base", "resnet-50"])
def test_each_layer_of_random_weights_is_pruned_to_its_share(shape: str, tmp_path: Path) -> None:
    from prunella.inspect import inspect

    found = [row for row in inspect(str(pruned(tmp_path / "a", shape))) if not row.why]
    assert found
    assert all(abs(row.zeros / row.weights - 0.75) <= 1 / row.weights for row in found)
    one, two = (open_model(str(pruned(tmp_path / name, shape)), device="cpu") for name in "bc")
    with one.whole() as first, two.whole() as second:
        assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
        states = [m.running_var for m in first.modules() if isinstance(m, nn.BatchNorm2d)]
        assert all(bool(((v > 1e-8) & (v < 1e8)).all()) for v in states)


# --- turns


def test_turns_alternate_and_short_calls_warm_up() -> None:
    called: list[str] = []

    def call(name: str, seconds: float) -> Callable[[], Any]:
        def run() -> None:
            called.append(name)
            time.sleep(seconds)

        return run

    found = in_turns({"a": call("a", 0.0), "b": call("b", 0.03)}, 2, 0.02)
    order = [name for number, name in enumerate(called) if not number or called[number - 1] != name]
    assert order == ["a", "b", "a", "b", "a"]  # the second round goes the other way round
    assert called.count("b") == 1 + 2  # one before the first round, one a turn: it takes too long to be warmed up
    assert len(found["a"].seconds) == called.count("a") - 3
    plain = found["b"].plain()
    assert plain["calls"] == 2
    assert 0.03 <= plain["min"] <= plain["low"] <= plain["median"] <= plain["high"]


def test_what_times_itself_is_believed() -> None:
    assert in_turns({"elsewhere": lambda: 7.0}, 3, 0.0)["elsewhere"].seconds == (7.0, 7.0, 7.0)


# --- dense beside packed


@pytest.mark.parametrize("shape", ["bert-base", "resnet-50"])
def test_both_sides_are_the_same_network(shape: str) -> None:
    found = bench_network(random=shape, sparsity=0.75, batch=[1, 3], threads=[1, 2], **QUICK)
    before = torch.get_num_threads()
    assert [(row["batch"], row["threads"], row["side"]) for row in found["rows"]] == [
        (batch, threads, side) for batch in (1, 3) for threads in (1, 2) for side in ("dense", "packed")
    ]
    for row in found["rows"]:
        assert row["difference"] < 1e-4
        assert row["throughput"] == row["batch"] / row["median"]
        assert row["speedup"] == 1.0 or row["side"] == "packed"
    assert abs(found["sparsity"] - 0.75) < 1e-3
    assert 0 < found["bytes"]["packed"] < found["bytes"]["dense"]
    assert found["task"] == shapes.SHAPES[shape][0]
    assert torch.get_num_threads() == before


def test_a_packed_directory_is_measured_as_it_is(tmp_path: Path) -> None:
    plain = pruned(tmp_path / "plain", "resnet-50")
    pack_model(str(plain), tmp_path / "packed")
    one, two = (bench_network(str(directory), **QUICK) for directory in (plain, tmp_path / "packed"))
    assert one["bytes"] == two["bytes"]
    assert one["sparsity"] == two["sparsity"]


def test_a_difference_is_measured_and_not_assumed(monkeypatch: pytest.MonkeyPatch) -> None:
    with open_sides(None, "resnet-50", 0.5) as sides:
        case = Case(sides.model, random_batch(sides.model, 2), Path())
        sides.packed.classifier.bias.data += 1.0  # type: ignore[union-attr]
        ours, theirs = case.call(sides.packed)(), case.call(sides.model.network)()
    assert difference(ours, theirs) == pytest.approx(float(1 / theirs[0].abs().max()), rel=1e-3)
    assert difference([torch.tensor([1.0, float("nan")])], [torch.ones(2)]) != 0.0
    assert difference([torch.ones(2)], [torch.ones(3)]) != 0.0


def test_a_text_is_so_long_as_is_said_or_as_the_network_takes(tmp_path: Path) -> None:
    model = open_model(str(pruned(tmp_path / "bert")), device="cpu")
    batch = random_batch(model, 3)
    assert {key: tuple(t.shape) for key, t in batch.items()} == dict.fromkeys(
        ("input_ids", "attention_mask", "token_type_ids"), (3, 40)
    )
    assert int(batch["input_ids"].max()) < 99
    assert random_batch(model, 1, 7)["input_ids"].shape == (1, 7)
    with pytest.raises(InputError, match="longer than the 40 positions"):
        random_batch(model, 1, 41)
    other = open_model(str(pruned(tmp_path / "net", "resnet-50")), device="cpu")
    with pytest.raises(InputError, match="no length"):
        random_batch(other, 1, 7)


def test_classifiers_of_texts_and_modules_of_ones_own_are_measured(tmp_path: Path) -> None:
    dense = encoders.write(tmp_path / "dense", encoders.build("bert"))
    recipe = {"steps": ["magnitude"], "calibration": {"samples": 2}, "evaluate": {"source": None}}
    prunella.prune(str(dense), recipe, output=tmp_path / "pruned")
    found = bench_network(str(tmp_path / "pruned"), length=9, **QUICK)
    assert (found["task"], found["rows"][1]["difference"] < 1e-4) == ("classify", True)
    (tmp_path / "mine.py").write_text(
        "import torch\nfrom torch import nn\n\ndef build():\n    torch.manual_seed(0)\n"
        "    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))\n\n"
        "def calibration():\n    return [torch.randn(4, 64, generator=torch.Generator().manual_seed(1))]\n"
    )
    prunella.prune(f"{tmp_path / 'mine.py'}:build", recipe, output=tmp_path / "of-mine")
    found = bench_network(str(tmp_path / "of-mine"), batch=[5], **QUICK)
    assert (found["task"], found["rows"][1]["difference"] < 1e-4) == ("module", True)


@pytest.mark.slow  # two processes that import everything
def test_memory_is_that_of_a_process(tmp_path: Path) -> None:
    """Of a network much larger than what its forward pass leaves behind."""
    network = nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(6)))
    (tmp_path / "mine.py").write_text(
        "import torch\nfrom torch import nn\n\ndef build():\n"
        "    return nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(6)))\n\n"
        "def calibration():\n    return [torch.ones(2, 1024)]\n"
    )
    recipe = {"steps": ["magnitude"], "calibration": {"samples": 2}, "evaluate": {"source": None}}
    prunella.prune(f"{tmp_path / 'mine.py'}:build", recipe, output=tmp_path / "pruned")
    size = sum(p.numel() * 4 for p in network.parameters())
    assert resident_bytes(tmp_path / "pruned", 2) == pytest.approx(size, rel=0.2)
    with pytest.raises(ModelError, match=r"cannot be measured: .*holds no model"):
        resident_bytes(tmp_path)


# --- what cannot be measured


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "one of the two"),
        ({"random": "bert-bas"}, "Did you mean 'bert-base'"),
        ({"random": "bert-base", "batch": [0]}, "batch is at least 1"),
        ({"random": "bert-base", "threads": [1, 0]}, "threads is at least 1"),
        ({"random": "bert-base", "length": 0}, "length is at least 1"),
        ({"random": "bert-base", "sparsity": 1.0}, "out of range"),
        ({"random": "bert-base", "beside": ["onnx"]}, "unknown engine 'onnx'"),
    ],
)
def test_what_makes_no_sense_is_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        bench_network(**given)


def test_a_dense_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Prune it first"):
        bench_network(str(pruned(tmp_path / "dense", sparsity=0.0)))


@pytest.mark.parametrize("shape", ["bert-base", "resnet-50"])
def test_a_packed_file_of_another_architecture_is_refused(shape: str, tmp_path: Path) -> None:
    pack_model(str(pruned(tmp_path / "plain", shape)), tmp_path / "packed")
    path = tmp_path / "packed" / "config.json"
    config = json.loads(path.read_text())
    config |= {"architecture": "test_resnet"} if "architecture" in config else {"hidden_size": 32}
    path.write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"missing|another network|the model wants|cannot be loaded|has shape"):
        bench_network(str(tmp_path / "packed"), **QUICK)


def test_an_engine_that_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"engine 'openvino' needs the package openvino.*prunella\[engines\]"):
        check_engines(["openvino"])
    check_engines(["torch-bfloat16"])


def test_an_engine_that_cannot_run_a_network_leaves_the_others_their_turns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(case: Case, threads: int) -> Any:
        raise RuntimeError("no such operator\nand more")

    monkeypatch.setitem(ENGINES, "broken", Engine((), broken))
    found = bench_network(random="bert-base", beside=["broken", "torch-bfloat16"], batch=[1, 2], **QUICK)
    assert found["refused"] == {"broken": "no such operator"}
    assert {row["side"] for row in found["rows"]} == {"dense", "packed", "torch-bfloat16"}
    assert capsys.readouterr().err.count("broken cannot run this network, and is left out: no such operator") == 1


# --- other engines


@pytest.mark.parametrize("shape", ["bert-base", "resnet-50"])
def test_other_engines_run_the_same_network(shape: str, tmp_path: Path) -> None:
    names = [name for name, engine in ENGINES.items() if all(map(_there, engine.packages))]
    if "onnxruntime" not in names:
        pytest.importorskip("onnxruntime")
    found = bench_network(random=shape, sparsity=0.75, batch=[2], beside=names, **QUICK)
    assert not found["refused"]
    apart = {row["side"]: row["difference"] for row in found["rows"]}
    assert apart.keys() == {"dense", "packed", *names}
    for name, value in apart.items():
        assert value < (0.3 if "int8" in name else 0.1 if "bfloat16" in name else 1e-4), name
    assert all(apart[name] > 1e-4 for name in names if "int8" in name)  # they are rounded


def _there(package: str) -> bool:
    return engines.find_spec(package) is not None


def test_what_cannot_be_traced_is_captured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxscript")
    export, how = torch.onnx.export, []

    def once(*args: Any, **options: Any) -> Any:
        how.append(options["dynamo"])
        if not options["dynamo"]:
            raise RuntimeError("no")
        return export(*args, **options)

    monkeypatch.setattr(torch.onnx, "export", once)
    with open_sides(None, "resnet-50", 0.5) as sides:
        case = Case(sides.model, random_batch(sides.model, 2), tmp_path)
        runs, refused = open_engines(["onnxruntime"], case, 1)
        assert (how, refused) == ([False, True], {})
        assert difference(list(map(torch.as_tensor, runs["onnxruntime"]())), case.call(sides.model.network)()) < 1e-4


# --- the command


def test_the_command_prints_a_table_and_json(run: Callable[..., Any], tmp_path: Path) -> None:
    directory = pruned(tmp_path / "net", "resnet-50")
    done = run("bench", directory, "--batch", "1,2", "--threads", "1", "--rounds", 1, "--beside", "torch-bfloat16")
    assert done.code == 0, done.err
    assert "weights: " in done.out
    assert "torch-bfloat16" in done.out
    done = run("bench", "--shape", "bert-base", "--sparsity", "0.75", "--length", 8, "--rounds", 1, "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert [row["side"] for row in found["rows"]] == ["dense", "packed"]
    assert found["sparsity"] == pytest.approx(0.75, abs=1e-3)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--shape", "bert-base", "--batch", "0"), "--batch takes whole numbers from 1 on"),
        (("--shape", "bert-base", "--threads", "two"), "--threads takes whole numbers from 1 on"),
        (("--shape", "nothing"), "unknown shape 'nothing'"),
        (("--shape", "tiny", "--batch", "2"), "--batch is of other networks, and 'tiny' is none"),
        (("--shape", "tiny", "--threads", "1,2"), "one number for language models"),
        (("--shape", "bert-base", "--prompt", "8"), "--prompt is of language models, and 'bert-base' is none"),
        (("--shape", "bert-base", "--beside", "nothing"), "unknown engine 'nothing'"),
        ((), "one of the two"),
    ],
)
def test_the_command_refuses_in_one_line(run: Callable[..., Any], words: tuple[str, ...], said: str) -> None:
    done = run("bench", *words)
    (line,) = done.err.splitlines()
    assert (done.code, said in line) == (2, True), line


def test_random_weights_of_a_directory_are_of_language_models(run: Callable[..., Any], tmp_path: Path) -> None:
    done = run("bench", "--random", pruned(tmp_path / "net", "resnet-50"))
    assert done.code == 2
    assert "is of task 'images'" in done.err
