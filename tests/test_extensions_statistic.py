"""Statistics from a file outside the package."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import prunella
from prunella import (
    InputError,
    PrunellaError,
    StatisticError,
    Stats,
    keep,
    make,
    read_masks,
    register_statistic,
    stream,
)
from prunella.statistics import statistics

TOY = Path(__file__).parent / "extensions" / "toy_statistic.py"
QUIET = {"evaluate": {"source": None}}


@pytest.fixture(autouse=True)
def known() -> Any:
    """What is registered here by hand is gone afterwards; what a file registered stays, as the file is read once."""
    before = set(statistics)
    yield
    for name in set(statistics) - before:
        if not name.startswith("toy-"):
            del statistics[name]


def inputs_of(network: Any, module: str, ids: Tensor) -> Tensor:
    seen: list[Tensor] = []
    hook = network.get_submodule(module).register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.no_grad():
        network(ids)
    hook.remove()
    return torch.cat([x.flatten(0, 1) for x in seen])


@pytest.mark.parametrize("order", ["layer", "block"])
def test_a_step_reads_a_statistic_of_its_own_file(order: str, ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "TOKENS", 40)  # several batches, merged
    network = tiny.build()
    module = "model.layers.0.self_attn.q_proj"
    x_TI = inputs_of(network, module, ids)
    weight_OI = network.get_submodule(module).weight.clone()
    prunella.prune(network, {"steps": [f"{TOY}:toy-peak"], "order": order, **QUIET}, calibration=ids)
    mask_OI = keep(weight_OI.abs() * x_TI.abs().amax(0), 0.5, group="row")
    assert torch.equal(network.get_submodule(module).weight, weight_OI * mask_OI)


@pytest.mark.parametrize("order", ["layer", "block"])
def test_it_goes_with_a_step_that_is_there(order: str, llama: Path, tmp_path: Path, ids: Tensor) -> None:
    for place, steps in enumerate(([f"{TOY}:toy-peak"], [f"{TOY}:toy-peak", "sparsegpt"])):
        recipe = {"steps": steps, "order": order, **QUIET}
        prunella.prune(llama, recipe, output=tmp_path / str(place), calibration=ids)
    alone, fitted = (read_masks(tmp_path / str(place)) for place in range(2))
    first = "model.layers.0.self_attn.q_proj"
    assert torch.equal(alone[first], fitted[first])
    dense, pruned = (AutoModelForCausalLM.from_pretrained(path) for path in (llama, tmp_path / "1"))
    before, after = (network.get_submodule(first).weight for network in (dense, pruned))
    assert (before != after)[fitted[first]].any()  # sparsegpt has moved what is kept


def test_another_file_needs_it_by_its_path(llama: Path, tmp_path: Path, run: Callable[..., Any]) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from prunella import Layer, keep, register\n"
        f"@register('mine', needs={{'{TOY}:toy-peak', 'norm'}})\n"
        "def mine(layer: Layer) -> Layer:\n"
        "    score_OI = layer.weight_OI.abs() * layer.stats['toy-peak'] / layer.stats.norm_I\n"
        "    return layer.pruned(layer.weight_OI, keep(score_OI, layer.sparsity, layer.pattern))\n"
    )
    words = ("--samples", 2, "--length", 32, "--evaluate", "none")
    assert run("prune", llama, "-o", tmp_path / "out", "--step", f"{file}:mine", *words).code == 0
    assert make(f"{file}:mine").needs == {"toy-peak", "norm"}
    with pytest.raises(InputError, match=r"unknown statistic 'toy-pique'\. Did you mean 'toy-peak'"):
        make(f"{write(tmp_path / 'no.py', f'{TOY}:toy-pique')}:mine")
    with pytest.raises(InputError, match=r"unknown statistic 'nrom'\. Did you mean 'norm'"):
        make(f"{write(tmp_path / 'neither.py', 'nrom')}:mine")


def write(path: Path, need: str) -> Path:
    path.write_text(
        f"from prunella import Layer, register\n@register('mine', needs={{'{need}'}})\n"
        "def mine(layer: Layer) -> Layer: ...\n"
    )
    return path


def test_it_merges_and_is_read_as_it_says() -> None:
    make(f"{TOY}:toy-peak")
    batches = [torch.randn(size, 6) for size in (3, 50, 7)]
    stats = sum((Stats.of(x_TI, {"toy-peak", "gram"}) for x_TI in batches), Stats())
    assert torch.equal(stats["toy-peak"], torch.cat(batches).abs().amax(0))
    assert stats.tokens == 60
    less = stats.only({"toy-peak"})
    assert set(less.values) == {"toy-peak"}
    assert less.cache is stats.cache
    with pytest.raises(StatisticError, match="this statistic was not collected: declare 'gram' in the step's needs"):
        less.hessian_II  # noqa: B018
    with pytest.raises(StatisticError, match="declare 'norm'"):
        less["norm"]
    with pytest.raises(StatisticError, match="declare 'toy-peak'"):
        stats.only({"gram"})["toy-peak"]


def test_in_chunks_it_sees_few_tokens_in_float32() -> None:
    seen = []

    @register_statistic("most", merge=torch.maximum, chunks=True, implies={"norm"})
    def most(x_TI: Tensor) -> Tensor:
        seen.append((x_TI.dtype, len(x_TI)))
        return x_TI.amax(0)

    x_TI = torch.randn(5000, 3).bfloat16()
    stats = Stats.of(x_TI, {"most"})
    assert seen == [(torch.float32, 2048), (torch.float32, 2048), (torch.float32, 904)]
    assert torch.equal(stats["most"], x_TI.float().amax(0))
    assert torch.equal(stats["norm"], Stats.of(x_TI, {"norm"})["norm"])


def test_one_that_reads_the_dense_inputs_has_the_dense_model_beside(ids: Tensor) -> None:
    found: dict[str, Tensor] = {}

    @register_statistic("moved")
    def moved(x_TI: Tensor, dense_TI: Tensor | None) -> Tensor:
        return torch.zeros(x_TI.shape[1]) if dense_TI is None else (dense_TI - x_TI).abs().sum(0)

    @prunella.register("moves", needs={"moved"})
    def moves(layer: prunella.Layer) -> prunella.Layer:
        found[layer.name] = layer.stats["moved"]
        return layer.pruned(layer.weight_OI, torch.rand_like(layer.weight_OI) > layer.sparsity)

    assert make("moves").beside
    prunella.prune(tiny.build(), {"steps": ["moves"], "order": "block", **QUIET}, calibration=ids)
    assert not found["model.layers.0.self_attn.q_proj"].any()  # nothing is pruned before it
    assert found["model.layers.1.self_attn.q_proj"].all()


def test_what_is_none_is_refused_and_what_fails_is_named(ids: Tensor) -> None:
    with pytest.raises(TypeError, match=r"statistic 'odd' takes \(x_TI, gradient_NOI\)"):
        register_statistic("odd")(lambda x_TI, gradient_NOI: x_TI)
    with pytest.raises(ValueError, match="there is a statistic 'norm' already"):
        register_statistic("norm")(lambda x_TI: x_TI)
    with pytest.raises(ValueError, match="there is a statistic 'targets' already"):
        register_statistic("targets")(lambda x_TI: x_TI)
    with pytest.raises(InputError, match=r"unknown statistic 'grma'\. Did you mean 'gram'"):
        Stats.of(torch.ones(2, 2), {"grma"})
    for function, said in (
        (lambda x_TI: 1 / 0, "ZeroDivisionError: .*; the defect is in the statistic, line"),
        (lambda x_TI: 3, "returned int, not Tensor"),
    ):
        register_statistic("failing")(function)
        with pytest.raises(PrunellaError, match=f"^statistic 'failing'.*{said}"):
            Stats.of(torch.ones(2, 2), {"failing"})
