"""Gradients go back through several stacks as they go through the whole network."""

from __future__ import annotations

from typing import Any

import nets
import pytest
import torch
from torch import Tensor, nn

import prunella
from prunella import Layer, keep, register, register_task
from prunella.backward import Back
from prunella.model.network import Model
from prunella.samples import Samples
from prunella.stream import Stream


class Sums(nets.Sum):
    name = "sums"

    def __init__(self) -> None:
        super().__init__({})


def model_of(kind: str) -> tuple[Model, Samples]:
    register_task("sums")(Sums)
    samples, task = nets.samples_of(kind), Sums()
    task.batch = samples.groups[0]
    return Model(nets.build(kind), None, None, torch.device("cpu"), "test", task), samples


def expected(model: Model, samples: Samples) -> list[dict[str, Tensor]]:
    """By the whole network's own backward pass, of each sample."""
    found, network = [], model.network.requires_grad_()
    for one in samples:
        network.zero_grad()
        model.task.losses(model.task.run(network, one), one)[0].backward()
        found.append({name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None})
    network.requires_grad_(False)
    return found


@pytest.mark.parametrize("kind", ["t5", "whisper", "swin", "resnet"])
def test_they_are_those_of_the_whole_network(kind: str) -> None:
    model, samples = model_of(kind)
    want = expected(model, samples)
    back = Back(Stream(model, samples, alone=True))
    seen = set()
    for _, block in model.walk(back=True):
        for n, found in back.advance(block):
            for name, gradient_OI in found.items():
                whole = want[n][f"{name}.weight"]
                other = (
                    gradient_OI
                    if whole.ndim == 2
                    else gradient_OI.reshape(len(whole), *whole.shape[2:], -1).movedim(-1, 1)
                )
                torch.testing.assert_close(other, whole, rtol=1e-3, atol=1e-5)
                seen.add(name)
    for stack in model.stacks:
        assert any(name.startswith(stack[0]) for name in seen)


@pytest.mark.parametrize("kind", ["t5", "whisper"])
def test_a_step_that_reads_gradients_prunes_both_stacks(kind: str) -> None:
    @register("squares", needs={"fisher"})
    def squares(layer: Layer) -> Layer:
        """Prune by w^2 times the squared gradient."""
        score_OI = layer.weight_OI**2 * layer.stats["fisher"]
        return layer.pruned(layer.weight_OI, keep(score_OI, layer.sparsity, layer.pattern))

    model, samples = model_of(kind)
    recipe: dict[str, Any] = {"steps": ["squares"], "evaluate": {"source": None}, "calibration": {"min_tokens": 1}}
    report = prunella.prune(model, recipe, calibration=samples)
    assert (report.recipe["order"], report.sparsity) == ("back", pytest.approx(0.5, abs=0.01))
    assert {layer.name.partition(".layers")[0].partition(".block")[0] for layer in report.layers} >= {
        stack[0].rpartition(".")[0].rpartition(".")[0] for stack in model.stacks
    }


def test_what_travels_with_the_gradient_in_it_is_refused() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
            out = self.linear(x) + table
            return out, out.tanh()

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Block() for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            table = torch.zeros_like(x)
            for block in self.blocks:
                x, table = block(x, table)
            return x

    samples = Samples.of({"x": torch.randn(4, 8)})
    model = nets.wrapped(Net(), samples)
    back = Back(Stream(model, samples, alone=True))
    _, block = next(model.walk(back=True))
    with pytest.raises(prunella.ModelError, match="Net pass each other more than the hidden state"):
        back.skip(block)
