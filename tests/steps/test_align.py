from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

import prunella
from prunella import InputError, Stats, register
from prunella.registry import steps
from prunella.types import Layer

NEEDS = frozenset({"gram", "drift"})


@pytest.fixture
def drifted(case: Callable[..., Any]) -> tuple[Any, Tensor]:
    """A layer whose inputs in the dense model are others, and those."""
    given = case()
    generator = torch.Generator().manual_seed(1)
    mix_II = torch.eye(32) + 0.1 * torch.randn(32, 32, generator=generator)
    dense_TI = given.x_TI @ mix_II + 0.1 * torch.randn(400, 32, generator=generator)
    layer = replace(given.layer, stats=Stats.of(given.x_TI, NEEDS, 64, dense_TI))
    return replace(given, layer=layer), dense_TI


def test_the_aligned_weight_is_the_least_squares_solution(drifted: tuple[Any, Tensor]) -> None:
    given, dense_TI = drifted
    after = given.apply("align", damping=0.0).layer
    wanted_TO = dense_TI.double() @ given.layer.dense_OI.double().T
    exact_IO = torch.linalg.lstsq(given.x_TI.double(), wanted_TO).solution
    torch.testing.assert_close(after.weight_OI.double(), exact_IO.T, rtol=1e-2, atol=1e-2)
    assert torch.equal(after.dense_OI, after.weight_OI)
    assert after.mask_OI is None


def test_every_loss_is_the_loss_beside_the_dense_model_up_to_a_constant(drifted: tuple[Any, Tensor]) -> None:
    """||X V^T - X' W^T||^2 - ||X (V - aligned)^T||^2 does not depend on V."""
    given, dense_TI = drifted
    aligned_OI = given.apply("align", damping=0.0).layer.dense_OI.double()
    x_TI, goal_TO = given.x_TI.double(), dense_TI.double() @ given.layer.dense_OI.double().T
    constants = []
    for _ in range(3):
        v_OI = torch.randn(16, 32).double()
        constants.append((x_TI @ v_OI.T - goal_TO).square().sum() - (x_TI @ (v_OI - aligned_OI).T).square().sum())
    torch.testing.assert_close(constants[1:], [constants[0]] * 2, rtol=1e-3, atol=0.0)


def test_strength_0_and_no_drift_change_nothing(drifted: tuple[Any, Tensor]) -> None:
    given, _ = drifted
    assert torch.equal(given.apply("align", strength=0.0).layer.weight_OI, given.layer.weight_OI)
    same = replace(given, layer=replace(given.layer, stats=Stats.of(given.x_TI, NEEDS, 64, given.x_TI)))
    assert torch.equal(same.apply("align").layer.weight_OI, given.layer.weight_OI)


def test_a_mask_that_stands_is_fitted_to_the_dense_model(drifted: tuple[Any, Tensor]) -> None:
    given, dense_TI = drifted
    goal_TO = dense_TI @ given.layer.dense_OI.T

    def loss(result: Any) -> float:
        return float((result.x_TI @ result.layer.weight_OI.T - goal_TO).square().mean())

    pruned = given.apply("magnitude")
    aligned = pruned.apply("align")
    assert torch.equal(aligned.layer.weight_OI, pruned.layer.weight_OI)
    fitted = aligned.apply("update")
    assert torch.equal(fitted.layer.mask_OI, pruned.layer.mask_OI)
    assert loss(fitted) < loss(pruned.apply("update")) < loss(pruned)


@pytest.mark.parametrize("order", ["layer", "block"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])
def test_drift_is_what_the_dense_model_has_beside_the_pruned_one(architecture: str, order: str) -> None:
    ids_NL = tiny.token_windows(40, 64)
    seen: dict[str, Tensor] = {}

    @register("drifting", needs={"gram", "drift"})
    def drifting(layer: Layer) -> Layer:
        """Remember the drift."""
        seen[layer.name] = layer.stats.mean_drift_II
        return layer.pruned(layer.weight_OI, torch.rand(layer.weight_OI.shape) > 0.5)

    def inputs(network: Any) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, module in network.named_modules():
            module.register_forward_pre_hook(
                lambda _, args, name=name: found.__setitem__(name, args[0].flatten(0, 1)) if args else None
            )
        with torch.no_grad():
            network(ids_NL, use_cache=False)
        return found

    network = tiny.build(architecture)
    try:
        prunella.prune(network, {"steps": ["drifting"], "order": order}, calibration=ids_NL)
    finally:
        del steps["drifting"]
    dense, pruned = inputs(tiny.build(architecture)), inputs(network)
    compared = 0
    for name, drift_II in seen.items():
        if "experts" in name:
            assert not drift_II.any()
        elif order == "layer" or name.endswith(("q_proj", "c_attn")):  # block order: the block is still dense
            expected_II = (dense[name] - pruned[name]).T @ pruned[name] / ids_NL.numel()
            torch.testing.assert_close(drift_II, expected_II, rtol=1e-3, atol=1e-5)
            compared += bool(drift_II.any())
    assert compared


def test_alone_it_is_refused() -> None:
    with pytest.raises(InputError, match="align chooses no weights to prune: add a step that does, such as wanda"):
        prunella.Recipe.of({"steps": ["align"]})
