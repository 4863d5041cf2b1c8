"""Every allocation with every step, pattern and order, end to end on a model of two blocks."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import tiny
import torch

import prunella
from prunella import InputError
from prunella.allocate import allocations
from prunella.layers import find_layers
from prunella.registry import find, steps
from prunella.tasks.text import wrap_model

PATTERNS = ["unstructured", "2:4", "4x1"]


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return tiny.token_windows(4, 24)


def combinations() -> Iterator[Any]:
    """All of them. Every step with every pattern and order is quick where the allocation is uniform, and every
    allocation with every pattern and order where the step is Wanda; the others are slow."""
    names = sorted(name for name, step in steps.items() if step.prunes)
    for allocation, step, pattern, order in itertools.product(sorted(allocations), names, PATTERNS, ["layer", "block"]):
        quick = allocation == "uniform" or step == "wanda"
        yield pytest.param(allocation, step, pattern, order, marks=() if quick else pytest.mark.slow)


@pytest.mark.parametrize(("allocation", "step", "pattern", "order"), combinations())
def test_every_combination_prunes_end_to_end(
    allocation: str, step: str, pattern: str, order: str, ids: torch.Tensor
) -> None:
    network = tiny.build("llama")
    with torch.no_grad():
        before = network(ids).logits
    recipe = {"steps": [step], "pattern": pattern, "order": order, "allocate": allocation, "sparsity": 0.5}
    refusal = ""
    try:
        report = prunella.prune(network, recipe, calibration=ids)
    except InputError as error:
        refusal = str(error)
    if refusal:  # the few that cannot be say which two things do not go together
        if "use --order block" in refusal:
            assert (order, find(step).per_layer) == ("layer", False)
            assert f"step '{step}'" in refusal
        else:
            assert pattern != "unstructured"
            assert f"pattern {pattern}" in refusal
            assert f"step '{step}'" in refusal or f"allocation '{allocation}'" in refusal
        return
    assert order == "block" or find(step).per_layer
    # Allocations may spread it, but the whole is as sparse as asked, up to rounding in each layer or row.
    assert report.sparsity == pytest.approx(0.5, abs=0.01)
    model = wrap_model(network)
    zeros = {
        slot.name: (slot.read() == 0).float().mean().item()
        for name in model.blocks
        for slot in find_layers(model.module(name), name)
    }
    assert zeros.keys() == {la.name for la in report.layers}
    for layer in report.layers:
        if layer.bits is None:
            assert zeros[layer.name] == pytest.approx(layer.sparsity, abs=1e-6)
        else:  # kept weights may round to zero
            assert layer.sparsity - 1e-6 <= zeros[layer.name] < layer.sparsity + 0.2
        assert layer.error is not None
        assert 0 < layer.error < 1
    with torch.no_grad():
        after = network(ids).logits
    assert torch.isfinite(after).all()
    assert not torch.equal(after, before)
