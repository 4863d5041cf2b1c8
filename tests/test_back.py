"""Pruning from the last block to the first."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import zoo
from test_backward import EXACT, by_autograd
from test_extensions_task import TASK
from test_extensions_task import network as toy_network
from test_resume import files_of, killed_run
from torch import Tensor

import prunella
from prunella import Block, InputError, Layer, ModelError, NumericalError, Report, Stats, keep, make, register
from prunella.layers import find_layers
from prunella.save import Output
from prunella.stream import Stream
from prunella.tasks.text import wrap_model

TOY = Path(__file__).parent / "extensions" / "toy_statistic.py"
FISHER, TAYLOR = f"{TOY}:toy-fisher", f"{TOY}:toy-taylor"
QUIET: dict[str, Any] = {"evaluate": {"source": None}}
SHORT: dict[str, Any] = {"calibration": {"samples": 4, "length": 32}, "evaluate": {"windows": 1}}


@pytest.fixture
def seen() -> dict[str, Stats]:
    """What a step that needs everything is given, {layer: its statistics}, in the order in which it is called."""
    found: dict[str, Stats] = {}

    @register("seer", needs={"fisher", "gradients", "gram", "moments"})
    def seer(layer: Layer) -> Layer:
        found[layer.name] = layer.stats
        return layer.pruned(layer.weight_OI, keep(layer.weight_OI.abs(), layer.sparsity, layer.pattern))

    return found


@pytest.mark.parametrize("architecture", EXACT)
def test_fisher_is_that_of_autograd_on_the_whole_network(
    architecture: str, seen: dict[str, Stats], ids: Tensor
) -> None:
    network = tiny.build(architecture, num_hidden_layers=3).double()
    expected = by_autograd(network, ids)
    model = wrap_model(network)
    blocks = [[slot.name for slot in find_layers(model.module(name), name)] for name in model.blocks]
    report = prunella.prune(network, {"steps": ["seer"], "calibration": {"min_tokens": 1}, **QUIET}, calibration=ids)
    assert report.recipe["order"] == "back"
    assert [layer.name for layer in report.layers] == [name for names in blocks for name in names]
    assert list(seen) == [name for names in reversed(blocks) for name in names if name in seen]
    assert len(seen) > 0.9 * len(report.layers)  # but for experts that no token reached
    for name, stats in seen.items():
        gradient_NOI = torch.stack([expected[name, n] for n in range(len(ids))])
        torch.testing.assert_close(stats["gradients"], gradient_NOI, rtol=1e-9, atol=1e-15)
        fisher_OI = gradient_NOI.square().sum(0)
        assert stats["fisher"].dtype == torch.float64
        assert fisher_OI.norm() > 0
        assert (stats["fisher"] - fisher_OI).norm() <= 1e-9 * fisher_OI.norm()


def test_the_inputs_are_those_of_the_dense_model(seen: dict[str, Stats], ids: Tensor) -> None:
    expected: dict[str, Tensor] = {}
    network = tiny.build(num_hidden_layers=3)
    wrap_model(network)  # with its own attention
    for name, module in network.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _, given, name=name: expected.__setitem__(name, given[0]))
    with torch.no_grad():
        network(ids)
    prunella.prune(tiny.build(num_hidden_layers=3), {"steps": ["seer"], **QUIET}, calibration=ids)
    assert seen.keys() == expected.keys() - {"lm_head"}
    for name, stats in seen.items():
        x_TI = expected[name].flatten(0, 1)
        assert stats.tokens == ids.numel()
        torch.testing.assert_close(stats.hessian_II, x_TI.T @ x_TI / ids.numel(), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(stats.mean_I, x_TI.mean(0), rtol=1e-4, atol=1e-6)
    q, k = (seen[f"model.layers.1.self_attn.{name}_proj"] for name in "qk")
    assert q["gram"] is k["gram"]
    assert q.cache is k.cache


@pytest.mark.parametrize("files", [False, True], ids=["memory", "files"])
def test_a_step_prunes_by_it(files: bool, llama: Path, ids: Tensor, tmp_path: Path) -> None:
    network = prunella.load_model(str(llama)).network.from_pretrained(llama)
    found = by_autograd(network, ids)
    dense = {name: value.clone() for name, value in network.state_dict().items()}
    recipe = {"steps": [FISHER], "pattern": "2:4", "skip": ["layers.1"], **QUIET}
    if files:
        report = prunella.prune(llama, recipe, output=tmp_path / "out", calibration=ids)
        network = network.from_pretrained(tmp_path / "out")
        assert Report.read(tmp_path / "out").layers == report.layers
    else:
        report = prunella.prune(network, recipe, calibration=ids)
    for layer in report.layers:
        weight_OI, before_OI = network.get_submodule(layer.name).weight, dense[f"{layer.name}.weight"]
        if "layers.1" in layer.name:
            assert layer.sparsity == 0
            assert torch.equal(weight_OI, before_OI)
            continue
        fisher_OI = sum(found[layer.name, n].square() for n in range(len(ids)))
        mask_OI = keep(before_OI.square() * fisher_OI, 0.5, prunella.Pattern.parse("2:4"))
        assert ((weight_OI != 0) == mask_OI).float().mean() > 0.99  # sums in another order
        assert layer.sparsity == 0.5
        assert layer.tokens == ids.numel()
        assert layer.error is not None
        assert 0 < layer.error < 1


def test_a_network_of_another_task_goes_back_by_its_own_loss(seen: dict[str, Stats]) -> None:
    net = toy_network()
    x = torch.randn(12, 8)
    expected: dict[str, Tensor] = {}
    for sample in x:
        loss = (net(sample[None]) - sample.flip(0)).square().mean()
        for name in ("first.0", "second"):
            gradient_OI = torch.autograd.grad(loss, net.get_submodule(name).weight, retain_graph=True)[0]
            expected[name] = expected.get(name, torch.zeros(())) + gradient_OI.square()
    recipe = {"task": TASK, "steps": ["seer"], "calibration": {"min_tokens": 1}, **QUIET}
    report = prunella.prune(net, recipe, calibration={"x": x, "y": x.flip(1)})
    assert report.recipe["order"] == "back"
    assert seen.keys() == expected.keys()
    for name, fisher_OI in expected.items():
        torch.testing.assert_close(seen[name]["fisher"], fisher_OI, rtol=1e-4, atol=1e-8)


def test_what_comes_before_the_first_pruned_block_is_left_alone(ids: Tensor) -> None:
    network = tiny.build(num_hidden_layers=3)
    report = prunella.prune(
        network, {"steps": [FISHER], "skip": ["layers.0", "layers.1.mlp"], **QUIET}, calibration=ids
    )
    assert [layer.name for layer in report.layers if layer.target] == [
        layer.name for layer in report.layers if "layers.2" in layer.name or "layers.1.self_attn" in layer.name
    ]


@pytest.mark.parametrize("also", ["sparsegpt", "wanda", "update", "gptq"])
def test_it_goes_with_steps_of_inputs(also: str, ids: Tensor) -> None:
    network = tiny.build()
    report = prunella.prune(network, {"steps": [TAYLOR, also], "order": "back", **QUIET}, calibration=ids)
    assert {round(layer.sparsity, 2) for layer in report.layers} == {0.5}


def test_of_a_mixture_experts_that_few_tokens_reach_are_pruned_by_magnitude(ids: Tensor) -> None:
    recipe = {"steps": [FISHER], "calibration": {"min_tokens": ids.numel() // 2}, **QUIET}
    report = prunella.prune(tiny.build("mixtral"), recipe, calibration=ids)
    starved = [layer for layer in report.layers if layer.tokens < ids.numel() // 2]
    assert starved
    assert all("pruned by magnitude" in layer.notes[-1] for layer in starved)
    assert len(starved) < len(report.layers)


@pytest.mark.parametrize("format", ["dense", "packed"])
@pytest.mark.parametrize("call", [0, 1, 2])
def test_a_run_that_was_killed_ends_with_the_same_bytes(
    call: int, format: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = {"steps": [TAYLOR, "sparsegpt"], "format": format, **SHORT}
    expected = prunella.prune(llama, recipe, output=tmp_path / "whole")
    out = tmp_path / "out"
    killed_run(monkeypatch, Output, "write", call, lambda: prunella.prune(llama, recipe, output=out))
    journal = (tmp_path / "out.partial" / "journal.jsonl").read_text().splitlines()
    assert [json.loads(line)["block"] for line in journal if "block" in line] == [2, 1, 0][:call]
    report = prunella.prune(llama, recipe, output=out, resume=True)
    assert report.run["resumed_after_blocks"] == call
    assert report.layers == expected.layers
    assert report.left_out == expected.left_out
    assert report.pruned == expected.pruned
    assert files_of(out) == files_of(tmp_path / "whole")


def test_on_the_command_line(llama: Path, tmp_path: Path, run: Callable[..., Any]) -> None:
    words = ("prune", llama, "--step", FISHER, "--samples", 2, "--length", 32, "--evaluate", "none")
    assert run(*words, "-o", tmp_path / "out").code == 0
    assert Report.read(tmp_path / "out").recipe["order"] == "back"
    said = run(*words, "-o", tmp_path / "other", "--order", "block")
    assert said.code == 2
    assert said.err.count("\n") == 1
    assert "reads gradients, which come from the last block to the first: use --order back" in said.err
    assert not list(tmp_path.glob("other*"))


@pytest.mark.parametrize(
    ("names", "changes", "message"),
    [
        ([FISHER], {"order": "layer"}, "use --order back"),
        (["wanda"], {"order": "back"}, "order back is for steps that read gradients, which wanda does not"),
        ([FISHER, "align"], {}, "step 'align' reads 'drift', which there is not on the way back"),
        ([FISHER, "besa"], {}, "step 'besa' reads 'targets', which there is not on the way back"),
        (["wanda"], {"allocate": {"ramp": {"step": FISHER}}}, "works on the way back, on which allocation 'ramp'"),
        (["wanda"], {"allocate": {"probe": {"step": FISHER}}}, "made of gradients, which there are only on the way"),
        (["wanda"], {"allocate": {"global": {"step": FISHER}}}, "made of gradients, which there are only on the way"),
    ],
)
def test_what_cannot_be_is_refused(names: list[str], changes: dict[str, Any], message: str, ids: Tensor) -> None:
    with pytest.raises(InputError, match=message):
        prunella.prune(tiny.build(), {"steps": names, **changes, **QUIET}, calibration=ids)


def test_models_that_have_no_gradients_are_refused(ids: Tensor) -> None:
    recipe = {"steps": [FISHER], **QUIET}
    with pytest.raises(InputError, match="small ones are zero in float16: use --dtype bfloat16"):
        prunella.prune(tiny.build().half(), recipe, calibration=ids)
    with pytest.raises(ModelError, match="pass each other more than the hidden state"):
        prunella.prune(zoo.build("zaya"), recipe, calibration=ids)
    network = tiny.build()
    network.lm_head.weight.data *= 1e30
    with pytest.raises(NumericalError, match=r"loss of window 0 is not finite|the gradients of layer .* hold NaN"):
        prunella.prune(network, recipe, calibration=ids)


def test_a_step_on_blocks_sees_all_layers_and_runs_none(ids: Tensor) -> None:
    ran: list[Block] = []

    @register("whole", needs={"fisher"})
    def whole(block: Block) -> Block:
        ran.append(block)
        return make(FISHER).apply(block)

    prunella.prune(tiny.build(), {"steps": ["whole"], **QUIET}, calibration=ids)
    assert [block.index for block in ran] == [1, 0]
    assert all(block.run is None and block.windows == 0 and len(block.layers) == 7 for block in ran)


def test_only_single_windows_go_back(ids: Tensor) -> None:
    with pytest.raises(ValueError, match="alone=True"):
        Stream(wrap_model(tiny.build()), ids).back()
